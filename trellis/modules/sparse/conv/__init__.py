"""Submanifold convolution and its backends."""
