"""Shapes and volumes to a prepared dataset."""
