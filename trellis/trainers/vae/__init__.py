"""Trainers of autoencoders."""
