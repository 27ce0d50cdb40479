"""Proof that a checkpoint's numbers equal PyTorch's."""
