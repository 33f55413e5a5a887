"""The step loop, checkpoints, precision and optimisation."""
