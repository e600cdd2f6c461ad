"""State, step, optimiser and the loop of a training run."""
