"""Clustering on the device: the Triton kernels and their launches."""
