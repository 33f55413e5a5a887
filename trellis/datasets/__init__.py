"""Prepared files to plain CPU tensors."""
