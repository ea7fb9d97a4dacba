"""Command-line tools: what a call would run on here, and descriptors from files of embeddings."""
