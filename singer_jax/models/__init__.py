"""Vision transformers, their registry and their weights."""
