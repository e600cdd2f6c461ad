"""Settings dataclasses and the ranges of their values."""
