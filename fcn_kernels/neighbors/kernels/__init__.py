"""The statistics in Triton, for GPUs."""
