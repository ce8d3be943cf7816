"""Triton kernels (`planc.backends.triton.kernels`, which needs triton) for what plain PyTorch does slowly on a GPU."""
