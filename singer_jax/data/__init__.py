"""Image sources, transforms and the loader. Nothing here imports jax: it runs in loader workers."""
