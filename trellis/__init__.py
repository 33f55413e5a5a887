"""Trainer and tokenizer for medical 3D shapes."""
