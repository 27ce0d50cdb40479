"""Training: data, losses, the step, the loop, and what survives."""
