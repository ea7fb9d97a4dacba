"""Embeddings, descriptors and checkpoints on disk."""
