"""Work directories of runs: file names, checkpoints, verification, lock, metrics, recorder."""
