"""From scores to error rates."""
