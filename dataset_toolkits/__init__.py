"""Command-line preparation of datasets, in TRELLIS's style."""
