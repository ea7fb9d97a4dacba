"""Every kernel once on small shapes, on the GPU, against the torch backend: what compute-sanitizer is run on.

    python -m benchmarks.checks.small_shapes [WORKERS]

Several workers share the compiling, which is most of it the first time.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fcn_kernels import ClusterAggregate, CoresetAggregator, cluster_sums, context_statistics, coreset_select
from fcn_kernels.selection.kernels import launch

LENGTHS = (3, 700, 0, 1, 64)
"""Of packed sets: some stay on the chip, one is streamed, one is empty."""
SHAPES = [(3, 5, 32), (2, 64, 100), (1, 600, 64), (150, 130, 256)]
"""(B, N, C): small sets, columns that are no power of two, a split set, and many sets."""


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative to the largest value: half precision rounds results once more, by up to 2^-8 of themselves."""
Values = dict[str, Tensor]


def selected(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], lengths: tuple[int, ...], **options: Any
) -> Values:
    """A training step of the selection, from the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    quality = torch.rand(shape[:-1], generator=generator).add(0.5).to(device).requires_grad_()
    gamma = torch.tensor(0.5, device=device, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) if lengths else None
    seed = torch.Generator().manual_seed(1)
    coreset = coreset_select(rows, 3, quality, gamma, sample=True, generator=seed, cu_seqlens=offsets, **options)
    grad = torch.randn(coreset.features.shape, generator=generator).to(device, dtype)
    gradients = torch.autograd.grad(coreset.features, (rows, quality, gamma), grad)
    return {"picks": coreset.indices, **dict(zip(("features", "quality", "gamma"), gradients, strict=True))}


def aggregated(device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> Values:
    """Forward and backward of the whole head, without dropout."""
    torch.manual_seed(0)
    head = CoresetAggregator(64, num_heads=4).eval().to(device)
    embeddings = torch.randn(sum(lengths), 64)
    quality = embeddings.norm(dim=-1)
    unit = (embeddings / quality[:, None]).to(device, dtype).requires_grad_()
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    out = head(unit, quality.to(device), cu_seqlens=offsets)
    out.descriptor.float().sum(0).mul(torch.arange(64, device=device)).sum().backward()
    return {"picks": out.coreset.indices, "descriptor": out.descriptor.detach(), "features": unit.grad}


def picked(device: str, dtype: torch.dtype, metric: str) -> Values:
    """Many picks of a set that is split, without a gradient: of a smaller one than would leave rows out by itself."""
    rows = torch.randn(1, 3000, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with patch.object(launch, "LAZY_BYTES", 0):
        return {"picks": coreset_select(rows, 80, metric=metric).indices}


def summed(device: str, dtype: torch.dtype, centers: int, keyed: bool) -> Values:
    """Forward and backward of a cluster's sums, of values by keys of their own or by themselves."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 130, 32, generator=generator).to(device, dtype).requires_grad_()
    keys = torch.randn(2, 130, 16, generator=generator).to(device).requires_grad_() if keyed else None
    weight = torch.randn(centers, 16 if keyed else 32, generator=generator).to(device).requires_grad_()
    found = cluster_sums(values, weight, keys=keys)
    gradients = torch.autograd.grad(found.sums.cumsum(-1).sum(), (values, weight))
    return {"sums": found.sums.detach(), **dict(zip(("values", "weight"), gradients, strict=True))}


def clustered(device: str, dtype: torch.dtype) -> Values:
    """Forward and backward of Cluster and Aggregate, on chunks that a program has to itself and on longer ones."""
    torch.manual_seed(0)
    head = ClusterAggregate(32, depth=1, style_dim=8, norm_dim=8, num_heads=2, style_channels=0).eval().to(device)
    rows, styles = (torch.randn(2, 150, width).to(device, dtype) for width in (32, 8))
    out = head(rows.requires_grad_(), styles, lengths=torch.tensor([150, 20], device=device), chunk=100)
    parameters = [head.blocks[0].qkv.weight, head.centers]
    gradients = torch.autograd.grad(out.descriptor.cumsum(-1).sum(), (rows, *parameters))
    return {"descriptor": out.descriptor.detach(), **dict(zip(("features", "qkv", "centers"), gradients, strict=True))}


def compared_in_context(device: str, dtype: torch.dtype, k: int | None) -> Values:
    """Forward and backward of what is known of each row's nearest in a bank, identities apart."""
    generator = torch.Generator().manual_seed(0)
    x, bank = (torch.randn(n, 40, generator=generator).to(device, dtype).requires_grad_() for n in (70, 900))
    ids, bank_ids = (torch.arange(n, device=device) % 7 for n in (70, 900))
    least = None if k else -1.0
    found = context_statistics(x, bank, k, min_cosine=least, ids=ids, bank_ids=bank_ids)
    values = {"mean": found.mean.detach(), "std": found.std.detach()}
    if k is None:  # of all there is no gradient
        return values
    gradients = torch.autograd.grad((found.mean + found.std).sum(), (x, bank))
    return values | dict(zip(("rows", "bank"), gradients, strict=True))


def cases() -> Iterator[tuple[Callable[..., Values], torch.dtype, tuple[Any, ...], dict[str, Any]]]:
    """What is compared: a step, and its arguments after the device."""
    yield aggregated, torch.float32, (LENGTHS,), {}
    for dtype in TOLERANCE:
        for options in ({}, {"normalized": True, "distinct": True}):
            for shape in SHAPES:
                yield selected, dtype, (shape, ()), options
            yield selected, dtype, ((sum(LENGTHS), 64), LENGTHS), options
        for metric in ("cosine", "sqeuclidean"):
            yield picked, dtype, (metric,), {}
        for centers, keyed in ((4, True), (4, False), (70, True)):
            yield summed, dtype, (centers, keyed), {}
        yield clustered, dtype, (), {}
        for k in (5, 300, None):
            yield compared_in_context, dtype, (k,), {}


def compare(step: Callable[..., Values], dtype: torch.dtype, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The GPU's values against those of the CPU; returns what was compared."""
    expected, found = (step(device, dtype, *args, **options) for device in ("cpu", "cuda"))
    name = f"{step.__name__} {args} {dtype} {options or ''}"
    for key, wanted in expected.items():
        value = found[key].cpu()
        if key == "picks":
            same = torch.equal(value, wanted)
        else:
            same = bool((value - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max())
        if not same:
            raise AssertionError(f"{name}: the {key} differ")
    return name


def report(compared: Iterable[str]) -> None:
    """As they come."""
    for name in compared:
        print("equal:", name, flush=True)


def main() -> int:
    """Print each case as it is done."""
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    if len(sys.argv) > 1:
        with ProcessPoolExecutor(int(sys.argv[1]), get_context("spawn")) as pool:
            report(pool.map(compare, *zip(*cases(), strict=True)))
    else:
        report(compare(*case) for case in cases())
    return 0


if __name__ == "__main__":
    sys.exit(main())
