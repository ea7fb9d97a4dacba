"""Triton code that operations share, and what a launch has to know of a GPU."""
