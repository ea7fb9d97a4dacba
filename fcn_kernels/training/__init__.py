"""Training of heads on embeddings with identity labels."""
