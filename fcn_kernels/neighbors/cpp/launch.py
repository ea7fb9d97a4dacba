"""The statistics in C++: the backend of CPUs that have a compiler. ``neighbors.cpp`` says how it works."""

import functools
import struct
from pathlib import Path
from typing import Any

import torch

from fcn_kernels.cpp import calls
from fcn_kernels.neighbors import torch_backend
from fcn_kernels.neighbors.problem import Arriving, Gradients, Problem, Statistics

FILTER = 1
"""Scores that are made faster say which can matter: 0 nowhere, 1 where it pays; wherever they can 2 those of integers,
3 those of a few streamed rows. The bits are the same."""
_SOURCE = Path(__file__).with_name("neighbors.cpp")
_function = calls.functions(_SOURCE, {"forward": 0, "backward": 2})
# Asked, Statistics and Arriving of forward.h and backward.h: addresses, 0 for what is not given; sizes; numbers
_CALL, _FOUR = struct.Struct("4P8qd"), struct.Struct("4P")


@functools.cache
def unavailable(dtype: torch.dtype) -> str:
    """Why a bank of this type cannot be searched in C++, or "" if it can."""
    return calls.why_unavailable(_SOURCE, dtype)


def forward(p: Problem) -> Statistics:
    """The statistics of every row."""
    p = _in_one_dtype(p)
    found = Statistics.empty(p)
    _run("forward", p, _FOUR.pack(*calls.addresses(found)))
    return found


def backward(p: Problem, grad: Arriving, found: Statistics, wanted: tuple[bool, bool]) -> Gradients:
    """Gradients of rows and bank, those that are wanted, the sets S_i held."""
    if p.k == 0:  # three products with all scores, which PyTorch's library has
        return torch_backend.backward(p, grad, found, wanted)
    row_dtype, bank_dtype = p.rows.dtype, p.bank.dtype
    p = _in_one_dtype(p)
    slopes = torch_backend.slopes(grad, found)
    held = [*(calls.plain(t, p.dtype) for t in (*slopes, found.mean)), calls.plain(found.indices, torch.int64)]
    drows = p.rows.new_empty(p.rows.shape if wanted[0] else 0, dtype=p.dtype)
    dbank = p.bank.new_empty(p.bank.shape if wanted[1] else 0)
    outputs = (t if w else None for t, w in zip((drows, dbank), wanted, strict=True))
    _run("backward", p, _FOUR.pack(*calls.addresses(held)), *calls.addresses(outputs))
    return Gradients(drows.to(row_dtype), dbank.to(bank_dtype))


def _in_one_dtype(p: Problem) -> Problem:
    """A bank that is summed in the problem's dtype: one of float32 among float64 rows is made float64."""
    bank = p.bank.double() if p.dtype == torch.float64 else p.bank
    return p._replace(bank=bank if bank.stride(1) == 1 or bank.shape[1] == 1 else bank.contiguous())


def _run(name: str, p: Problem, *arguments: Any) -> None:
    (n, dim), (m, _) = p.rows.shape, p.bank.shape
    held = (calls.plain(p.rows, p.dtype), p.bank, calls.plain(p.ids, torch.int64), calls.plain(p.bank_ids, torch.int64))
    call = _CALL.pack(
        *calls.addresses(held),
        n,
        m,
        dim,
        p.bank.stride(0),
        p.k,
        p.normalized,
        FILTER,
        calls.threads(),
        p.min_cosine,
    )
    status = _function(name, p.bank.dtype)(call, *arguments)
    calls.check_status(status, f"context_statistics' C++ ({name}) for {n} rows, {m} bank rows of {dim} and k = {p.k}")
