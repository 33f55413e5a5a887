"""Quantizers and sparse layers."""
