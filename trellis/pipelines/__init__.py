"""From shapes to tokens to meshes with one checkpoint."""
