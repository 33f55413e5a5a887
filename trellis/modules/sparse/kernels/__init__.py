"""Triton kernels of the sparse engine besides the convolutions; imported only when a tensor needs them."""
