"""Predictions of kernels' times from their machine code, for GPUs that are not here."""
