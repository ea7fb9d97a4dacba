"""A kernel's machine code as nvdisasm prints it: instructions, the branches' targets, the compiler's control codes."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/"
)
CONTROL = re.compile(r"\s*/\* (0x[0-9a-f]{16}) \*/")  # the upper half of an instruction
LABEL = re.compile(r"(\.L[\w$]+):\s*$")
UNIFORM = re.compile(r"(!?UP\d), ")  # the condition of a branch that all threads take or none, among its arguments
SOURCE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')


class Instruction(NamedTuple):
    """One instruction. The control code says how long to wait after it, and for what."""

    predicate: str  # "" where it always runs
    operation: str  # with its modifiers: LDG.E.128
    arguments: str
    file: str  # of the source that it was made of
    line: int
    control: int

    @property
    def name(self) -> str:
        """The operation without modifiers."""
        return self.operation.partition(".")[0]

    @property
    def stall(self) -> int:
        """Cycles until the warp's next instruction."""
        return self.control & 15 or 1

    @property
    def sets(self) -> tuple[int, int]:
        """The scoreboards that it holds until its result is there, and until its operands are read; 7 for none."""
        return self.control >> 5 & 7, self.control >> 8 & 7

    @property
    def awaits(self) -> tuple[int, ...]:
        """The scoreboards that have to be free before it; a DEPBAR names others behind what it waits for itself."""
        named = re.search(r"\{([\d, ]+)\}", self.arguments) if self.name == "DEPBAR" else None
        others = tuple(map(int, named[1].split(","))) if named else ()
        return tuple(board for board in range(6) if self.control >> 11 + board & 1) + others

    @property
    def groups(self) -> int:
        """Of asynchronous copies, how many may be under way after it, where it waits for others."""
        return int(self.arguments.split(", ")[1], 0) if self.name == "DEPBAR" and ", " in self.arguments else 0

    @property
    def bytes_of_thread(self) -> int:
        """What a thread loads or stores with it."""
        if self.name in ("LDSM", "STSM"):
            return 4 * int(self.operation[-1]) if self.operation[-1] in "24" else 4
        return 16 if ".128" in self.operation else 8 if ".64" in self.operation else 4


class Code(NamedTuple):
    """A kernel's instructions; for each branch the number of the instruction that it goes to.

    A call of a place in the kernel itself, by which sm_80 leaves loops, is a branch: nothing returns from there.
    """

    instructions: list[Instruction]
    targets: dict[int, int]


def disassemble(cubin: bytes) -> Code:
    """Instructions in order, the kernel's own first."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-gi", "-c", "-hex", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> Code:
    """Of nvdisasm's text."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    file, line, source_is_new = "", 0, True
    for row in text.splitlines():
        if found := SOURCE.match(row):
            if source_is_new:  # the first of several is the innermost
                file, line, source_is_new = found[1], int(found[2]), False
        elif found := LABEL.match(row):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.match(row):
            predicate, operation, arguments = found[1] or "", found[2], found[3]
            if operation == "BRA.U" and (condition := UNIFORM.match(arguments)):
                predicate = "@" + condition[1]
            instructions.append(Instruction(predicate, operation, arguments, file, line, 0))
            source_is_new = True
        elif instructions and (found := CONTROL.match(row)):
            instructions[-1] = instructions[-1]._replace(control=int(found[1], 16) >> 41 & 0x1FFFFF)
    targets = {}
    for number, instruction in enumerate(instructions):
        named = re.search(r"`\((\.L\w+)\)", instruction.arguments)
        if instruction.name in ("BRA", "BSSY", "CALL") and named and named[1] in labels:
            targets[number] = labels[named[1]]
    return Code(instructions, targets)
