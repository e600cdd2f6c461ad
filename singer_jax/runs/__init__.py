"""The life of a work directory: checkpoints, verification, lock, metrics."""
