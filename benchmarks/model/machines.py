"""GPUs that are not here: what their makers say of them, and what is assumed.

Nothing here was measured by this project. By one rule for all: of its maker's memory bandwidth a GPU gives nine tenths
to reads, and CAP of that to a copy; a multiprocessor alone can draw twice its share. Latencies of the H100 are assumed
from published microbenchmarks, and the others' from the H100's: in cycles inside a multiprocessor, which is much the
same in all three, in nanoseconds to L2 and memory of the B200.
"""

from typing import NamedTuple

from benchmarks.checks.builds import PROCESSORS

CAP = 0.93  # of the memory's bandwidth

ALU = {
    "CS2R", "F2FP", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "I2FP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA",
    "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "REDUX", "CREDUX", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX",
    "VIMNMX3",
}  # fmt: skip
PIPES: dict[str, tuple[int, set[str]]] = {
    "alu": (2, ALU),
    "fma": (1, {"FFMA", "FADD", "FMUL", "FHFMA", "FHADD"}),  # the last two, of half and single, on sm_100
    "pairs": (2, {"FFMA2", "FADD2", "FMUL2"}),  # of two numbers a thread, on sm_100
    "tensor": (4, {"HMMA"}),  # of 16 x 8 x 16: with operands from registers they run at half of wgmma's rate
    "half": (2, {"IMAD", "HFMA2", "HADD2", "HMUL2"}),
    "special": (8, {"MUFU", "I2F", "F2I", "POPC", "FLO", "F2F", "BREV", "FRND"}),
    "uniform": (
        2,
        {"ULDC", "UMOV", "ULEA", "UIADD3", "UIMAD", "ULOP3", "USHF", "USEL", "UISETP", "UPRMT", "USGXT", "UFLO",
         "UPOPC", "UP2UR", "UPLOP3", "VOTEU", "R2UR", "S2UR"},
    ),
    "control": (
        1,
        {"BRA", "CALL", "BSYNC", "BSSY", "EXIT", "WARPSYNC", "NOP", "BREAK", "RET", "ERRBAR", "CGAERRBAR", "YIELD"},
    ),
    "exchange": (1, {"LDS", "STS", "SHFL", "LDSM", "STSM"}),
    "memory": (1, {"LDG", "STG", "LDGSTS"}),
    "local": (2, {"LDL", "STL"}),
    "others": (1, {"ATOMG", "RED", "REDG", "MEMBAR", "CCTL", "LDC", "LDCU", "S2R", "BAR", "DEPBAR", "LDGDEPBAR"}),
}  # fmt: skip
"""Of each pipe the cycles for which a warp's instruction has it, and what goes through it."""
AMPERE = {
    **PIPES,
    "fma": (2, {"FFMA", "FADD", "FMUL", "IMAD"}),  # 64 numbers a cycle, float or integer; from sm_90 on 128 floats
    "half": (2, {"HFMA2", "HADD2", "HMUL2"}),
    "tensor": (8, {"HMMA"}),
}


class Machine(NamedTuple):
    """A GPU. Sizes are its maker's; latencies and rates of memory are assumed."""

    name: str
    target: str
    processors: int
    ghz: float
    dram_bytes_per_s: float  # what a copy reaches at most is CAP of it
    dram_bytes_per_cycle: float  # that one multiprocessor draws while others compute: twice its share
    l2_bytes_per_cycle: float  # of one multiprocessor
    l2_bytes: int
    pipes: dict[str, tuple[int, set[str]]] = PIPES
    registers: int = 65536
    shared_bytes: int = 227 * 1024
    warps: int = 64
    lsu_bytes_per_cycle: float = 64
    # cycles
    dram: int = 600
    l2: int = 270
    l1: int = 38
    shared: int = 25  # shuffles too
    special: int = 22  # MUFU
    uniform: int = 12
    constant: int = 38
    system: int = 30  # S2R
    operands: int = 12  # until they are read
    store: int = 25
    barrier: int = 22
    branch: int = 9
    fence: int = 500
    atomic: int = 420
    invalidate: int = 40  # CCTL
    begin: int = 200  # of a program in the place of one that ended
    # microseconds
    launch: float = 2.0  # start to start in a queue of launches, beside the kernel's own time
    cooperative: float = 1.0  # more, for a cooperative launch
    arrival: float = 0.35  # of the programs at a barrier, one after the other

    @property
    def article(self) -> str:
        """Of its name."""
        return "an" if self.name[0] in "AH" else "a"


# SXM: 3.35 TB/s; a boost of 1.98 GHz is not kept under load.
H100 = Machine("H100", "sm_90", PROCESSORS["sm_90"], 1.7, 3.0e12, 26.0, 24.5, 50 << 20)

# SXM, 80 GB: 2.04 TB/s at 1.41 GHz, which it keeps. Published pointer chases through L2 take as many cycles as on an
# H100, through memory 3% fewer; L2 gives a multiprocessor as many bytes a cycle, so that the H100's figure stands.
A100 = Machine(
    "A100", "sm_80", PROCESSORS["sm_80"], 1.41, 1.83e12, 24.0, 24.5, 40 << 20, AMPERE,
    shared_bytes=163 * 1024, dram=580,
)  # fmt: skip

# 8 TB/s, two dies. L2 of the near die is reported to answer in 150 ns, much as an H100's; the far one is not modelled.
# Memory is taken to answer in as many nanoseconds as the H100's, and L2 to give a multiprocessor 36 bytes a cycle, as
# an H200's does. Fences and atomics go with L2. FFMA2, of two single numbers a thread, is taken to need two cycles.
B200 = Machine(
    "B200", "sm_100", PROCESSORS["sm_100"], 1.85, 7.2e12, 52.0, 36.0, 126 << 20, dram=650, l2=290, fence=540, atomic=455
)

MACHINES = {machine.name.lower(): machine for machine in (A100, H100, B200)}
