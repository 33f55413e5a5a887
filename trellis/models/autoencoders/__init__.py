"""The sparse SDF autoencoder and its VQ-VAE."""
