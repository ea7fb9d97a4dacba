"""Coreset selection in Triton."""
