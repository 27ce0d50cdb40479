"""Continuous batching: policy in pure Python, arithmetic in the jitted steps, met in `engine`."""
