"""The attention of FaceCoresetNet's head: 24 queries of each set, against keys and values that are made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.conftest import Bench
from benchmarks.harness import Contender
from benchmarks.workloads import BOTH, FORWARD, FUSED, IJBC_ROWS, IJBC_SETS, Case, Inputs, least_bytes, rotated
from fcn_kernels.attention.encoding import Waves, sinusoid
from fcn_kernels.attention.op import set_attention
from fcn_kernels.sets import RowSets

KEYS = "keys and values made"
QUERIES = 24  # 8 heads of 3 picks
DROPOUT = 0.1
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""From queries, rows, norms, the encoding's weight and the dropout."""


def rows(size: str) -> list[tuple[Case, str, str]]:
    """The keys have no packed form."""
    dtype = torch.bfloat16 if size == "cuda" else torch.float32
    shapes = {"quick": [(2, 30)], "cpu": [(64, 20), (1, 8000)]}
    cases = [Case(b, n, 512, 3, dtype) for b, n in shapes.get(size, [(256, 20), (64, 256), (1, 8000), (1, 100_000)])]
    listed = [(case, work, name) for case in cases for work in (FORWARD, BOTH) for name in (FUSED, KEYS)]
    if size == "cuda":
        packed = Case(IJBC_SETS, None, 512, 3, dtype, total=IJBC_ROWS)
        listed += [(packed, work, FUSED) for work in (FORWARD, BOTH)]
    return listed


def fused(i: Inputs) -> Attend:
    """This package's, on the backend that the device gets."""
    device = i.features.device
    if i.cu_seqlens is not None:
        sets = RowSets.packed(i.cu_seqlens, device)
    else:
        sets = RowSets.padded(*i.features.shape[:2], None, device)

    def attend(queries: Tensor, features: Tensor, quality: Tensor, weight: Tensor, dropout: float) -> Tensor:
        rows, norms = features.flatten(0, -2), quality.flatten()
        return set_attention(queries, rows, norms, weight, sets, dropout=dropout)[0]

    return attend


def keys_made(queries: Tensor, features: Tensor, quality: Tensor, weight: Tensor, dropout: float) -> Tensor:
    """As PyTorch would have it, in the rows' dtype."""
    values = features * quality.to(features.dtype)[..., None]
    wave = sinusoid(quality, Waves.of(features.shape[-1], quality.dtype, quality.device))
    keys = values + F.layer_norm(wave, wave.shape[-1:], weight).to(values.dtype)
    return F.scaled_dot_product_attention(queries.to(values.dtype), keys, values, dropout_p=dropout, scale=1.0)


def contender(attend: Attend, inputs: list[Inputs], work: str) -> Contender:
    """A call in inference, or a training step."""
    first = inputs[0]
    dim = first.features.shape[-1]
    queries = torch.randn(first.grad.shape[0], QUERIES, dim, device=first.features.device).requires_grad_()
    weight = torch.ones(dim, device=queries.device).requires_grad_()

    def forward(turn: int) -> object:
        i = inputs[turn % len(inputs)]
        with torch.no_grad():
            return attend(queries, i.features, i.quality, weight, 0.0)

    def both(turn: int) -> object:
        i = inputs[turn % len(inputs)]
        out = attend(queries, i.features, i.quality, weight, DROPOUT)
        return torch.autograd.grad(out, (queries, i.features, i.quality, weight), torch.ones_like(out))

    return forward if work == FORWARD else both


def build(case: Case, work: str, device: torch.device) -> tuple[dict[str, Contender], list[Inputs]]:
    """Unit rows, and the norms that they had."""
    inputs = [
        i._replace(
            features=F.normalize(i.features.detach(), dim=-1).requires_grad_(),
            quality=i.quality.detach().mul(20).requires_grad_(),
        )
        for i in rotated(case, device)
    ]
    made = {FUSED: contender(fused(inputs[0]), inputs, work)}
    if case.rows is not None:
        made[KEYS] = contender(keys_made, inputs, work)
    return made, inputs


def test_attention(benchmark: Any, bench: Bench, row: tuple[Case, str, str]) -> None:
    case, work, name = row
    race = bench.race(("attention", case, work), lambda: build(case, work, bench.device))
    facts = {"work": work, "least_bytes": least_bytes(case, work), **case.facts}
    bench.record(benchmark, race, name, "attention", None, **facts)
