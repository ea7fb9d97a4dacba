"""What many picks from a large set would take: launches that read all rows, then `selection/kernels/lazy.py`.

How often that kernel's loops turn depends on the rows: `lazy_turns.py` simulates it for Gaussian ones. A turn takes as
long as the part with the most to do.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.checks.builds import as_if_on, record
from benchmarks.model.calls import Call
from benchmarks.model.lazy_turns import Turns, count_turns, gaussian
from benchmarks.model.machine_code import Instruction
from benchmarks.model.multiprocessor import CAP, Access, Machine, occupancy, operations, simulate
from benchmarks.model.predict import Cost, Kernel, Prediction, access_of, built, way_of
from benchmarks.model.source import function, statement
from benchmarks.model.walk import Executed, Way, executed, walk
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.problem import Problem

WANTED = "is_wanted(bound, exact, round, rescaled(bound.score, factor) >= floor, leader, budget)"
DECIDED = "(bound.row == NO_ROW) | (bound.score < best.score) | (at.round == SETTLE)"


class Kernels(NamedTuple):
    """The two kernels of a call."""

    eager: Kernel
    lazy: Kernel
    late: int  # picks of a tile


class Costs(NamedTuple):
    """What the lazy kernel's pieces cost a program."""

    lead: Cost  # a turn that makes a pick, with its first scan and no row to refresh
    settle: Cost  # a turn that makes none
    refresh: Cost  # a row's: its load, and the scan after it; without
    tile: Cost  # a tile of picks that it meets


class Detailed(NamedTuple):
    """A prediction, and what it is made of."""

    prediction: Prediction
    turns: Turns
    costs: Costs
    eager: float  # microseconds, as are the next: of the launches that read all rows
    waits: float  # of turns, with no row to refresh
    refreshes: float
    tiles: float


def predict(call: Call, machine: Machine) -> Detailed:
    """Build, simulate what the rows decide, walk, issue."""
    kernels = kernels_of(call, machine)
    plan = kernels.lazy.plan
    x = gaussian(call.all_rows, call.dim)
    turns = count_turns(x, call.k, plan.parts, plan.block_n, launch.EAGER_PICKS, kernels.late)
    costs = costs_of(call, kernels, machine)
    eager, instructions = _eager(call, kernels.eager, machine)

    slowest = np.argmax(turns.refreshes * costs.refresh.cycles + turns.tiles * costs.tile.cycles, axis=1)[:, None]
    of_slowest = [float(np.take_along_axis(counts, slowest, 1).sum()) for counts in (turns.refreshes, turns.tiles)]
    settles = int(turns.settles.sum())
    leads = len(turns.settles) - settles + 1  # the last pick is made in a turn of its own
    micro = machine.ghz * 1e3
    waits = (leads * costs.lead.cycles + settles * costs.settle.cycles) / micro + (leads + settles) * machine.arrival
    refreshes, tiles = of_slowest[0] * costs.refresh.cycles / micro, of_slowest[1] * costs.tile.cycles / micro

    every_turn = leads * costs.lead.instructions + settles * costs.settle.instructions
    instructions += plan.parts * every_turn + float(turns.refreshes.sum()) * costs.refresh.instructions
    instructions += float(turns.tiles.sum()) * costs.tile.instructions
    read = launch.EAGER_PICKS * call.bytes + float(turns.refreshes.sum()) * 2 * call.dim
    prediction = Prediction(
        registers=kernels.lazy.registers,
        programs=occupancy(kernels.lazy.registers, kernels.lazy.shared, kernels.lazy.warps, machine),
        instructions=instructions / call.all_rows,
        microseconds=eager + machine.launch + machine.cooperative + waits + refreshes + tiles,
        least=read / machine.dram_bytes_per_s * 1e6,
    )
    return Detailed(prediction, turns, costs, eager, waits, refreshes, tiles)


def kernels_of(call: Call, machine: Machine) -> Kernels:
    """What the launcher would launch at inference, built."""
    empty = functools.partial(torch.empty, device="meta")
    features = empty(call.sets, call.rows, call.dim, dtype=torch.bfloat16)
    p = Problem(features=features, quality=empty(call.all_rows), gamma=empty(()), seed=None, k=call.k)
    with as_if_on(machine.processors):
        (plan,) = launch._forward_plans(p, False)
        names = ("select_forward", "select_lazily")
        specs = record(call.name, launch, names, lambda: launch.forward(p, False))
    if call.sets != 1 or specs[-1].kernel != "select_lazily":
        raise ValueError(f"expected one set of which rows are left out, got {call}")
    eager, lazy = (Kernel(*built(spec, machine), spec.options["num_warps"], plan, True) for spec in specs[-2:])
    return Kernels(eager, lazy, int(specs[-1].constants["BUILD"].LATE.value))


def _eager(call: Call, kernel: Kernel, machine: Machine) -> tuple[float, float]:
    """Microseconds and instructions of the launches that read all rows, a pick each, after one that looks for the
    first pick, which is no more than a launch."""
    share = -(-call.all_rows // kernel.plan.parts)
    way = way_of(kernel, share, 2, call.dim)
    conditions = {"BUILD.SPLIT != LAUNCHES or turn == 0": False, "step == 0": False}
    trace = walk(kernel.code, way._replace(loops={**way.loops, "steps": 1}, conditions=way.conditions | conditions))
    cycles = simulate(
        operations(kernel.code, trace, access_of(call, kernel, share, machine)), kernel.warps, 1, 1, machine
    )
    of_pick = machine.launch + max(cycles / machine.ghz / 1e3, call.bytes / machine.dram_bytes_per_s * 1e6 / CAP)
    instructions = sum(executed(kernel.code, trace, kernel.warps).values()) * kernel.plan.parts
    return machine.launch + launch.EAGER_PICKS * of_pick, launch.EAGER_PICKS * float(instructions)


def trace_of(
    call: Call, kernel: Kernel, turns: int, refreshes: int, tiles: int, settle: bool = False
) -> list[Executed]:
    """Of a program that in each of its turns but the last refreshes so many rows, each with so many tiles of picks."""
    plan = kernel.plan
    share = -(-call.all_rows // plan.parts)
    loops = {
        "mine_to_do & (at.step < K)": turns,
        "scalars": -(-share // plan.block_r),
        WANTED: refreshes,
        "going": tiles,
        "seen ^ phase >= 0": 2,
        "written": 0,
    }
    conditions: dict[str, bool | tuple[bool, ...]] = {
        "(rows.count > above) & (rows.count <= longest)": True,
        "turn > 0": (False, True),
        DECIDED: not settle,
        "step < out.steps": (True,) * (turns - 1) + (False,),
        "part.part == 0": False,
        "there & (best.row >= part.low) & (best.row < part.high)": False,
        "is_extreme(norm)": False,
    }
    return walk(kernel.code, Way(loops, conditions))


def costs_of(call: Call, kernels: Kernels, machine: Machine) -> Costs:
    """By what a turn, a row and a tile more take in programs of few."""
    kernel = kernels.lazy

    def cost(turns: int, refreshes: int, tiles: int, settle: bool = False) -> Cost:
        trace = trace_of(call, kernel, turns, refreshes, tiles, settle)
        work = operations(kernel.code, trace, _access(call, kernels, first=tiles == 1))
        cycles = simulate(work, kernel.warps, 1, 1, machine)
        return Cost(cycles, sum(executed(kernel.code, trace, kernel.warps).values()))

    lead, settle = (cost(4, 0, 0, settle).plus(cost(3, 0, 0, settle), -1) for settle in (False, True))
    row_and_tile = _times(cost(3, 2, 1).plus(cost(3, 1, 1), -1), 1 / 2)
    tile = _times(cost(3, 1, 4).plus(cost(3, 1, 2), -1), 1 / 4)
    return Costs(lead, settle, row_and_tile.plus(tile, -1), tile)


def _times(cost: Cost, times: float) -> Cost:
    return Cost(0.0, 0.0).plus(cost, times)


def _access(call: Call, kernels: Kernels, first: bool) -> Callable[[Instruction, int], Access]:
    """Where loads and stores go: a row comes from memory in its ``first`` tile, once for all picks, and then from L1;
    the picks' directions and what parts exchange are in L2; what is known of a part's rows is in L1 from a turn's first
    scan on, as the barrier before it empties L1."""
    plan, (instructions, targets) = kernels.lazy.plan, kernels.lazy.code
    filled = call.dim / (plan.chunk * plan.chunks)
    heads = [
        head
        for n, head in targets.items()
        if head < n and statement(instructions[n].file, instructions[n].line).text == WANTED
    ]
    after_first_scan = {id(i) for i in instructions[min(heads) :]}

    def access(i: Instruction, step: int) -> Access:
        size = 32.0 * i.bytes_of_thread
        where = function(i.file, i.line)
        if where == "load_chunk":
            return ("dram", size * filled / kernels.late) if first else ("l1", size * filled)
        if where in ("load_directions", "load_row", "make_pick"):
            return "l2", size * filled
        known = where in ("scan_rows", "scores_of", "refresh_row") and i.name == "LDG" and id(i) in after_first_scan
        return ("l1" if known else "l2"), 128.0

    return access
