"""The same training step again and again, bit for bit: a race between threads shows as a gradient that differs.

    python -m benchmarks.checks.repeats [--times 10000] [--seconds 20]

Neither the interpreter nor racecheck, which looks at shared memory alone, sees a race in global memory. Sets are
streamed by whole programs, split over all of them, and packed; attention, clustering and the search for neighbors run
forward and backward too. On a CPU the threads of the C++ take turns that differ from call to call.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fcn_kernels import ClusterAggregate, CoresetAggregator, cluster_sums, context_statistics, coreset_select
from fcn_kernels.attention.op import set_attention
from fcn_kernels.sets import RowSets

K = 3
"""With three picks a streamed backward pass reads and writes the chain of the running minimum in one loop."""


class Repeats(NamedTuple):
    """How often a step was run, and how often any of its results differed from the first run's."""

    name: str
    times: int
    differing: int


Step = Callable[[], tuple[Tensor, ...]]
"""A training step, which makes the same results whenever it is called."""


def steps(device: torch.device, small: bool) -> dict[str, Step]:
    """Training steps by name: what they give, and the gradients."""
    scale = 8 if small else 1
    lengths = (3, 700 // scale, 64 // scale, 1, 1629 // scale)
    return {
        "streamed": selection(device, (150, 130 // scale, 256)),
        "split": selection(device, (1, 40_000 // scale, 128)),
        "packed": selection(device, (sum(lengths), 64), lengths),
        "attention": attention(device, lengths),
        "head": head(device, 400 // scale),
        "sums": sums(device, lengths),
        "clustering": clustering(device, lengths[-3:]),
        "neighbors": neighbors(device, 300 // scale, 20_000 // scale),
    }


def selection(device: torch.device, shape: tuple[int, ...], lengths: tuple[int, ...] = ()) -> Step:
    """Sets of equal lengths, or packed ones, in float32."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=random).to(device).requires_grad_()
    quality = torch.rand(shape[:-1], generator=random).add(0.5).to(device).requires_grad_()
    gamma = torch.tensor(0.5, device=device, requires_grad=True)
    arriving = torch.randn(len(lengths) or shape[0], K, shape[-1], generator=random).to(device)
    offsets = _offsets(lengths, device).int() if lengths else None

    def step() -> tuple[Tensor, ...]:
        seed = torch.Generator().manual_seed(1)
        coreset = coreset_select(features, K, quality, gamma, sample=True, generator=seed, cu_seqlens=offsets)
        return coreset.indices, *torch.autograd.grad(coreset.features, (features, quality, gamma), arriving)

    return step


def attention(device: torch.device, lengths: tuple[int, ...]) -> Step:
    """The head's 24 queries of each set, in bfloat16, with dropout."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(lengths), 128, generator=random)
    features = normalize(rows, dim=-1).to(device, torch.bfloat16).requires_grad_()
    quality = rows.norm(dim=-1).to(device).requires_grad_()
    queries = torch.randn(len(lengths), 24, 128, generator=random).to(device).requires_grad_()
    weight = torch.rand(128, generator=random).to(device).requires_grad_()
    sets, seed = RowSets.packed(_offsets(lengths, device), device), torch.tensor(1)

    def step() -> tuple[Tensor, ...]:
        out, masses = set_attention(queries, features, quality, weight, sets, dropout=0.1, seed=seed)
        loss = out.square().sum() + masses.square().sum()
        return out.detach(), masses.detach(), *torch.autograd.grad(loss, (queries, features, quality, weight))

    return step


def head(device: torch.device, rows: int) -> Step:
    """FaceCoresetNet's, of 20 sets."""
    torch.manual_seed(0)
    aggregator = CoresetAggregator(64, K, num_heads=4).eval().to(device)
    embeddings = torch.randn(20, rows, 64)
    quality = embeddings.norm(dim=-1).to(device)
    unit = normalize(embeddings, dim=-1).to(device).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = aggregator(unit, quality)
        loss = out.descriptor.sum()
        return out.descriptor.detach(), *torch.autograd.grad(loss, (unit, aggregator.cross_norm.weight))

    return step


def sums(device: torch.device, lengths: tuple[int, ...]) -> Step:
    """Rows shared out among 64 centers."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(sum(lengths), 128, generator=random).to(device).requires_grad_()
    weight = torch.randn(64, 128, generator=random).to(device).requires_grad_()
    offsets = _offsets(lengths, device)

    def step() -> tuple[Tensor, ...]:
        found = cluster_sums(features, weight, cu_seqlens=offsets)
        loss = found.sums.square().sum() + found.masses.square().sum()
        return found.sums.detach(), found.masses.detach(), *torch.autograd.grad(loss, (features, weight))

    return step


def clustering(device: torch.device, lengths: tuple[int, ...]) -> Step:
    """Cluster and Aggregate, a chunk a set, short ones and long ones."""
    torch.manual_seed(0)
    aggregator = ClusterAggregate(128, style_channels=0).eval().to(device)
    features = torch.randn(sum(lengths), 128).mul(20).to(device).requires_grad_()
    styles = torch.randn(sum(lengths), 64).to(device).requires_grad_()
    offsets, parameters = _offsets(lengths, device), tuple(aggregator.parameters())

    def step() -> tuple[Tensor, ...]:
        descriptor = aggregator(features, styles, chunk=None, cu_seqlens=offsets).descriptor
        wanted = (features, styles, *parameters)
        return descriptor.detach(), *torch.autograd.grad(descriptor.square().mul(descriptor).sum(), wanted)

    return step


def neighbors(device: torch.device, rows: int, bank_rows: int) -> Step:
    """The nearest rows of a bank."""
    random = torch.Generator().manual_seed(0)
    x, bank = (torch.randn(n, 128, generator=random).to(device).requires_grad_() for n in (rows, bank_rows))

    def step() -> tuple[Tensor, ...]:
        found = context_statistics(x, bank, 50)
        loss = found.mean.square().sum() + found.std.square().sum()
        return found.indices, found.mean.detach(), found.std.detach(), *torch.autograd.grad(loss, (x, bank))

    return step


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


def repeat(name: str, step: Step, times: int, seconds: float) -> Repeats:
    """Run a step up to ``times`` times, or until ``seconds`` are over."""
    first = [result.clone() for result in step()]
    differing = torch.zeros((), dtype=torch.int64, device=first[0].device)
    deadline, done = time.monotonic() + seconds, 0
    while done < times and (done % 64 or time.monotonic() < deadline):
        # counted on the device, without a wait in between
        same = torch.stack([(a == b).all() for a, b in zip(first, step(), strict=True)]).all()
        differing += ~same
        done += 1
    return Repeats(name, done, int(differing))


def main(argv: list[str] | None = None) -> int:
    """Print a line for each step; 1 if any result differed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks.repeats", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10_000, help="runs of each step (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for all together (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="an eighth of the rows")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = steps(device, args.small)
    found = [repeat(name, step, args.times, args.seconds / len(chosen)) for name, step in chosen.items()]
    for result in found:
        print(f"{result.name}: {result.differing} of {result.times} runs differ from the first", flush=True)
    return int(any(result.differing for result in found))


if __name__ == "__main__":
    sys.exit(main())
