"""Training: the step, runs and their checkpoints, stages, and grids of configurations."""
