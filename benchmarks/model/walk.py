"""The instructions that a warp of a kernel runs, given how often its loops turn and which way its conditions go."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.model.machine_code import Code
from benchmarks.model.source import (
    MOST,
    Place,
    Statement,
    condition_like,
    condition_of,
    loop_of,
    statement,
    statement_of,
)

FAR = 12  # instructions; a call to a slow path of a division or a root is no further
SLOW = "_slowpath"  # in the name of what the compiler has for numbers that are not normal, or nearly so
UNROLLED = 4  # times that the compiler writes out a loop before a loop for the rest
LARGER = 2.5  # times as long is a loop's body that it has written out


class Way(NamedTuple):
    """Which way a call goes through a kernel.

    ``loops`` has a number of turns for each mark, ``conditions`` what each condition's text is in the steps of the loop
    that is marked "steps", or in the turns of the one that ends with a jump.
    """

    loops: Mapping[str, int]
    conditions: Mapping[str, bool | tuple[bool, ...]]


class Executed(NamedTuple):
    """An instruction of a trace."""

    number: int
    by_first_warp: bool  # alone
    step: int


class UnknownWayError(LookupError):
    """The kernel has a loop or a condition that nothing is said of."""


def walk(code: Code, way: Way, limit: int = 5_000_000) -> list[Executed]:
    """The trace of a warp."""
    return _Walk(code, way).run(limit)


def branches(code: Code) -> dict[int, Statement]:
    """Of each branch the loop or condition that it belongs to."""
    found = _Walk(code, Way({}, {}))
    return {at: found.statement_at(at) for at in code.targets}


class _Walk:
    def __init__(self, code: Code, way: Way) -> None:
        self.instructions, self.targets = code
        self.way = way
        self.step = 0
        self.left: dict[int, int] = {}  # turns, by the number of a loop's last instruction
        self.places = {n: self._uniform_place(n) for n in self.targets if self.instructions[n].operation == "BRA.U"}
        self.latches: dict[Place, list[int]] = {}
        for number, to in self.targets.items():
            if self.instructions[number].name == "BRA" and to < number:  # to itself: the end of the code
                self.latches.setdefault(self._place(number), []).append(number)

    def run(self, limit: int) -> list[Executed]:
        trace: list[Executed] = []
        at, alone = 0, range(0)  # what the first warp runs alone
        while len(trace) < limit:
            instruction = self.instructions[at]
            if at not in alone or instruction.name == "BAR":  # no thread comes to a barrier alone
                alone = range(0)
            trace.append(Executed(at, at in alone, self.step))
            if instruction.name == "CALL" and at not in self.targets:
                raise UnknownWayError(f"a call is reached: {self._where(at)}")
            if instruction.name == "EXIT" and (not instruction.predicate or self._ends(at)):
                return trace
            # .DIV is the way of a warp whose threads have parted
            if instruction.name not in ("BRA", "CALL") or instruction.operation.startswith("BRA.DIV"):
                at += 1
                continue
            if self._is_for_first(at):
                alone = range(at + 1, self._end_of(at))
            if self._goes_round(at) and "steps" not in self.way.loops:
                self.step += 1
            at = self.targets[at] if self._takes(at) else at + 1
        raise UnknownWayError(f"it does not end within {limit} instructions")

    def _goes_round(self, at: int) -> bool:
        """The jump back of the outermost loop, which is left at its head: others' depend on something, at the jump or
        just before it."""
        jumps_back = not self.instructions[at].predicate and self.targets[at] <= at
        return jumps_back and self.instructions[at - 1].name != "CALL"

    def _uniform_place(self, at: int) -> Place | None:
        """Of a branch that all threads take or none. sm_100's code has it with the line of what comes before, so that
        what it goes around, or back over, has to say which loop or condition it belongs to; None if it does not."""
        to = self.targets[at]
        if to <= at:
            return self._loop_place(at)
        inner = [(n, head) for n, head in self.targets.items() if at < head <= n < to and self._is_branch(n)]
        latch, head = max(inner, key=lambda found: found[0] - found[1], default=(at, at))
        if latch - head > MOST * (to - at):  # a way around a loop alone
            return self._loop_place(latch)
        own, setter = self._own_place(at), self._own_place(self._setter(at))
        if statement(*own).kind == "if":
            return own
        if statement(*setter).kind == "if":
            return condition_like(setter, self._own_places(at + 1, to))
        if 2 * (latch - head) > to - at:  # around a loop, with what is made ready for it
            return self._loop_place(latch)
        return statement_of(self._own_places(at + 1, to))

    def _loop_place(self, latch: int) -> Place | None:
        """Of the loop that a jump back ends."""
        if self.instructions[latch].operation != "BRA.U" and statement(*self._own_place(latch)).kind:
            return self._own_place(latch)
        return loop_of(self._own_places(self.targets[latch], latch))

    def _setter(self, at: int) -> int:
        """What sets the predicate of a branch last before it."""
        name = self.instructions[at].predicate.strip("@!")
        before = ((n, self.instructions[n]) for n in range(at - 1, -1, -1))
        return next((n for n, i in before if i.name != "BRA" and name in i.arguments.split(", ")[:2]), at)

    def _own_place(self, at: int) -> Place:
        return self.instructions[at].file, self.instructions[at].line

    def _own_places(self, begin: int, end: int) -> list[Place]:
        return [self._own_place(n) for n in range(begin, min(end, len(self.instructions)))]

    def _place(self, at: int) -> Place:
        return self.places.get(at) or self._own_place(at)

    def _is_branch(self, at: int) -> bool:
        return self.instructions[at].name == "BRA"

    def statement_at(self, at: int) -> Statement:
        """The one that an instruction belongs to."""
        return statement(*self._place(at))

    def _where(self, at: int) -> str:
        file, line = self._place(at)
        return f'instruction {at}, File "{file}", line {line}: {self.statement_at(at).text}'

    def _is_for_first(self, at: int) -> bool:
        """A branch around what the program's first thread does alone: to store a number, or to meet other programs."""
        text = self.statement_at(at).text
        if not self.instructions[at].predicate or not ("tl.atomic_add" in text or text.startswith("tl.store")):
            return False
        return self._loop_between(at, self._end_of(at)) is None  # else the line is not the branch's own

    def _end_of(self, at: int) -> int:
        """Where what a branch goes around ends: where it leads, or at a jump to there before code that lies between."""
        to = self.targets[at]
        near = range(at + 1, min(to, at + 2 * FAR))
        jumps = (n + 1 for n in near if self.instructions[n].name == "BRA" and not self.instructions[n].predicate)
        return next((after for after in jumps if self.targets[after - 1] == to), to)

    def _ends(self, at: int) -> bool:
        """Whether an EXIT under a condition is taken."""
        if (leaves := self._leaves(at)) is not None:
            return leaves
        stands = self.statement_at(at)
        if stands.kind in ("for", "while"):
            return self._count(stands, at) == 0
        if stands.kind == "if":
            return not self._holds(stands, at)
        if stands.text.startswith("tl.store"):
            return False  # by threads that have nothing to store; the first warp's have
        raise UnknownWayError(self._where(at))

    def _leaves(self, at: int) -> bool | None:
        """Whether what stands for a loop's end, before the jump back to its head, ends it; None where none follows."""
        follows = next((n for n in range(at + 1, at + FAR) if self.instructions[n].name in ("BRA", "EXIT")), at)
        if self.instructions[follows].predicate or self.targets.get(follows, follows) > at:
            return None
        return not self._turns(follows)

    def _takes(self, at: int) -> bool:
        """Whether a branch is taken."""
        instruction, to, stands = self.instructions[at], self.targets[at], self.statement_at(at)
        if not instruction.predicate:
            return True
        if at in self.places and self.places[at] is None:
            raise UnknownWayError(self._where(at))
        if to <= at:
            return self._turns(at)
        if instruction.name == "CALL":
            if (leaves := self._leaves(at)) is None:
                raise UnknownWayError(self._where(at))
            return leaves
        if to - at < FAR and any(SLOW in i.arguments for i in self.instructions[at + 1 : to]):
            return True
        if self._is_for_first(at):
            return False
        if stands.kind in ("for", "while"):
            return self._skips(stands, at, to)
        if stands.kind == "if":
            return self._holds(stands, at) != self._is_then(stands, at, to)
        if "tl.load" in stands.text or (to - at < FAR and self._moves(at + 1, to)):
            return False  # around the load of a number by threads that have none to load
        if any(self.targets.get(n) == to for n in range(at + 1, at + FAR)):
            return False  # what follows decides whether to go there
        if (inside := self._condition_inside(at, to) or stands).kind == "if":
            return not self._holds(inside, at)
        if (latch := self._loop_between(at, to)) is not None:
            return self._count(self.statement_at(latch), at) == 0
        raise UnknownWayError(self._where(at))

    def _condition_inside(self, at: int, to: int) -> Statement | None:
        """Of what a branch goes around; first by all lines, then without those that come behind it, too: the compiler
        has put them on both ways."""
        around = [self._place(n) for n in range(at + 1, to)]
        behind = set(self._own_places(to, 2 * to - at))
        inside = condition_of(around)
        if inside is None or inside.text not in self.way.conditions:
            return condition_of([place for place in around if place not in behind]) or inside
        return inside

    def _moves(self, begin: int, end: int) -> bool:
        """Whether there is an exchange between threads, or a load, among these instructions."""
        return any(i.name in ("LDG", "LDS", "STS") for i in self.instructions[begin:end])

    def _loop_between(self, at: int, to: int) -> int | None:
        """The last instruction of the longest marked loop that a branch goes around."""
        latches = [n for n, head in self.targets.items() if at < head <= n < to and self.statement_at(n).kind == "for"]
        return max(latches, key=lambda n: n - self.targets[n], default=None)

    def _is_then(self, stands: Statement, at: int, to: int) -> bool:
        """Whether what follows a branch is the condition's body, not what comes for ``else``."""
        places = [self._place(n) for n in range(at + 1, to)]
        then, other = (sum(p in lines for p in places) for lines in (stands.then, stands.other))
        if then == other:
            raise UnknownWayError(self._where(at))
        return then > other

    def _holds(self, stands: Statement, at: int) -> bool:
        if stands.text not in self.way.conditions:
            raise UnknownWayError(self._where(at))
        value = self.way.conditions[stands.text]
        return value[min(self.step, len(value) - 1)] if isinstance(value, tuple) else value

    def _count(self, stands: Statement, at: int) -> int:
        if stands.text not in self.way.loops:
            raise UnknownWayError(self._where(at))
        return self.way.loops[stands.text]

    def _turns(self, latch: int) -> bool:
        """Whether a loop goes on at its last instruction."""
        stands = self.statement_at(latch)
        if latch not in self.left:
            self.left[latch] = self._turns_of(stands, latch)
        self.left[latch] -= 1
        if self.left[latch] > 0:
            self.step += stands.text == "steps"
            return True
        del self.left[latch]
        return False

    def _turns_of(self, stands: Statement, latch: int) -> int:
        count, (whole, rest) = self._count(stands, latch), self._unrolled(latch)
        if latch == whole:
            return count // UNROLLED
        return count % UNROLLED if latch == rest else count

    def _unrolled(self, at: int) -> tuple[int | None, int | None]:
        """The last instructions of the two loops that one was made of, if it was."""
        latches = sorted(self.latches.get(self._place(at), []))
        for whole, rest in itertools.pairwise(latches):
            if whole - self.targets[whole] > LARGER * (rest - self.targets[rest]):
                return whole, rest
        return None, None

    def _skips(self, stands: Statement, at: int, to: int) -> bool:
        """Whether a branch before a loop is taken: one around it, around a part of it that was written out, or to it,
        with the way around it in between."""
        count = self._count(stands, at)
        whole, rest = self._unrolled(at)
        passed = [n for n, head in self.targets.items() if at < head <= n < to and self.instructions[n].name == "BRA"]
        if whole is None or rest is None or not at < rest:
            return count == 0 if passed else count > 0
        if rest in passed:
            return count == 0 if whole in passed else count % UNROLLED == 0
        return count < UNROLLED if passed else True


def executed(code: Code, trace: list[Executed], warps: int) -> dict[str, int]:
    """How many warps' instructions of each name a program runs."""
    found: dict[str, int] = {}
    for number, alone, _ in trace:
        name = code.instructions[number].name
        found[name] = found.get(name, 0) + (1 if alone else warps)
    return found
