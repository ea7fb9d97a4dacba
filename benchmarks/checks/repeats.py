"""The same training step again and again, bit for bit: a race between threads shows as a gradient that differs.

    python -m benchmarks.checks.repeats [--times 10000] [--seconds 20]

Neither the interpreter nor racecheck, which looks at shared memory alone, sees a race in global memory. Sets are
streamed by whole programs, split over all of them, and packed; the head's attention runs forward and backward too.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels import CoresetAggregator, coreset_select

K = 3
"""With three picks a streamed backward pass reads and writes the chain of the running minimum in one loop."""


class Repeats(NamedTuple):
    """How often a step was run, and how often any of its results differed from the first run's."""

    name: str
    times: int
    differing: int


def steps(device: torch.device, small: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Training steps by name, each of which makes the same results whenever it is called."""
    scale = 8 if small else 1

    def selection(*shape: int, lengths: tuple[int, ...] = ()) -> Callable[[], tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(shape, generator=generator).to(device).requires_grad_()
        quality = torch.rand(shape[:-1], generator=generator).add(0.5).to(device).requires_grad_()
        gamma = torch.tensor(0.5, device=device, requires_grad=True)
        arriving = torch.randn(len(lengths) or shape[0], K, shape[-1], generator=generator).to(device)
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) if lengths else None

        def step() -> tuple[Tensor, ...]:
            seed = torch.Generator().manual_seed(1)
            coreset = coreset_select(features, K, quality, gamma, sample=True, generator=seed, cu_seqlens=offsets)
            return coreset.indices, *torch.autograd.grad(coreset.features, (features, quality, gamma), arriving)

        return step

    def head() -> tuple[Tensor, ...]:
        out = aggregator(unit, quality)
        return out.descriptor, *torch.autograd.grad(out.descriptor.sum(), (unit, aggregator.cross_norm.weight))

    torch.manual_seed(0)
    aggregator = CoresetAggregator(64, K, num_heads=4).eval().to(device)
    embeddings = torch.randn(20, 400 // scale, 64)
    quality = embeddings.norm(dim=-1).to(device)
    unit = torch.nn.functional.normalize(embeddings, dim=-1).to(device).requires_grad_()
    lengths = (3, 700 // scale, 64 // scale, 1, 1629 // scale)
    return {
        "streamed": selection(150, 130 // scale, 256),
        "split": selection(1, 40_000 // scale, 128),
        "packed": selection(sum(lengths), 64, lengths=lengths),
        "head": head,
    }


def repeat(name: str, step: Callable[[], tuple[Tensor, ...]], times: int, seconds: float) -> Repeats:
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
