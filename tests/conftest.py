"""Where the tests run: on the GPU if there is one, else on the CPU, with Triton's kernels interpreted there."""

import os

# Workers that each take all cores make each other wait at every operation.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Triton and fcn_kernels read this once, when they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("fcn_kernels", deadline=None, derandomize=True)
settings.load_profile("fcn_kernels")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
