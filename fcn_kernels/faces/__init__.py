"""From pictures of faces to rows of embeddings: photos and videos, detection, alignment, tracks, contact sheets."""
