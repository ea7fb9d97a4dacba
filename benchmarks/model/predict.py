"""What selection's launches would take: built, walked with a call's sizes, and issued on one multiprocessor."""

import functools
import heapq
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.checks.builds import Spec, as_if_on, compiled, nvidia_resources, record
from benchmarks.model.calls import BACKWARD, EVAL, SAMPLE, Call
from benchmarks.model.machine_code import Code, Instruction, disassemble
from benchmarks.model.machines import CAP, Machine
from benchmarks.model.multiprocessor import Access, occupancy, operations, simulate
from benchmarks.model.source import function
from benchmarks.model.walk import Executed, Way, executed, walk
from benchmarks.workloads import template_lengths
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.kernels.plans import Plan
from fcn_kernels.selection.problem import Problem, Saved

WORKS = (EVAL, SAMPLE, BACKWARD)
MOST_STEPS = 16  # that are walked; of more, each is as long as the last
PASSED_BY = 800.0  # cycles of a program whose set is another's
WAVES = 3  # of programs that are simulated, so that one's loads hide behind another's work
FIT = 8  # tiles from which on a part's time is taken to grow evenly


class Prediction(NamedTuple):
    """Of one call's work on a machine; nothing of it is measured, but the first three are counted."""

    registers: int
    programs: int  # that a multiprocessor holds
    instructions: float  # of a warp, a row
    microseconds: float
    least: float  # microseconds that the rows' bytes alone would take at the memory's bandwidth

    @property
    def share(self) -> float:
        """Of the time that bytes alone would take."""
        return self.least / self.microseconds


class Kernel(NamedTuple):
    """A built launch."""

    code: Code
    registers: int
    shared: int
    warps: int
    plan: Plan
    forward: bool


class Cost(NamedTuple):
    """Of one program among those that a multiprocessor runs at once: cycles, and warps' instructions."""

    cycles: float
    instructions: float

    def plus(self, other: "Cost", times: float) -> "Cost":
        """With so many of another."""
        return Cost(self.cycles + times * other.cycles, self.instructions + times * other.instructions)


def cost_of(
    code: Code,
    warps: int,
    trace: list[Executed],
    access: Callable[[Instruction, int], Access],
    machine: Machine,
    at_once: int = 1,
    waves: int = 1,
) -> Cost:
    """Of a program on this way, where ``waves`` times ``at_once`` follow one another."""
    cycles = simulate(operations(code, trace, access, machine), warps, at_once, waves * at_once, machine) / waves
    return Cost(cycles, sum(executed(code, trace, warps).values()))


def predict(call: Call, work: str, machine: Machine) -> Prediction:
    """Build, walk, simulate."""
    kernels = kernels_of(call, work, machine)
    one = kernels[-1]
    at_once = occupancy(one.registers, one.shared, one.warps, machine)
    passes = call.k if work == BACKWARD else call.k - 1
    from_dram = passes if not _fits(call, one.plan, machine) else min(1, passes)
    written = call.bytes if work == BACKWARD else 0
    least = (from_dram * call.bytes + written) / machine.dram_bytes_per_s * 1e6
    if call.rows is None:
        time, instructions = _packed(call, kernels, machine)
    else:
        time, instructions = _even(call, one, at_once, machine)
    if work == BACKWARD:
        time += machine.launch  # gamma's gradient is summed by a kernel of its own
    return Prediction(one.registers, at_once, instructions / call.all_rows, max(time, least / CAP), least)


def kernels_of(call: Call, work: str, machine: Machine) -> list[Kernel]:
    """What the launcher would launch, built."""
    original = launch.LAZY_PICKS
    launch.LAZY_PICKS = call.k + 1  # of many picks, too, the kernel that reads all rows: `lazy.py` has the other
    try:
        with as_if_on(machine.processors):
            specs, plans = _launches(call, work, machine.target)
    finally:
        launch.LAZY_PICKS = original
    return [
        Kernel(*built(spec, machine), spec.options["num_warps"], plan, work != BACKWARD)
        for spec, plan in zip(specs, plans, strict=True)
    ]


_built: dict[tuple[str, str], tuple[Code, int, int]] = {}


def built(spec: Spec, machine: Machine) -> tuple[Code, int, int]:
    """A launch's code, its registers and its bytes of shared memory."""
    key = str(spec._replace(label="")), machine.target
    if key not in _built:
        made = compiled(spec, machine.target)
        registers, _ = nvidia_resources(made.asm["cubin"])
        _built[key] = disassemble(made.asm["cubin"]), registers, made.metadata.shared
    return _built[key]


def problem_of(call: Call, work: str) -> Problem:
    """A call's sizes; its tensors have no memory."""
    empty = functools.partial(torch.empty, device="meta")
    packed = call.rows is None
    features = empty(*((call.all_rows,) if packed else (call.sets, call.rows)), call.dim, dtype=torch.bfloat16)
    return Problem(
        features=features,
        quality=empty(call.all_rows),
        gamma=empty(()),
        seed=None if work == EVAL else torch.tensor(2**40 + 1),
        cu_seqlens=empty(call.sets + 1, dtype=torch.int32) if packed else None,
        k=call.k,
    )


def _launches(call: Call, work: str, target: str) -> tuple[list[Spec], tuple[Plan, ...]]:
    empty, p = functools.partial(torch.empty, device="meta"), problem_of(call, work)
    forward_plans, backward_plans = launch.plans(p)
    if work != BACKWARD:
        go: Callable[[], object] = functools.partial(launch.forward, p, work == SAMPLE)
        return record(call.name, launch, ("select_forward",), go, target), forward_plans
    saved = Saved(
        indices=empty(call.sets, call.k, dtype=torch.int64),
        counts=empty(call.sets, dtype=torch.int64),
        softmax=empty(call.sets, call.k),
        gaps=empty(call.k - 1, call.all_rows),
        norms=empty(call.all_rows),
    )
    go = functools.partial(launch.backward, p, empty(call.sets, call.k, call.dim, dtype=torch.bfloat16), saved)
    return record(call.name, launch, ("select_backward",), go, target), backward_plans


def _fits(call: Call, plan: Plan, machine: Machine) -> bool:
    """Whether rows that were read once are found on the chip by the next pass."""
    return call.bytes <= machine.l2_bytes or plan.parts == 1  # a set that one program has is in L2, all sets are not


def way_of(kernel: Kernel, rows: int, k: int, dim: int) -> Way:
    """Through a program that has so many rows."""
    plan = kernel.plan
    tiles, scalars = math.ceil(rows / plan.block_n), math.ceil(rows / plan.block_r)
    always = {
        "(rows.count > above) & (rows.count <= longest)": True,
        "low < end": (True, False),  # a program has one set of those that it looks through
        "(row >= begin) & (row < begin + BUILD.BLOCK_N)": False,  # a pick is in one tile of all
        "extreme > 0": False,
        "is_extreme(norm)": False,
        "part.part == 0": plan.parts == 1,
        "BUILD.EARLY and BUILD.KEEP and (step == 1) & (part.part == 0)": False,
        "BUILD.EARLY and step == 0": (True, False),
        "step == 0": (True, False),
        "BUILD.STATE or step + 1 < K": (True,) * (k - 1) + (False,),
        "step + 1 < kept.picks": True,
        "later": (False, True),
        "settle": (False, True),
    }
    loops = {
        "tiles": tiles,
        "writes": tiles,
        "scalars": scalars,
        "first": scalars,
        "padding": 0,
        "steps": k if kernel.forward else k - 1,
        "picks": k - 1,
        "sums": math.ceil(2 * dim / (plan.parts * launch.SUM_COLUMNS)),
        "seen ^ phase >= 0": 2,
        "set_id < end": 1,
        "(row != NO_ROW) & (is_usable_norm(norm) == 0)": 0,
    }
    return Way(loops, always)


def access_of(call: Call, kernel: Kernel, rows: int, machine: Machine) -> Callable[[Instruction, int], Access]:
    """Where loads and stores go: rows to memory or the caches, a number a row to L2, a pick to L2."""
    plan = kernel.plan
    cold = "dram" if kernel.forward or call.bytes > machine.l2_bytes else "l2"
    warm = "l2" if _fits(call, plan, machine) else "dram"
    filled = min(1.0, rows / plan.block_n) * call.dim / (plan.chunk * plan.chunks)

    def access(i: Instruction, step: int) -> Access:
        size = 32.0 * i.bytes_of_thread
        where = function(i.file, i.line)
        if where in ("load_chunk", "hold_rows"):
            return (cold if step == 0 else warm), size * filled
        if where == "norm_of":
            return "dram", 2.0 * call.dim / kernel.warps  # of one row
        if i.name == "STG" and where == "write_rows" and i.bytes_of_thread > 4:
            return "dram", size * filled
        if where in ("load_row", "load_direction", "load_cols"):
            return ("l1" if where == "load_direction" else "l2"), size
        return "l2", 64.0

    return access


def _program(call: Call, kernel: Kernel, rows: int, at_once: int, waves: int, machine: Machine) -> Cost:
    """Of a program of so many rows, where ``waves`` times ``at_once`` follow one another: of a few tiles as it is, of
    many by what a tile more and what a scalar loop's turn more costs; likewise of many steps."""
    plan = kernel.plan

    def at(rows: int, k: int) -> Cost:
        trace = walk(kernel.code, way_of(kernel, rows, k, call.dim))
        _check_reads(kernel, trace, rows, k)
        access = access_of(call, kernel, rows, machine)
        return cost_of(kernel.code, kernel.warps, trace, access, machine, at_once, waves)

    def of(k: int) -> Cost:
        if rows <= 2 * FIT * plan.block_n:
            return at(rows, k)
        few, more = FIT * plan.block_n, 2 * FIT * plan.block_n
        block = max(plan.block_r, more)
        base = at(few, k)
        tile = _per(at(more, k), base, FIT)
        tiles = rows / plan.block_n - FIT
        scalars = max(0.0, rows / plan.block_r - 1)
        if scalars == 0:
            return base.plus(tile, tiles)
        turn = _per(at(block + few, k), base, 1).plus(tile, -block / plan.block_n)
        return base.plus(tile, tiles).plus(turn, scalars)

    if call.k <= MOST_STEPS:
        return of(call.k)
    three = of(3)
    return three.plus(_per(of(4), three, 1), call.k - 3)


def _check_reads(kernel: Kernel, trace: list[Executed], rows: int, k: int) -> None:
    """That a trace has all passes over the rows: a step that the walk left out would pass for speed."""
    plan, passes = kernel.plan, (1 if kernel.plan.held else k - 1) if kernel.forward else k
    wanted = 2 * passes * math.ceil(rows / plan.block_n) * plan.block_n * plan.chunk * plan.chunks
    if (found := _bytes_of_rows(kernel, trace)) != wanted:
        raise RuntimeError(f"expected {passes} passes over {rows} rows, {wanted} bytes, found {found:.0f} in the trace")


def _per(more: Cost, less: Cost, count: float) -> Cost:
    return Cost((more.cycles - less.cycles) / count, (more.instructions - less.instructions) / count)


def _even(call: Call, kernel: Kernel, at_once: int, machine: Machine) -> tuple[float, float]:
    """Microseconds and instructions of sets of one length: programs that are all alike."""
    plan = kernel.plan
    programs = call.sets * plan.parts
    each = math.ceil(programs / machine.processors)
    rows = call.rows or 0
    if plan.parts > 1:
        rows = math.ceil(math.ceil(rows / plan.parts) / plan.block_n) * plan.block_n
    waves = math.ceil(each / at_once)
    cost = _program(call, kernel, rows, min(each, at_once), min(waves, WAVES), machine)
    cycles = cost.cycles * waves
    time = machine.launch + cycles / machine.ghz / 1e3
    if plan.parts > 1:
        barriers = call.k if kernel.forward else 2 * call.k - 1
        time += machine.cooperative + barriers * machine.arrival
    return time, cost.instructions * programs


def _packed(call: Call, kernels: list[Kernel], machine: Machine) -> tuple[float, float]:
    """The same of packed sets: two launches side by side, the one for long sets begun first."""
    lengths = template_lengths(call.sets, call.all_rows)
    queue: list[tuple[float, int]] = []  # programs' cycles and how much of a multiprocessor they take
    instructions = 0.0
    for kernel in kernels:
        at_once = occupancy(kernel.registers, kernel.shared, kernel.warps, machine)
        costs = dict(_costs_by_tiles(call, kernel, at_once, machine, lengths))
        cost_of = functools.partial(_cost_of, costs, kernel.plan)
        instructions += sum(cost_of(rows).instructions for rows in lengths)
        queue += [(cycles, machine.registers // at_once) for cycles in _programs(kernel.plan, lengths, cost_of)]
    return machine.launch * len(kernels) + side_by_side(queue, machine) / machine.ghz / 1e3, instructions


def _cost_of(costs: dict[int, Cost], plan: Plan, rows: int) -> Cost:
    """Of a set; nothing where it is another launch's."""
    taken = plan.shortest <= rows <= plan.longest
    return costs[math.ceil(rows / plan.block_n)] if taken else Cost(0.0, 0.0)


def _programs(plan: Plan, lengths: tuple[int, ...], cost_of: Callable[[int], Cost]) -> Iterator[float]:
    """The cycles of a launch's programs, in their order."""
    if plan.look:
        for begin in range(0, len(lengths), plan.look):
            yield PASSED_BY + sum(cost_of(rows).cycles for rows in lengths[begin : begin + plan.look])
        return
    yield from (cost_of(rows).cycles * (rows > plan.last) or PASSED_BY for rows in lengths)
    if plan.last:
        yield from (cost_of(rows).cycles * (rows <= plan.last) or PASSED_BY for rows in lengths)


def _costs_by_tiles(
    call: Call, kernel: Kernel, at_once: int, machine: Machine, lengths: tuple[int, ...]
) -> Iterator[tuple[int, Cost]]:
    """What programs cost, by their number of tiles: some are simulated, those between lie on a line."""
    plan = kernel.plan
    taken = sorted({math.ceil(n / plan.block_n) for n in lengths if plan.shortest <= n <= plan.longest})
    known: dict[int, Cost] = {}

    def cost(tiles: int) -> Cost:
        if tiles not in known:
            known[tiles] = _program(call, kernel, tiles * plan.block_n, at_once, WAVES, machine)
        return known[tiles]

    for tiles in taken:
        low = 1 << tiles.bit_length() - 1
        if tiles == low:
            yield tiles, cost(tiles)
            continue
        yield tiles, cost(low).plus(_per(cost(2 * low), cost(low), low), tiles - low)


def schedule(cycles: list[float], slots: int) -> float:
    """When the last program ends, if each begins in its turn where another has ended."""
    ends = [0.0] * slots
    for length in cycles:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


def side_by_side(queue: list[tuple[float, int]], machine: Machine) -> float:
    """When the last program ends, if each begins in its turn as soon as a multiprocessor has so many registers left."""
    left = [machine.registers] * machine.processors
    ends: list[tuple[float, int, int]] = []
    now = 0.0
    for cycles, registers in queue:
        place = left.index(max(left))
        while left[place] < registers:
            now, place, freed = heapq.heappop(ends)
            left[place] += freed
        left[place] -= registers
        heapq.heappush(ends, (now + cycles, place, registers))
    return max(ends)[0]


def rows_read(call: Call, kernel: Kernel, rows: int) -> float:
    """How often a program of so many rows loads them, counted in its trace."""
    trace = walk(kernel.code, way_of(kernel, rows, call.k, call.dim))
    return _bytes_of_rows(kernel, trace) / (2 * rows * call.dim)


def _bytes_of_rows(kernel: Kernel, trace: list[Executed]) -> float:
    """That tiles are made of."""
    where = "hold_rows" if kernel.plan.held else "load_chunk"
    every = (kernel.code.instructions[e.number] for e in trace)
    of_thread = sum(i.bytes_of_thread for i in every if i.name == "LDG" and function(i.file, i.line) == where)
    return of_thread * 32 * kernel.warps
