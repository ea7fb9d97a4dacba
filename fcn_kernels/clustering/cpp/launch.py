"""Chunks in C++: the forward pass of CPUs that have a compiler. ``clustering.cpp`` says how it works.

The backward pass is ``torch_backend``'s, from the tokens kept here.
"""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from fcn_kernels.clustering import torch_backend
from fcn_kernels.clustering.problem import Chunks, Clustered
from fcn_kernels.cpp import calls

_SOURCE = Path(__file__).with_name("clustering.cpp")
_function = calls.functions(_SOURCE, {"forward": 0})
# Call and Clustered of batch.h: addresses, 0 for what is not given; sizes
_CALL, _OUT = struct.Struct("20P10q"), struct.Struct("6P")
_WEIGHTS = ("qkv", "proj", "fc1", "fc2")

chunks_backward = torch_backend.chunks_backward


@functools.cache
def unavailable(dtype: torch.dtype) -> str:
    """Why chunks of rows of this type cannot run in C++, or "" if they can."""
    if dtype == torch.float64:
        return "float64 rows are PyTorch's"
    return calls.why_unavailable(_SOURCE, dtype)


def chunks_forward(p: Chunks, keep: bool) -> Clustered:
    """Everything in one call."""
    features = p.features if p.features.stride(1) == 1 or p.features.shape[1] == 1 else p.features.contiguous()
    found = Clustered.empty(p, keep)
    found.shares.zero_()  # of rows that take no part
    found.hidden.zero_()
    layers = [t for name in _WEIGHTS for t in (_inputs_first(getattr(p, f"{name}_weight")), getattr(p, f"{name}_bias"))]
    plain = functools.partial(calls.plain, dtype=p.tokens.dtype)
    held = (
        features,
        *map(plain, (p.quality, p.styles)),
        calls.plain(p.valid, torch.bool),
        *map(plain, (p.table, p.edges, p.tokens, *layers, _inputs_first(p.weight), p.bias, p.residual)),
        *(calls.plain(t, torch.int64) for t in (p.offsets, p.lengths)),
    )
    (rows, width), (centers, dim), chunks = features.shape, p.tokens.shape, p.lengths.shape[0]
    call = _CALL.pack(
        *map(calls.address, held),
        rows,
        chunks,
        width,
        features.stride(0),
        dim,
        p.table.shape[1],
        centers,
        p.depth,
        p.heads,
        calls.threads(),
    )
    status = _function("forward", features.dtype)(call, _OUT.pack(*map(calls.address, found)))
    calls.check_status(status, f"the clustering C++ for {rows} rows of {width} in {chunks} chunks")
    return found


def _inputs_first(weight: Tensor) -> Tensor:
    """(..., outputs, inputs) to (..., inputs, outputs), contiguous: as it is, if it lies so in memory."""
    return weight.mT.contiguous()
