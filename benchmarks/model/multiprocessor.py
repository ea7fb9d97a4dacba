"""One multiprocessor of a GPU that issues programs' instructions in order, a warp's next when the compiler's control
code lets it.

A warp issues when its stall count has run out and the scoreboards that it waits for are free; each of the four
schedulers issues one instruction a cycle, the warp that was ready first before others; pipes take an instruction in as
many cycles as their width says; memory answers after a latency, and no faster than its bandwidth.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.model.machine_code import Code, Instruction
from benchmarks.model.machines import Machine
from benchmarks.model.walk import Executed

Access = tuple[str, float]
"""Where a warp's load or store goes, "dram", "l2" or "l1", and its bytes."""


class UnknownInstructionError(LookupError):
    """The kernel runs an instruction that no pipe is known to take."""


class Operation(NamedTuple):
    """What the multiprocessor wants to know of an executed instruction."""

    name: str
    pipe: str
    width: int
    stall: int
    awaits: tuple[int, ...]
    holds: tuple[int, int]
    access: Access | None
    groups: int  # of asynchronous copies that may be under way, where it waits for others
    alone: bool


class Warp:
    """One warp on its way."""

    __slots__ = ("at", "boards", "closed", "first", "open", "place", "program", "scheduler", "time")

    def __init__(self, program: int, place: int, number: int, warps: int, time: float) -> None:
        self.program, self.place, self.first, self.time = program, place, number == 0, time
        self.scheduler = (place * warps + number) % 4
        self.at = 0
        self.boards = [0.0] * 8  # when each scoreboard is free; the last is nobody's
        self.open, self.closed = 0.0, [0.0]  # when groups of asynchronous copies are there


def operations(
    code: Code, trace: Sequence[Executed], access: Callable[[Instruction, int], Access], machine: Machine
) -> list[Operation]:
    """A trace with what each instruction costs."""
    pipe_of = {name: (pipe, width) for pipe, (width, names) in machine.pipes.items() for name in names}
    known: dict[tuple[int, int, bool], Operation] = {}
    made = []
    for key in trace:
        if key not in known:
            number, alone, step = key
            i = code.instructions[number]
            if i.name not in pipe_of:
                raise UnknownInstructionError(f'{i.operation} of File "{i.file}", line {i.line} on {machine.target}')
            pipe, width = pipe_of[i.name]
            if pipe == "exchange":
                width = i.bytes_of_thread // 4
            to = access(i, step) if pipe == "memory" else None
            known[key] = Operation(i.name, pipe, width, i.stall, i.awaits, i.sets, to, i.groups, alone)
        made.append(known[key])
    return made


def occupancy(registers: int, shared: int, warps: int, machine: Machine) -> int:
    """Programs that a multiprocessor holds."""
    of_warp = -(-registers // 8) * 8 * 32
    by_registers = machine.registers // 4 // of_warp * 4 // warps  # a quarter of the registers is a scheduler's
    return min(by_registers, machine.shared_bytes // (shared + 1024), machine.warps // warps, 32)


def simulate(work: list[Operation], warps: int, at_once: int, programs: int, machine: Machine) -> float:
    """Cycles until so many programs of so many warps have run, ``at_once`` at a time."""
    return _Multiprocessor(work, warps, machine).run(at_once, programs)


class _Multiprocessor:
    def __init__(self, work: list[Operation], warps: int, machine: Machine) -> None:
        self.work, self.warps, self.machine = work, warps, machine
        self.ready: list[tuple[float, int, Warp]] = []
        self.pushed = 0
        self.left: dict[int, int] = {}  # warps of a program that are on their way
        self.meeting: dict[int, list[Warp]] = {}  # those that wait at a program's barrier
        self.schedulers = [0.0] * 4  # free from then on, as are the next
        self.pipes: dict[tuple[int, str], float] = {}
        self.exchange = self.lsu = self.l2 = self.dram = 0.0

    def run(self, at_once: int, programs: int) -> float:
        started, end = min(at_once, programs), 0.0
        for program in range(started):
            self._start(program, program, 0.0)
        while self.ready:
            time, _, warp = heapq.heappop(self.ready)
            while warp.at < len(self.work) and self.work[warp.at].alone and not warp.first:
                warp.at += 1
            if warp.at < len(self.work):
                self._try(time, warp)
                continue
            end = max(end, time)
            self.left[warp.program] -= 1
            if self.left[warp.program] == 0 and started < programs:
                self._start(started, warp.place, time + self.machine.begin)
                started += 1
        if any(self.left.values()):
            raise RuntimeError("warps wait at a barrier that others never come to")
        return end

    def _start(self, program: int, place: int, time: float) -> None:
        self.left[program], self.meeting[program] = self.warps, []
        for number in range(self.warps):
            self._push(time, Warp(program, place, number, self.warps, time))

    def _push(self, time: float, warp: Warp) -> None:
        heapq.heappush(self.ready, (time, self.pushed, warp))
        self.pushed += 1

    def _try(self, time: float, warp: Warp) -> None:
        """Issue a warp's instruction, or have the warp come again when it can be."""
        o = self.work[warp.at]
        soonest = max((warp.boards[b] for b in o.awaits), default=0.0)
        if o.name == "DEPBAR":
            soonest = max(soonest, warp.closed[max(0, len(warp.closed) - 1 - o.groups)])
        soonest = max(soonest, self.schedulers[warp.scheduler], self._is_free(o, warp))
        if soonest > time + 0.5:
            self._push(soonest, warp)
            return
        time = max(time, soonest)
        self.schedulers[warp.scheduler] = time + 1
        there, read = self._result(time, o, warp)
        boards = warp.boards
        boards[o.holds[0]] = max(boards[o.holds[0]], there)
        boards[o.holds[1]] = max(boards[o.holds[1]], read)
        warp.at += 1
        then = time + o.stall
        if o.name in ("BRA", "CALL"):
            then = time + max(o.stall, self.machine.branch)
        elif o.name == "MEMBAR":
            then = time + self.machine.fence
        if o.name == "BAR":
            self._meet(then, warp)
        else:
            self._push(then, warp)

    def _is_free(self, o: Operation, warp: Warp) -> float:
        """When an instruction's pipe takes it; those of memory have a queue."""
        if o.pipe == "exchange":
            return self.exchange - 6
        if o.pipe == "memory":
            return self.lsu - 12
        return self.pipes.get((warp.scheduler, o.pipe), 0.0)

    def _result(self, time: float, o: Operation, warp: Warp) -> tuple[float, float]:
        """When an instruction's result is there, and when its operands are read."""
        m = self.machine
        if o.access is not None:
            return self._access(time, o, o.access, warp)
        if o.pipe in ("exchange", "local"):
            self.exchange = max(self.exchange, time) + o.width
            return self.exchange + m.shared, self.exchange + 10
        if o.pipe not in ("others", "control"):
            self.pipes[warp.scheduler, o.pipe] = time + o.width
        if o.name == "LDGDEPBAR":
            warp.closed.append(max(warp.open, warp.closed[-1]))
            warp.open = 0.0
        latency = {"special": m.special, "uniform": m.uniform}.get(o.pipe, 0)
        by_name = {
            "ATOMG": m.atomic, "RED": m.atomic, "REDG": m.atomic, "MEMBAR": m.fence, "CCTL": m.invalidate,
            "LDC": m.constant, "LDCU": m.constant, "S2R": m.system, "REDUX": m.shared, "CREDUX": m.shared,
        }  # fmt: skip
        return time + by_name.get(o.name, latency), time + m.operands

    def _access(self, time: float, o: Operation, access: Access, warp: Warp) -> tuple[float, float]:
        m, (level, size) = self.machine, access
        self.lsu = max(self.lsu, time) + max(1.0, size / m.lsu_bytes_per_cycle)
        queue, latency = self.lsu, m.l1
        if level != "l1":
            self.l2 = max(self.l2, self.lsu) + size / m.l2_bytes_per_cycle
            queue, latency = self.l2, m.l2
        if level == "dram":
            self.dram = max(self.dram, self.lsu) + size / m.dram_bytes_per_cycle
            queue, latency = max(self.l2, self.dram), m.dram
        there, read = queue + latency, self.lsu + m.store
        if o.name == "LDGSTS":
            warp.open = max(warp.open, there)
            return read, read
        return there, read

    def _meet(self, time: float, warp: Warp) -> None:
        waiting = self.meeting[warp.program]
        waiting.append(warp)
        warp.time = time
        if len(waiting) == self.warps:
            go = max(w.time for w in waiting) + self.machine.barrier
            self.meeting[warp.program] = []
            for one in waiting:
                self._push(go, one)
