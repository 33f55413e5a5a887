"""Helpers shared by geometry, data and training."""
