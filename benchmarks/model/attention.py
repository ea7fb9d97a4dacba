"""What the head's set attention would take: its launches, and PyTorch's operations around them."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.checks.builds import ATTENTION_KERNELS, Spec, as_if_on, record
from benchmarks.model.calls import BACKWARD, CALLS, EVAL, TRAINING, Call
from benchmarks.model.machine_code import Code, Instruction
from benchmarks.model.machines import CAP, Machine
from benchmarks.model.multiprocessor import Access, occupancy, operations, simulate
from benchmarks.model.predict import Cost, Prediction, built, cost_of, schedule
from benchmarks.model.source import function
from benchmarks.model.walk import Executed, Way, branches, executed, walk
from benchmarks.workloads import counted_bytes, template_lengths
from fcn_kernels.attention.inputs import Arriving, Inputs
from fcn_kernels.attention.kernels import launch

QUERIES = 24  # 8 heads of 3 picks
DROPOUT = 0.1
WORKS = (EVAL, TRAINING, BACKWARD)
ATTENTION_CALLS = tuple(call for call in CALLS if call.k == 3 and call.all_rows < 1_000_000)
FIT = 4  # tiles from which on a program's time is taken to grow evenly
WITHOUT_KERNEL = ("empty", "new_empty", "empty_like", "_local_scalar_dense")  # the last: a seed on the host is read


class Detailed(NamedTuple):
    """A prediction, and what else is counted."""

    prediction: Prediction
    barriers: float  # a tile
    launches: int  # the kernel, and PyTorch's operations
    costs: tuple[tuple[str, float], ...]  # the device functions with the most instructions, and their shares


class Kernel(NamedTuple):
    """A built launch."""

    code: Code
    registers: int
    shared: int
    warps: int
    constants: dict[str, Any]
    stages: int
    parts: int
    forward: bool

    def bytes_of(self, i: Instruction, columns: int) -> float:
        """Of a warp's load or store. Copies ahead of a loop of so many turns are in its last turns for nothing."""
        ahead = self.stages - 1 if i.name == "LDGSTS" else 0
        return 32.0 * i.bytes_of_thread * columns / (columns + ahead)


class CountedLaunches(TorchDispatchMode):
    """How many kernels PyTorch's operations launch, views and memory aside."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        out = func(*args, **(kwargs or {}))
        self.launches += not func.is_view and func.__name__.partition(".")[0] not in WITHOUT_KERNEL
        return out


def predict(call: Call, work: str, machine: Machine) -> Detailed:
    """Build, walk, simulate."""
    (kernel, *merging), around, moved = kernels_of(call, work, machine)
    at_once = occupancy(kernel.registers, kernel.shared, kernel.warps, machine)
    if call.rows is None:
        lengths = template_lengths(call.sets, call.all_rows)
    else:
        block = kernel.constants["BLOCK_N"]
        of_part = math.ceil(math.ceil(call.rows / kernel.parts) / block) * block
        begins = range(0, kernel.parts * of_part, of_part)
        lengths = tuple(max(0, min(of_part, call.rows - begin)) for begin in begins) * call.sets
    at_once = min(at_once, math.ceil(len(lengths) / machine.processors))
    costs = _costs(call, kernel, at_once, machine, lengths)
    each = [costs[_tiles(kernel, rows)] for rows in lengths]
    cycles = schedule([cost.cycles for cost in each], at_once * machine.processors)
    passes = 2 if work == BACKWARD else 1  # one to read, one to write
    least = passes * call.bytes / machine.dram_bytes_per_s * 1e6
    time = machine.launch + max(cycles / machine.ghz / 1e3, least / CAP)
    time += around * machine.launch + moved / machine.dram_bytes_per_s * 1e6
    time += sum(machine.launch + _merge(call, kernel, other, machine) for other in merging)
    one, two = (_trace(call, kernel, tiles) for tiles in (1, 2))
    of_tile = executed(kernel.code, two, kernel.warps)["BAR"] - executed(kernel.code, one, kernel.warps)["BAR"]
    prediction = Prediction(
        registers=kernel.registers,
        programs=occupancy(kernel.registers, kernel.shared, kernel.warps, machine),
        instructions=sum(cost.instructions for cost in each) / call.all_rows,
        microseconds=time,
        least=least,
    )
    return Detailed(prediction, of_tile / kernel.warps, 1 + len(merging) + around, _largest(kernel, two))


def kernels_of(call: Call, work: str, machine: Machine) -> tuple[list[Kernel], int, float]:
    """What the launcher would launch, built; the launches that PyTorch adds, and their bytes."""
    specs: list[Spec] = []
    with as_if_on(machine.processors):
        p, go = _launch(call, work)
        launch._turns(call.dim, p.features.device)  # made once
        parts = launch.plan_of(p, backward=work == BACKWARD).parts
        counted = CountedLaunches()

        def launched() -> None:
            specs.extend(record(call.name, launch, ATTENTION_KERNELS, go, machine.target))

        with counted:
            moved = counted_bytes(launched)
    kernels = []
    for spec in specs:
        sizes = spec.options["num_warps"], spec.constants, spec.options.get("num_stages", 1), parts
        kernels.append(Kernel(*built(spec, machine), *sizes, work != BACKWARD))
    return kernels, counted.launches, moved


def _launch(call: Call, work: str) -> tuple[Inputs, Callable[[], object]]:
    empty = functools.partial(torch.empty, device="meta")
    p = Inputs(
        queries=empty(call.sets, QUERIES, call.dim),
        features=empty(call.all_rows, call.dim, dtype=torch.bfloat16),
        quality=empty(call.all_rows),
        encoding_weight=empty(call.dim),
        offsets=empty(call.sets + 1, dtype=torch.int64),
        lengths=empty(call.sets, dtype=torch.int64),
        seed=None if work == EVAL else torch.tensor(2**40 + 1),
        dropout=0.0 if work == EVAL else DROPOUT,
        encoding_eps=1e-5,
    )
    of_set = empty(call.sets, QUERIES)
    if work == BACKWARD:
        return p, functools.partial(launch.backward, p, Arriving(of_set, p.queries, of_set, of_set))
    return p, functools.partial(launch.forward, p)


def way_of(call: Call, kernel: Kernel, tiles: int) -> Way:
    """Through a program of so many tiles."""
    columns = _columns(call, kernel)
    loops = {"steps": tiles, "scores": columns, "gathers": columns, "writes": columns, "pairs": math.ceil(columns / 2)}
    return Way(loops, {"started": (False, True)})


def _columns(call: Call, kernel: Kernel) -> int:
    """Blocks of them."""
    return math.ceil(call.dim / kernel.constants["BLOCK_C"])


def _trace(call: Call, kernel: Kernel, tiles: int) -> list[Executed]:
    return walk(kernel.code, way_of(call, kernel, tiles))


def _access(call: Call, kernel: Kernel, machine: Machine) -> Callable[[Instruction, int], Access]:
    """Where loads and stores go: rows come from memory for the scores, and from L2 for what these are for; the sets'
    queries, gradients and sums are in L2, vectors in L1."""
    cold = "dram" if kernel.forward or call.bytes > machine.l2_bytes else "l2"
    instructions = kernel.code.instructions
    ends = [at for at, stands in branches(kernel.code).items() if stands.text == "scores"]
    first_pass = {id(i) for i in instructions[: max(ends)]}
    filled = min(1.0, (call.rows or call.all_rows / call.sets) / kernel.constants["BLOCK_N"])

    columns = _columns(call, kernel)

    def access(i: Instruction, step: int) -> Access:
        size = kernel.bytes_of(i, columns)
        where = function(i.file, i.line)
        if where == "load_rows":
            return (cold if id(i) in first_pass else "l2"), size * filled
        if i.name == "STG" and where == "write_gradients":
            return "dram", size * filled
        if where in ("load_block", "accumulate"):
            return "l2", size
        return "l1", min(size, 128.0)

    return access


def _tiles(kernel: Kernel, rows: int) -> int:
    return max(1, math.ceil(rows / kernel.constants["BLOCK_N"]))


def _costs(call: Call, kernel: Kernel, at_once: int, machine: Machine, lengths: tuple[int, ...]) -> dict[int, Cost]:
    """Of programs, by their number of tiles, each beside others like it: few are simulated, more lie on a line."""
    waves = min(3, math.ceil(len(lengths) / machine.processors / at_once))
    access = _access(call, kernel, machine)

    def cost(tiles: int) -> Cost:
        trace = _trace(call, kernel, tiles)
        return cost_of(kernel.code, kernel.warps, trace, access, machine, at_once, waves)

    taken = {_tiles(kernel, rows) for rows in lengths}
    known = {tiles: cost(tiles) for tiles in taken if tiles <= FIT}
    if max(taken) > FIT:
        few, more = cost(FIT), cost(2 * FIT)
        tile = more.plus(few, -1)
        known |= {tiles: few.plus(tile, tiles / FIT - 1) for tiles in taken if tiles > FIT}
    return known


def rows_read(call: Call, kernel: Kernel) -> float:
    """How often a program of two tiles loads its rows, counted in its trace."""
    rows = 2 * kernel.constants["BLOCK_N"]
    every = (kernel.code.instructions[e.number] for e in _trace(call, kernel, 2))
    loads = (i for i in every if i.name in ("LDG", "LDGSTS") and function(i.file, i.line) == "load_rows")
    moved = sum(kernel.bytes_of(i, _columns(call, kernel)) for i in loads)
    return moved * kernel.warps / (2 * rows * call.dim)


def _merge(call: Call, kernel: Kernel, merging: Kernel, machine: Machine) -> float:
    """Microseconds of the kernel that puts parts together."""
    blocks = math.ceil(kernel.parts / merging.constants["BLOCK_P"])
    trace = walk(merging.code, Way({"tops": blocks, "parts": blocks}, {"block == 0": True}))
    programs = math.ceil(call.sets * QUERIES * call.dim / merging.constants["BLOCK_C"] / machine.processors)
    at_once = min(programs, occupancy(merging.registers, merging.shared, merging.warps, machine))
    work = operations(merging.code, trace, lambda i, step: ("l2", 32.0 * i.bytes_of_thread), machine)
    return simulate(work, merging.warps, at_once, programs, machine) / machine.ghz / 1e3


def _largest(kernel: Kernel, trace: list[Executed]) -> tuple[tuple[str, float], ...]:
    """The two device functions with the most instructions of their own, and their shares."""
    places = (kernel.code.instructions[e.number] for e in trace)
    found = Counter(function(i.file, i.line) for i in places)
    return tuple((name, count / len(trace)) for name, count in found.most_common(2))
