"""Fused, differentiable coreset selection: pick the few rows of a set that are both good and different."""

from fcn_kernels.select import Coreset, coreset_select

__version__ = "0.1.0"
__all__ = ["Coreset", "coreset_select"]
