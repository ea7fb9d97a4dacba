"""Measurements of fcn_kernels. ``pytest benchmarks/ --benchmark-only`` runs them, on any machine."""
