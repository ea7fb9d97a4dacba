"""What many picks from a large set would take: launches that read all rows, then `selection/kernels/lazy.py`.

How often that kernel's loops turn depends on the rows: `lazy_turns.py` simulates it for Gaussian ones. A turn takes as
long as the part with the most to do.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.checks.builds import Spec, as_if_on, record
from benchmarks.model.calls import EVAL, Call
from benchmarks.model.lazy_turns import Turns, count_turns, gaussian
from benchmarks.model.machine_code import Instruction
from benchmarks.model.machines import CAP, Machine
from benchmarks.model.multiprocessor import Access, occupancy
from benchmarks.model.predict import Cost, Kernel, Prediction, access_of, built, cost_of, problem_of, way_of
from benchmarks.model.source import function
from benchmarks.model.walk import Executed, Way, walk
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.kernels.plans import Plan

DECIDED = "(bound.row == NO_ROW) | (bound.score < best.score)"


class Costs(NamedTuple):
    """What the lazy kernel's pieces cost a program."""

    turn: Cost  # makes a pick, lists rows and finds none, scans
    again: Cost  # the same without a pick
    collect: Cost  # a list more
    tile: Cost  # of rows, beside its meetings
    meeting: Cost  # of a tile with a pick


class Detailed(NamedTuple):
    """A prediction, and what it is made of."""

    prediction: Prediction
    turns: Turns
    costs: Costs
    eager: float  # microseconds of the launches that read all rows,
    turns_alone: float  # of turns in which no row meets a pick,
    collects: float
    tiles: float
    meetings: float


def predict(call: Call, machine: Machine) -> Detailed:
    """Build, simulate what the rows decide, walk, issue."""
    plan, (first, spec) = launches_of(call, machine)
    kernel, late = kernel_of(spec, plan, machine), int(spec.constants["BUILD"].LATE.value)
    x = gaussian(call.all_rows, call.dim)
    turns = count_turns(x, call.k, plan.parts, plan.block_n, launch.EAGER_PICKS, late)
    at_once = occupancy(kernel.registers, kernel.shared, kernel.warps, machine)
    costs, single = (costs_of(call, kernel, machine, programs) for programs in (at_once, 1))
    eager, instructions = _eager(call, kernel_of(first, plan, machine), machine)

    counts = np.stack((turns.collects - 1, turns.tiles, turns.meetings))
    micro = machine.ghz * 1e3
    pieces = slowest(counts, single, costs, at_once) / micro
    again = int(turns.again.sum())
    picks = len(turns.again) - again + 1  # the last is made in a turn of its own
    alone = (picks * costs.turn.cycles + again * costs.again.cycles) / micro + (picks + again) * machine.arrival

    every_turn = picks * costs.turn.instructions + again * costs.again.instructions
    instructions += plan.parts * every_turn
    instructions += float(counts.sum((1, 2)) @ np.array([cost.instructions for cost in costs[2:]]))
    read = launch.EAGER_PICKS * call.bytes + float(turns.reads) * 2 * call.dim
    prediction = Prediction(
        registers=kernel.registers,
        programs=at_once,
        instructions=instructions / call.all_rows,
        microseconds=eager + machine.launch + machine.cooperative + alone + float(pieces.sum()),
        least=read / machine.dram_bytes_per_s * 1e6,
    )
    return Detailed(prediction, turns, costs, eager, alone, *pieces.tolist())


def launches_of(call: Call, machine: Machine) -> tuple[Plan, list[Spec]]:
    """What the launcher would launch at inference: the last of the launches that read all rows, and the lazy one."""
    p = problem_of(call, EVAL)
    with as_if_on(machine.processors):
        (plan,) = launch._forward_plans(p, False)
        names = ("select_forward", "select_lazily")
        specs = record(call.name, launch, names, lambda: launch.forward(p, False), machine.target)
    if call.sets != 1 or specs[-1].kernel != "select_lazily":
        raise ValueError(f"expected one set of which rows are left out, got {call}")
    return plan, specs[-2:]


def kernel_of(spec: Spec, plan: Plan, machine: Machine) -> Kernel:
    """Built."""
    return Kernel(*built(spec, machine), spec.options["num_warps"], plan, True)


def _eager(call: Call, kernel: Kernel, machine: Machine) -> tuple[float, float]:
    """Microseconds and instructions of the launches that read all rows, a pick each, after one that looks for the
    first pick, which is no more than a launch."""
    share = -(-call.all_rows // kernel.plan.parts)
    way = way_of(kernel, share, 2, call.dim)
    conditions = {"BUILD.SPLIT != LAUNCHES or turn == 0": False, "step == 0": False}
    trace = walk(kernel.code, way._replace(loops={**way.loops, "steps": 1}, conditions=way.conditions | conditions))
    cost = cost_of(kernel.code, kernel.warps, trace, access_of(call, kernel, share, machine), machine)
    of_pick = machine.launch + max(cost.cycles / machine.ghz / 1e3, call.bytes / machine.dram_bytes_per_s * 1e6 / CAP)
    return machine.launch + launch.EAGER_PICKS * of_pick, launch.EAGER_PICKS * kernel.plan.parts * cost.instructions


def trace_of(
    call: Call, kernel: Kernel, turns: int, collects: int, tiles: int, meetings: int, again: bool = False
) -> list[Executed]:
    """Of a program that in each of its turns but the last makes so many lists, each of so many tiles of rows, each of
    which meets so many picks."""
    plan = kernel.plan
    blocks = math.ceil(math.ceil(call.all_rows / plan.parts) / plan.block_r)
    loops = {
        "mine_to_do & (at.step < K)": turns,
        "collects": blocks,
        "scans": blocks,
        "going": collects,
        "refreshes": tiles,
        "picks": meetings,
        "seen ^ phase >= 0": 2,
        "written": 0,
    }
    conditions: dict[str, bool | tuple[bool, ...]] = {
        "(rows.count > above) & (rows.count <= longest)": True,
        "turn > 0": (False, True),
        DECIDED: not again,
        "step < out.steps": (True,) * (turns - 1) + (False,),
        "part.part == 0": False,
        "there & (best.row >= part.low) & (best.row < part.high)": False,
        "tl.max(is_extreme(norm).to(tl.int32), axis=0) > 0": False,
        "is_extreme(norm)": False,
    }
    return walk(kernel.code, Way(loops, conditions))


def slowest(counts: np.ndarray, single: Costs, costs: Costs, at_once: int) -> np.ndarray:
    """Cycles of lists, tiles and meetings, ``counts`` [3, turns, parts], of the multiprocessor with the most to do in
    each turn. Parts are ``at_once`` on a multiprocessor, first one on each, then the next.

    The program with the most to do takes as long as a ``single`` one, and longer by what each piece of another's adds
    to one of its own, which is what tells ``costs`` from those of a single one.
    """
    alone, all_alike = (np.array([cost.cycles for cost in of[2:]])[:, None, None] for of in (single, costs))
    each = counts.reshape(*counts.shape[:2], at_once, -1)  # [3, turns, at_once, multiprocessors]
    first = (alone[..., None] * each).sum(0).argmax(1)  # [turns, multiprocessors]
    longest = np.take_along_axis(each, first[None, :, None], 2)[:, :, 0]  # [3, turns, multiprocessors]
    cycles = alone * longest + (all_alike - alone) / max(at_once - 1, 1) * (each.sum(2) - longest)
    last = cycles.sum(0).argmax(1)  # [turns]
    return cycles[:, np.arange(len(last)), last].sum(1)


def costs_of(call: Call, kernel: Kernel, machine: Machine, at_once: int) -> Costs:
    """By what a turn, a list, a tile and a meeting more take in programs of few, ``at_once`` on a multiprocessor, which
    all do the same."""

    def cost(turns: int, collects: int, tiles: int, meetings: int, again: bool = False, first: bool = False) -> Cost:
        trace = trace_of(call, kernel, turns, collects, tiles, meetings, again)
        return cost_of(kernel.code, kernel.warps, trace, _access(call, kernel, first), machine, at_once)

    turn, again = (cost(4, 1, 0, 0, again, True).plus(cost(3, 1, 0, 0, again, True), -1) for again in (False, True))
    one = cost(3, 1, 0, 0)
    collect = _times(cost(3, 2, 0, 0).plus(one, -1), 1 / 2)
    few = cost(3, 1, 1, 4)
    meeting = _times(cost(3, 1, 1, 12).plus(few, -1), 1 / 16)
    tile = _times(few.plus(one, -1), 1 / 2).plus(meeting, -4)
    return Costs(turn, again, collect, tile, meeting)


def _times(cost: Cost, times: float) -> Cost:
    return Cost(0.0, 0.0).plus(cost, times)


def _access(call: Call, kernel: Kernel, first: bool) -> Callable[[Instruction, int], Access]:
    """Where loads and stores go: rows come from memory; the picks' directions and what parts exchange are in L2, and
    what is known of a part's rows, too, for the ``first`` list of a turn, as the barrier before it empties L1."""
    plan, instructions = kernel.plan, kernel.code.instructions
    filled = call.dim / (plan.chunk * plan.chunks)
    collected = [n for n, i in enumerate(instructions) if function(i.file, i.line) == "collect_rows"]
    of_collects = {id(i) for i in instructions[: max(collected)]}

    def access(i: Instruction, step: int) -> Access:
        size = 32.0 * i.bytes_of_thread
        where = function(i.file, i.line)
        if where == "load_chunk":
            return "dram", size * filled
        if where in ("load_cols", "load_row", "make_pick"):
            return "l2", size * filled
        known = where in ("look_at_rows", "scores_of", "refresh_rows") and i.name == "LDG"
        return ("l1" if known and not (first and id(i) in of_collects) else "l2"), 128.0

    return access
