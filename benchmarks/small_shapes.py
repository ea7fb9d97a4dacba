"""Every kernel once on small shapes, on the GPU, against the torch backend: what compute-sanitizer is run on."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fcn_kernels import coreset_select
from fcn_kernels.modules import CoresetAggregator

LENGTHS = (3, 700, 0, 1, 64)
"""Of packed sets: some stay on the chip, one is streamed, one is empty."""
SHAPES = [(3, 5, 32), (2, 64, 100), (1, 600, 64), (150, 130, 256)]
"""(B, N, C): resident, with columns that are no power of two, split, and streamed."""


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


def compare(name: str, step: Callable[..., Values], dtype: torch.dtype, *args: Any, **options: Any) -> None:
    """The GPU's values against those of the torch backend on the CPU."""
    expected, found = (step(device, dtype, *args, **options) for device in ("cpu", "cuda"))
    for key, wanted in expected.items():
        value = found[key].cpu()
        if key == "picks":
            same = torch.equal(value, wanted)
        else:
            same = bool((value - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max())
        if not same:
            raise AssertionError(f"{name} {args} {dtype} {options}: the {key} differ")
    print("equal:", name, *args, dtype, options or "", flush=True)


def main() -> int:
    """Print each case as it is done."""
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    for dtype in TOLERANCE:
        for options in ({}, {"normalized": True, "distinct": True}):
            for shape in SHAPES:
                compare("selection", selected, dtype, shape, (), **options)
            compare("selection", selected, dtype, (sum(LENGTHS), 64), LENGTHS, **options)
    compare("head", aggregated, torch.float32, LENGTHS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
