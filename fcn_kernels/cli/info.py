"""``python -m fcn_kernels info``: what is here, and what a call of given sizes would run on."""

import argparse
import importlib.metadata
import platform

import torch

from fcn_kernels._version import __version__
from fcn_kernels.backends import HAS_TRITON, resolve_backend, runs_on
from fcn_kernels.cli.arguments import at_least_one
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of the call."""
    parser.add_argument("--sets", "-B", type=at_least_one, default=20, help="sets in the batch (20)")
    parser.add_argument("--rows", "-N", type=at_least_one, default=20, help="rows a set (20)")
    parser.add_argument("--dim", "-C", type=at_least_one, default=512, help="columns (512)")
    parser.add_argument("--k", "-K", type=at_least_one, default=3, help="picks a set (3)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--packed", action="store_true", help="sets packed with cu_seqlens")
    parser.add_argument("--device", help='"cuda" or "cpu"; by default cuda where there is one')
    parser.add_argument("--backend", choices=("triton", "cpp", "torch"), help="by default chosen by device")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from error
    print(f"fcn_kernels {__version__}")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    print(f"torch       {torch.__version__}")
    print(f"triton      {importlib.metadata.version('triton') if HAS_TRITON else 'not installed'}")
    print(f"cpu         {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"cuda:{i}      {p.name}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda        none")
    print()
    print(f"coreset_select(features {_shape(args)} {args.dtype} on {device}, k={args.k}{', packed' * args.packed})")
    for line in describe(args, device):
        print(f"  {line}")
    return 0


def describe(args: argparse.Namespace, device: str) -> list[str]:
    """The backend and, on Triton, the tier and launch of each pass; or why the call would fail."""
    # shapes are all that a plan needs
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return ["there is no CUDA device here"]
    try:
        backend = resolve_backend(
            args.backend, torch.empty(0, dtype=DTYPES[args.dtype], device=device), cpp.unavailable
        )
    except (RuntimeError, TypeError) as error:
        return [str(error)]
    found = runs_on(backend, DTYPES[args.dtype], cpp.unavailable)
    if found == "cpp":
        return ["backend cpp: sets spread over the threads, large ones by blocks of rows"]
    if found == "torch":
        why = [f"not cpp: {cpp.unavailable(DTYPES[args.dtype])}"] if backend == "cpu" else []
        return ["backend torch: cache-sized groups of sets, operation by operation", *why]
    from fcn_kernels.selection.kernels import launch

    problem = Problem(
        features=torch.empty(_shape(args), dtype=DTYPES[args.dtype], device="meta"),
        cu_seqlens=torch.empty(args.sets + 1, dtype=torch.int32, device="meta") if args.packed else None,
        k=args.k,
    )
    forward, backward = (plans[0] for plans in launch.plans(problem))
    lines = ["backend triton"]
    for name, plan in (("forward", forward), ("backward", backward)):
        tile = f"tiles of {plan.block_n} x {plan.block_c}"
        lines.append(f"{name:9}{plan.name}: {args.sets * plan.parts} programs of {plan.warps} warps, {tile}")
    return lines


def _shape(args: argparse.Namespace) -> tuple[int, ...]:
    return (args.sets * args.rows, args.dim) if args.packed else (args.sets, args.rows, args.dim)
