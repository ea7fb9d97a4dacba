"""How often the kernels load the rows of a set from global memory, counted load by load in Triton's interpreter.

    python -m benchmarks.checks.reads             # a Markdown table

A pass is as many loads as the set has elements. A pick's row, loaded alone, counts too: K of N rows a time. What the
tables of builds and of times cannot show is here exact: that a set of given quality or start is loaded K - 1 times, and
once more of neither, and once where it is one tile, which is held. Needs TRITON_INTERPRET=1, which this sets for
itself, and no GPU.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
from torch import Tensor

CALLS = ("quality", "norms", "norms, start", "squared distances", "squared distances, state")
"""What a call is given: a quality, nothing, or a start; and squared distances without and with the state after it."""


class Reads(NamedTuple):
    """Passes over the rows of one call."""

    way: str
    given: str
    rows: int
    k: int
    forward: float
    backward: float


@contextmanager
def counted(tensor: Tensor) -> Iterator[list[int]]:
    """Count the elements of ``tensor`` that interpreted kernels load meanwhile; the list's one number is the count.

    What one load asks for more than once, as for a row that meets several picks, counts once.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
    count = [0]
    load = InterpreterBuilder.create_masked_load

    def counting(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        asked = (mask.data != 0) & (ptrs.data >= begin) & (ptrs.data < end)
        count[0] += np.unique(ptrs.data[asked]).size if asked.any() else 0
        return load(self, ptrs, mask, *args)

    InterpreterBuilder.create_masked_load = counting
    try:
        yield count
    finally:
        InterpreterBuilder.create_masked_load = load


def passes(rows: int, k: int, dim: int = 16, given: str = CALLS[0], sets: int = 1) -> tuple[float, float]:
    """Passes over the rows that a call's forward and backward make, by the launcher's own choice of tier."""
    from fcn_kernels import coreset_select

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sets, rows, dim, generator=generator).requires_grad_()
    quality = torch.rand(sets, rows, generator=generator) + 0.5 if given == "quality" else None
    options: dict[str, Any] = {"start": rows // 2} if given.endswith("start") else {}
    if given.startswith("squared"):
        options = {"metric": "sqeuclidean", "return_min_distances": given.endswith("state")}
    with counted(features) as forward:
        coreset = coreset_select(features, k, quality, 0.5, backend="triton", **options)
    with counted(features) as backward:
        coreset.features.sum().backward()
    return forward[0] / features.numel(), backward[0] / features.numel()


def ways() -> dict[str, Any]:
    """Plans of any set; parts that meet between launches read what those at a barrier do."""
    from fcn_kernels.device.splits import LAUNCHES
    from fcn_kernels.selection.kernels.plans import Plan

    whole = Plan(16, 16, 1, 1)
    held = whole._replace(block_n=64, held=True)
    return {"whole": whole, "held": held, "split": whole._replace(parts=2, split=LAUNCHES.value)}


def many_picks(rows: int = 128, k: int = 24, dim: int = 16, eager: int = 4) -> tuple[float, float]:
    """Passes over a split set's rows without gradient: of all rows, and where those that cannot win are left out after
    ``eager`` picks. Rows are Gaussian."""
    from fcn_kernels.selection.kernels import launch
    from fcn_kernels.selection.problem import Problem

    generator = torch.Generator().manual_seed(0)
    problem = Problem(torch.randn(1, rows, dim, generator=generator), torch.ones(rows), k=k)
    original, found = (launch.LAZY_PICKS, launch.LAZY_BYTES, launch.EAGER_PICKS), []
    try:
        launch.EAGER_PICKS = eager
        for launch.LAZY_PICKS, launch.LAZY_BYTES in ((k + 1, 1), (k, 1)):
            with counted(problem.features) as count:
                launch.forward(problem, False, (ways()["split"],))
            found.append(count[0] / problem.features.numel())
    finally:
        launch.LAZY_PICKS, launch.LAZY_BYTES, launch.EAGER_PICKS = original
    return found[0], found[1]


def measure(rows: int = 64, k: int = 3) -> list[Reads]:
    """Every way to divide a set, for each of what may be given."""
    from fcn_kernels.selection.kernels import launch

    found = []
    original = launch.forward_plans, launch.backward_plans
    try:
        for way, plan in ways().items():
            launch.forward_plans = launch.backward_plans = lambda *sizes, plan=plan: (plan,)  # type: ignore[misc]
            found.extend(Reads(way, given, rows, k, *passes(rows, k, given=given)) for given in CALLS)
    finally:
        launch.forward_plans, launch.backward_plans = original
    return found


class ClusterReads(NamedTuple):
    """Passes over the rows that a clustering operator makes; those of one launch after the first find them in L2."""

    call: str
    forward: float
    backward: float


def measure_clustering(rows: int = 64) -> list[ClusterReads]:
    """cluster_sums with and without keys; chunks, long and small, that measure their norms or are given them."""
    from fcn_kernels.clustering.kernels import launch_chunks, launch_sums
    from fcn_kernels.clustering.problem import Chunks, Summed, Sums

    generator = torch.Generator().manual_seed(0)
    centers, dim, width = 4, 16, 32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features, where = draw(rows, width), (torch.tensor([0, rows]), torch.tensor([rows]), None)

    def counts(name: str, forward: Any, backward: Any, keys: int) -> ClusterReads:
        with counted(features) as first:
            out = forward()
        sets = out.masses.shape[0]
        grad = Summed(draw(sets, centers, width), draw(sets, centers, keys), draw(sets, centers))
        with counted(features) as second:
            backward(grad, out)
        return ClusterReads(name, first[0] / features.numel(), second[0] / features.numel())

    found = []
    for name, keys, scale in (("sums", None, None), ("sums, keys and scale", draw(rows, dim), draw(rows))):
        p = Sums(features, keys, scale, draw(centers, width if keys is None else dim), draw(centers), *where, ghosts=0)
        found.append(
            counts(
                name,
                lambda p=p: launch_sums.sums_forward(p),
                lambda grad, _, p=p: launch_sums.sums_backward(p, grad, True),
                0 if keys is None else dim,
            )
        )
    for name, cut, quality in (
        ("chunks", None, None),
        ("chunks, norms given", None, draw(rows).abs()),
        ("small chunks", rows // 4, None),
        ("small chunks, norms given", rows // 4, draw(rows).abs()),
    ):
        sizes = ((3, dim, dim), (dim, dim), (4, dim, dim), (dim, 4 * dim))
        qkv, proj, fc1, fc2 = (draw(1, *shape).reshape(1, -1, shape[-1]) for shape in sizes)
        blocks = [t for weight in (qkv, proj, fc1, fc2) for t in (weight, draw(1, weight.shape[1]))]
        shares = draw(centers, dim), draw(centers), None
        offsets = torch.arange(0, rows + 1, cut or rows)
        q = Chunks(
            features, quality, None, draw(61, dim), torch.arange(60.0), draw(centers, dim), *blocks, *shares,
            offsets, offsets.diff(), None, heads=1, longest=cut or rows,
        )  # fmt: skip
        found.append(
            counts(
                name,
                lambda q=q: launch_chunks.chunks_forward(q, True),
                lambda grad, out, q=q: launch_chunks.chunks_backward(q, grad, out, True),
                dim,
            )
        )
    return found


def main() -> int:
    """Print the tables."""
    found = measure()
    rows, k = found[0].rows, found[0].k
    print(f"Passes over the rows of a set of {rows}, K = {k}; a pick's row alone is 1 / {rows}.")
    print("\n| way | given | forward | backward |\n|---|---|---|---|")
    for r in found:
        print(f"| {r.way} | {r.given} | {r.forward:.3f} | {r.backward:.3f} |")
    rows, k, eager = 128, 24, 4
    every, some = many_picks(rows, k, eager=eager)
    print(
        f"\nPasses over the rows of a set of {rows} in parts, K = {k}, without gradient, {eager} of them of all rows."
    )
    print("\n| rows | forward |\n|---|---|")
    print(f"| all | {every:.3f} |\n| those that can win | {some:.3f} |")
    print("\nPasses over the rows of clustering. A launch reads them from memory once, then from L1 or L2.")
    print("\n| call | forward | backward |\n|---|---|---|")
    for c in measure_clustering():
        print(f"| {c.call} | {c.forward:.3f} | {c.backward:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
