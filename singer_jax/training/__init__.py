"""State, step, optimiser, checkpoints and the loop of a training run."""
