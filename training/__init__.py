"""Training: the step, runs and their checkpoints, stages, grids."""
