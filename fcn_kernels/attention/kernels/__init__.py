"""Set attention in Triton."""
