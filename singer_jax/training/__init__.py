"""The state, the step, the optimiser and the loop of a training run."""
