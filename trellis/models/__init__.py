"""Models and their weights."""
