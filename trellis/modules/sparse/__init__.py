"""Sparse tensors, levels and layers."""
