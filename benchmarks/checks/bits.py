"""Hash what 200 drawn problems give, on every backend: two versions that print the same lines agree to the bit.

``python -m benchmarks.checks.bits [--problems N] [--seed S]``: a line for each backend and what it gives. Run it before
and after a change that should change nothing. The Triton kernels run in the interpreter where there is no GPU.
"""

import argparse
import hashlib
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

from fcn_kernels import Coreset, coreset_select

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(seed: int) -> tuple[Tensor, dict[str, object]]:
    """Features and options of a problem that depend on its number alone."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def chance(percent: int) -> bool:
        return integer(0, 100) < percent

    sets, rows, dim = integer(1, 4), integer(1, 70), integer(1, 40)
    features = torch.randn(sets, rows, dim, generator=generator, dtype=torch.float64)
    options: dict[str, object] = {"k": integer(1, 6), "gamma": integer(-10, 20) / 10, "distinct": chance(30)}
    options |= {"tau": 0.5 if chance(30) else 1.0, "distance_scale": 0.5 if chance(30) else 1.0}
    if chance(20):
        features = torch.nn.functional.normalize(features, dim=-1)
        options["normalized"] = True
    shape: tuple[int, ...] = (sets, rows)
    if chance(30):
        cuts = torch.randint(0, sets * rows + 1, (sets - 1,), generator=generator).sort().values
        ends = torch.tensor([0]), torch.tensor([sets * rows])
        options["cu_seqlens"] = torch.cat((ends[0], cuts, ends[1])).to(torch.int32)
        features, shape = features.flatten(0, 1), (sets * rows,)
    elif chance(40):
        options["lengths"] = torch.randint(0, rows + 1, (sets,), generator=generator)
    elif chance(40):
        options["mask"] = torch.rand(sets, rows, generator=generator) < 0.7
    if chance(60):
        options["quality"] = torch.rand(shape, generator=generator) + 0.1
    if chance(20):
        bad = torch.randint(0, features.numel(), (2,), generator=generator)
        features.view(-1)[bad] = torch.tensor([torch.nan, torch.inf], dtype=torch.float64)
    if chance(50):
        options |= {"sample": True, "generator": torch.Generator().manual_seed(seed)}
    return features, options


def run(features: Tensor, options: dict[str, object], backend: str) -> tuple[Coreset, list[Tensor]]:
    """The selection, and the gradients to features, quality and gamma."""
    x = features.clone().requires_grad_()
    gamma = torch.tensor(options["gamma"], dtype=torch.float32, requires_grad=True)
    quality = options.get("quality")
    leaves = [x, gamma]
    if isinstance(quality, Tensor):
        quality = quality.to(x.dtype).requires_grad_()
        leaves.append(quality)
    rest = {name: value for name, value in options.items() if name not in ("k", "gamma", "quality")}
    coreset = coreset_select(x, options["k"], quality, gamma, backend=backend, **rest)
    arriving = torch.linspace(-1, 1, coreset.features.numel(), dtype=torch.float64).view(coreset.features.shape)
    (coreset.features.double() * arriving).sum().backward()
    return coreset, [leaf.grad if leaf.grad is not None else torch.zeros(()) for leaf in leaves]


def main() -> None:
    """Print the hashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", default=["torch", "cpp", "triton"])
    args = parser.parse_args()
    for backend in args.backends:
        digests = {name: hashlib.sha256() for name in ("indices", "distances", "gradients")}
        for number in range(args.problems):
            features, options = drawn(args.seed * 1_000_003 + number)
            dtype = DTYPES[number % len(DTYPES)]
            if backend == "triton" and dtype == torch.float64:
                dtype = torch.float32
            if isinstance(generator := options.get("generator"), torch.Generator):
                options["generator"] = generator.clone_state()
            coreset, gradients = run(features.to(dtype), options, backend)
            results = {"indices": [coreset.indices], "distances": [coreset.distances], "gradients": gradients}
            for name, tensors in results.items():
                for tensor in tensors:
                    digests[name].update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, digest in digests.items():
            print(f"{backend:8} {name:10} {digest.hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    main()
