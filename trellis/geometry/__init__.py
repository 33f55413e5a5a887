"""Pure geometry on arrays; no neural network."""
