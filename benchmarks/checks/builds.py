"""Build the kernels as the launchers would, for GPUs that are not here, and read what the compiler says of them.

    python -m benchmarks.checks.builds            # a Markdown table
    python -m benchmarks.checks.builds --json     # the same for programs

A launcher runs with its kernel replaced by a recorder, which asks Triton's runtime what it would compile for these
arguments. No GPU is needed: ptxas and cuobjdump come with Triton.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.checks.orders import Sum, sums
from benchmarks.checks.races import races

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


# Multiprocessors of an A100, an H100, a B200 and an MI300X, by which the launchers divide large sets.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}

SELECTION_KERNELS = ("select_forward", "select_backward", "select_lazily")
SUMS_KERNELS = ("share_forward", "add_pieces", "share_backward")
CHUNK_KERNELS = (
    "blocks_of_small_chunks",
    "blocks_of_small_chunks_backward",
    "embed",
    "layer_norm",
    "linear",
    "attend",
    "linear_weights",
    "layer_norm_backward",
    "attend_queries",
    "attend_keys",
)
ATTENTION_KERNELS = ("attention_forward", "merge_parts", "attention_backward")
NEIGHBORS_KERNELS = (
    "measure_rows",
    "filter_scores",
    "select_best",
    "find_kth",
    "collect_best",
    "sum_moments",
    "gather_rows",
    "gather_bank",
)
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_cooperative_grid")


class Spec(NamedTuple):
    """A recorded launch, in a form that can be sent to another process."""

    label: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[str, Any]
    """What the compiler is told of an argument: that it is a multiple of 16."""
    options: dict[str, int]


class Build(NamedTuple):
    """What the compiler made of a launch on one target."""

    label: str
    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    """Bytes of stack a thread, which is where registers spill to."""
    shared: int
    """Bytes of shared memory a program."""
    row_loads: dict[str, int]
    """Global loads by width in bits, PTX mnemonic's vector times element, or as long as an asynchronous copy."""
    races: list[str]
    """Arguments whose memory is stored to while other threads may still have to load it."""
    tensor_cores: int
    """Their instructions, on NVIDIA's."""
    sums: list[Sum]
    """What is summed over the last axis, and in which order."""


def specialized(kernel: Any, backend: Any, bind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """As JITFunction.run, up to where that compiles: the arguments by name, and the signature, constants and attributes
    that it would compile."""
    bound, specialization, options = bind(*args, **kwargs, debug=False, instrumentation_mode="")
    _, *compiled = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return bound, *compiled


class Recorder:
    """Stands in for a kernel: keeps what Triton's runtime would compile for each launch instead of launching."""

    def __init__(self, kernel: Any, label: str, target: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.kernel, self.label, self.specs = kernel, label, list[Spec]()
        self.target = GPUTarget(*TARGETS[target])
        self.backend = make_backend(self.target)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        """A launch."""
        if self.target.backend == "hip":
            kwargs.pop("maxnreg", None)  # where PyTorch is AMD's, the launchers do not ask for it
        _, signature, constants, attributes = specialized(self.kernel, self.backend, self.bind, args, kwargs)
        names = list(signature)
        self.specs.append(
            Spec(
                label=self.label,
                module=self.kernel.fn.__module__,
                kernel=self.kernel.fn.__name__,
                signature=signature,
                constants={names[i]: value for (i,), value in constants.items()},
                attributes={names[i]: value for (i,), value in attributes.items() if value},
                options={name: kwargs[name] for name in OPTIONS if name in kwargs},
            )
        )


def record(label: str, module: Any, kernels: tuple[str, ...], launch: Callable[[], object], target: str) -> list[Spec]:
    """The launches of ``kernels`` that ``launch()`` makes through ``module``, for a target."""
    originals = {name: getattr(module, name) for name in kernels}
    recorders = {name: Recorder(k, label, target) for name, k in originals.items()}
    try:
        for name, recorder in recorders.items():
            setattr(module, name, recorder)
        launch()
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
    return [spec for recorder in recorders.values() for spec in recorder.specs]


def compiled(spec: Spec, target: str) -> Any:
    """One launch's kernel, as Triton compiles it for a target.

    Anew: Triton's cache names the lines of the checkout that a kernel came from.
    """
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec.module), spec.kernel)
    order = list(spec.signature)
    source = ASTSource(
        fn=kernel,
        signature=spec.signature,
        constexprs={(order.index(n),): v for n, v in spec.constants.items()},
        attrs={(order.index(n),): v for n, v in spec.attributes.items()},
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=spec.options)


def build(spec: Spec, target: str) -> Build:
    """Compile one launch for one target."""
    made = compiled(spec, target)
    warps = spec.options["num_warps"]
    if target.startswith("gfx"):
        registers, spills = _amd_resources(made.asm["amdgcn"])
        loads: dict[str, int] = {}
        products = 0
    else:
        registers, spills = nvidia_resources(made.asm["cubin"])
        loads = _load_widths(made.asm["ptx"])
        products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", made.asm["ptx"]))
    racing = sorted({race.memory.removeprefix("%") for race in races(made.asm["ttgir"])})
    shared = made.metadata.shared
    orders = sorted(sums(made.asm["ttgir"]))
    return Build(spec.label, spec.kernel, target, warps, registers, spills, shared, loads, racing, products, orders)


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and the bytes of its stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources:\n{text}")
    return int(found[1]), int(found[2])


def _amd_resources(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    if registers is None or scratch is None:
        raise RuntimeError("the assembly carries no resource metadata")
    return int(registers[1]), int(scratch[1])


def _load_widths(ptx: str) -> dict[str, int]:
    widths: dict[str, int] = {}
    for vector, bits in re.findall(r"ld\.global(?:\.\w+)*?(?:\.(v[248]))?\.[bfsu](\d+)", ptx):
        width = str(int(vector[1:] or 1) * int(bits) if vector else int(bits))
        widths[width] = widths.get(width, 0) + 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)[,;]", ptx):
        width = str(8 * int(size, 0))  # straight to shared memory
        widths[width] = widths.get(width, 0) + 1
    return widths


@contextmanager
def as_if_on(processors: int, cooperative: bool = True) -> Iterator[None]:
    """Launchers plan as for a device of so many multiprocessors, which is not here."""
    from fcn_kernels.device import gpu

    original = gpu.INTERPRETER
    gpu.INTERPRETER = gpu.Device(processors, cooperative)
    try:
        yield
    finally:
        gpu.INTERPRETER = original


def selection_specs(target: str) -> Iterator[Spec]:
    """The selection's launches on a device, over the sizes, dtypes and options that change what is built."""
    import torch

    from fcn_kernels.selection.kernels import launch
    from fcn_kernels.selection.problem import Problem, Saved

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def specs(
        name: str, sets: int, rows: int | None, dim: int, dtype: torch.dtype, k: int = 3, **changes: Any
    ) -> list[Spec]:
        packed = rows is None
        features = torch.empty((sets * 2, dim) if rows is None else (sets, rows, dim), dtype=dtype)
        total = features.shape[:-1].numel()
        problem = Problem(
            features=features,
            quality=torch.empty(total),
            gamma=torch.tensor(0.5),
            seed=torch.tensor(2**40 + 1),
            cu_seqlens=torch.empty(sets + 1, dtype=torch.int32) if packed else None,
            k=k,
        )._replace(**changes)
        saved = Saved(
            indices=torch.empty(sets, k, dtype=torch.int64),
            counts=torch.empty(sets, dtype=torch.int64),
            softmax=torch.empty(sets, k),
            gaps=torch.empty(k - 1, total),
            norms=torch.empty(total),
        )

        def both() -> None:
            launch.forward(problem, True)
            launch.backward(problem, torch.empty(sets, k, dim, dtype=dtype), saved)

        kind = str(dtype).removeprefix("torch.")
        label = f"{kind} {name} ({sets}, {'packed' if packed else rows}, {dim}) K={k}"
        if launch.is_lazy(problem, keep="many picks" not in name):
            made = record(
                label, launch, ("select_forward", "select_lazily"), lambda: launch.forward(problem, False), target
            )
            return [made[0], made[-1]]  # of the launches before the last, which are all alike, one
        return record(label, launch, ("select_forward", "select_backward"), both, target)

    with as_if_on(PROCESSORS[target], cooperative=target.startswith("sm")):
        for dtype in (bf16, fp32):
            for dim in (128, 512, 1024, 2048, 4096):
                yield from specs("tiny sets", 256, 20, dim, dtype)
                yield from specs("sets", 256, 300, dim, dtype)
                yield from specs("one set", 1, 4000, dim, dtype)
                yield from specs("ragged", 1000, None, dim, dtype)
        yield from specs("tiny sets", 256, 20, 512, fp16)
        for rows, dim, dtype in ((32, 512, bf16), (16, 512, fp32), (64, 128, fp32), (8, 1024, bf16), (8, 2048, bf16)):
            yield from specs("sets held", 256, rows, dim, dtype)  # as many rows as stay in registers
        yield from specs("tiny sets", 256, 20, 512, bf16, k=1)
        yield from specs("tiny sets", 256, 20, 512, bf16, k=64)
        yield from specs("ragged", 1000, None, 768, bf16)
        yield from specs("one set", 1, 100000, 512, bf16)
        for dtype in (bf16, fp32):
            yield from specs("odd rows", 1, 100000, 100, dtype)
            yield from specs("odd, ragged", 1000, None, 100, dtype)
        given = torch.empty(256, dtype=torch.int64)
        yield from specs("norms, given start", 256, 20, 512, bf16, quality=None, start=given)
        yield from specs("norms, given start", 256, 300, 512, bf16, quality=None, start=given)
        yield from specs("given start", 1, 100000, 512, bf16, start=given[:1])
        yield from specs("norms", 1000, None, 512, bf16, quality=None)
        yield from specs("norms", 1, 8000, 512, bf16, quality=None)
        yield from specs(
            "unit rows, distinct, argmax", 1000, None, 512, bf16, normalized=True, distinct=True, seed=None
        )
        for dtype, dim in ((bf16, 1536), (bf16, 512), (fp32, 512), (fp32, 4096), (bf16, 100)):
            yield from specs("many picks", 1, 400_000, dim, dtype, k=64, seed=None)
        yield from specs("many picks, sampled, distinct", 1, 400_000, 512, bf16, k=64, distinct=True)
        yield from specs("many picks, squared", 1, 400_000, 512, bf16, k=64, metric="sqeuclidean", seed=None)
        yield from specs("many picks, unit rows", 1, 400_000, 512, bf16, k=64, normalized=True, seed=None)
        squared = {"metric": "sqeuclidean", "seed": None}
        for dtype, dim in ((fp32, 3), (fp32, 4), (bf16, 8), (fp32, 64), (bf16, 512), (fp32, 1536)):
            yield from specs("squared sets", 256, 1024, dim, dtype, k=64, **squared)
            yield from specs("squared set", 1, 100000, dim, dtype, k=64, **squared)
            yield from specs("squared, ragged", 1000, None, dim, dtype, **squared)
        for metric in ("cosine", "sqeuclidean"):
            for sets, rows, dim in ((256, 300, 512), (1, 100000, 512), (1000, None, 512), (256, 1024, 3)):
                total = sets * (rows or 2)
                going_on = {"min_distances": torch.empty(total), "limits": torch.empty(sets, dtype=torch.int64)}
                yield from specs(
                    f"{metric} going on", sets, rows, dim, fp32, return_state=True, metric=metric, **going_on
                )
    with as_if_on(PROCESSORS[target], cooperative=False):
        yield from specs("one set, launches", 1, 8000, 512, bf16)


def attention_specs(target: str) -> Iterator[Spec]:
    """Set attention for the head's 24 queries, in training and inference, of large sets and of small ones, and for the
    most queries that it is planned for."""
    import torch

    from fcn_kernels.attention.inputs import Arriving, Inputs
    from fcn_kernels.attention.kernels import launch

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, queries, dropout in ((1000, 24, 0.1), (1000, 24, 0.0), (1000, 64, 0.1), (20, 24, 0.1)):
            empty = torch.empty
            inputs = Inputs(
                queries=empty(4, queries, 512),
                features=empty(4 * rows, 512, dtype=dtype),
                quality=empty(4 * rows),
                encoding_weight=empty(512),
                offsets=empty(5, dtype=torch.int64),
                lengths=empty(4, dtype=torch.int64),
                seed=torch.tensor(2**40 + 1) if dropout else None,
                dropout=dropout,
                encoding_eps=1e-5,
            )
            of_set = empty(4, queries)
            arriving = Arriving(of_set, inputs.queries, of_set, of_set)

            def both(inputs: Inputs = inputs, arriving: Arriving = arriving) -> None:
                launch.forward(inputs)
                launch.backward(inputs, arriving)

            kind = str(dtype).removeprefix("torch.")
            label = f"{kind} attention (4, {rows}, 512) H={queries} dropout {dropout}"
            yield from record(label, launch, ATTENTION_KERNELS, both, target)


def clustering_specs(target: str) -> Iterator[Spec]:
    """cluster_sums with the values as keys, with keys and scales, and with more centers than a block of them."""
    import torch

    from fcn_kernels.clustering.kernels import launch_sums
    from fcn_kernels.clustering.problem import Summed, Sums

    empty = torch.empty
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for every, keyed in ((4, True), (4, False), (16, False), (64, False), (70, True)):
            dim = 128 if keyed else 512
            problem = Sums(
                values=empty(4000, 512, dtype=dtype),
                keys=empty(4000, dim) if keyed else None,
                scale=empty(4000) if keyed else None,
                weight=empty(every, dim),
                bias=empty(every),
                offsets=empty(5, dtype=torch.int64),
                lengths=empty(4, dtype=torch.int64),
                valid=None,
                ghosts=0,
            )
            grad = Summed(empty(4, every, 512), empty(4, every, dim if keyed else 0), empty(4, every))

            def both(problem: Sums = problem, grad: Summed = grad) -> None:
                launch_sums.sums_forward(problem)
                launch_sums.sums_backward(problem, grad, True)

            kind = str(dtype).removeprefix("torch.")
            label = f"{kind} sums (4, 1000, 512) M={every}{' keys' if keyed else ''}"
            yield from record(label, launch_sums, SUMS_KERNELS, both, target)


def chunks_specs(target: str) -> Iterator[Spec]:
    """Cluster and Aggregate's own sizes: a block, with and without norms and dropped blocks, forward and backward; and
    one head of all channels."""
    import torch

    from fcn_kernels.clustering.kernels import launch_chunks, launch_sums
    from fcn_kernels.clustering.problem import Chunks, Clustered, Summed

    empty, dim, centers = torch.empty, 128, 4
    wide = (torch.float32, False, 1)
    for dtype, given, heads in ((torch.bfloat16, False, 8), (torch.float32, False, 8), (torch.float32, True, 8), wide):
        problem = Chunks(
            features=empty(4000, 512, dtype=dtype),
            quality=empty(4000) if given else None,
            styles=empty(4000, 64),
            table=empty(61, 64),
            edges=empty(60),
            tokens=empty(centers, dim),
            qkv_weight=empty(1, 3 * dim, dim),
            qkv_bias=empty(1, 3 * dim),
            proj_weight=empty(1, dim, dim),
            proj_bias=empty(1, dim),
            fc1_weight=empty(1, 4 * dim, dim),
            fc1_bias=empty(1, 4 * dim),
            fc2_weight=empty(1, dim, 4 * dim),
            fc2_bias=empty(1, dim),
            weight=empty(centers, dim),
            bias=empty(centers),
            residual=empty(1, 2, 8) if given else None,
            offsets=torch.arange(9) * 500,
            lengths=empty(8, dtype=torch.int64),
            valid=None,
            heads=heads,
            longest=4000,
        )
        grad = Summed(empty(8, centers, 512), empty(8, centers, dim), empty(8, centers))

        def both(problem: Chunks = problem, grad: Summed = grad) -> None:
            launch_chunks.chunks_forward(problem, False)
            launch_chunks.chunks_forward(problem, True)
            launch_chunks.chunks_backward(problem, grad, Clustered.empty(problem, True), True)

        kind = str(dtype).removeprefix("torch.")
        label = f"{kind} chunks (8, 500, 512) M=4{' norms given, dropped' if given else ''}{' one head' * (heads == 1)}"
        made: list[Spec] = []

        def blocks(label: str = label, made: list[Spec] = made, both: Callable[[], None] = both) -> None:
            made += record(label, launch_chunks, CHUNK_KERNELS, both, target)

        shares = record(label, launch_sums, SUMS_KERNELS, blocks, target)
        yield from {str(spec): spec for spec in (*made, *shares)}.values()  # a layer's launch comes several times


def neighbors_specs(target: str) -> Iterator[Spec]:
    """Forward and backward by the k nearest, and the moments of all, with and without identities."""
    import torch

    from fcn_kernels.neighbors.kernels import launch
    from fcn_kernels.neighbors.problem import Arriving, Problem, Statistics

    with as_if_on(PROCESSORS[target], cooperative=target.startswith("sm")):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for ids in (True, False):
                for m, k in ((1000, 50), (1000, 0), (4000, 300)):
                    x, bank = torch.ones(70, 512, dtype=dtype), torch.ones(m, 512, dtype=dtype)
                    numbers = (torch.zeros(70).long(), torch.zeros(m).long()) if ids else (None, None)
                    problem = Problem(x, bank, *numbers, k=k)
                    kind = str(dtype).removeprefix("torch.")
                    label = f"{kind} neighbors (70, {m}, 512) K={k}{' ids' if ids else ''}"

                    def both(problem: Problem = problem) -> None:
                        launch.forward(problem)
                        if problem.k:
                            arriving = Arriving(torch.ones(70), torch.ones(70))
                            found = Statistics.empty(problem)._replace(indices=torch.zeros(70, problem.k).long())
                            launch.backward(problem, arriving, found, (True, True))

                    specs = record(label, launch, NEIGHBORS_KERNELS, both, target)
                    if k == 300:  # only what holds all that a filter stored is another kernel
                        specs = [spec for spec in specs if spec.kernel == "select_best"]
                    yield from {str(spec): spec for spec in specs}.values()


def launches_of(target: str) -> list[Spec]:
    """All launches on a target; of those that differ in nothing that is built, one."""
    specs = (
        *selection_specs(target),
        *attention_specs(target),
        *clustering_specs(target),
        *chunks_specs(target),
        *neighbors_specs(target),
    )
    return list({str(spec): spec for spec in specs}.values())


def pairwise(jobs: list[tuple[Spec, str]]) -> list[tuple[Spec, str]]:
    """Fewer of the jobs: each launch for one target in turn, and each label and each kernel for every target."""
    targets = list(dict.fromkeys(target for _, target in jobs))
    chosen = [
        job
        for turn, target in enumerate(targets)
        for job in [job for job in jobs if job[1] == target][turn :: len(targets)]
    ]
    met = {(name, target) for spec, target in chosen for name in (spec.label, spec.kernel)}
    for spec, target in jobs:
        pairs = {(spec.label, target), (spec.kernel, target)}
        if not pairs <= met:
            chosen.append((spec, target))
            met |= pairs
    return chosen


def build_all(jobs: list[tuple[Spec, str]], workers: int = 2) -> list[Build]:
    """Launches for targets, in processes of their own."""
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(build, *zip(*jobs, strict=True), chunksize=4))


def main() -> int:
    """Print the table of builds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks.builds", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="launches whose label has one of these")
    parser.add_argument(
        "--pairwise",
        action="store_true",
        help="each launch for one target in turn, and each label and each kernel for all, not each launch for all",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    jobs = [
        (spec, target)
        for target in args.targets
        for spec in launches_of(target)
        if any(text in spec.label for text in args.only)
    ]
    builds = build_all(pairwise(jobs) if args.pairwise else jobs)
    if args.json:
        json.dump([b._asdict() for b in builds], sys.stdout)
        return 0
    import torch
    import triton

    print(f"Triton {triton.__version__}, PyTorch {torch.__version__.partition('+')[0]}; multiprocessors:", PROCESSORS)
    print()
    print("Made by `python -m benchmarks.checks.builds", " ".join(sys.argv[1:]).rstrip() + "`.")
    print()
    heads = "launch | kernel | target | warps | registers | spilled bytes | shared bytes | loads by width | races"
    print(f"| {heads} | tensor cores |")
    print("|---" * 10 + "|")
    for b in builds:
        loads = ", ".join(f"{n} x {w}" for w, n in sorted(b.row_loads.items(), key=lambda item: -int(item[0])))
        first = " | ".join(map(str, b[: Build._fields.index("row_loads")]))
        print(f"| {first} | {loads} | {', '.join(b.races)} | {b.tensor_cores} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
