"""Kernels whose speed is known: they move memory as fast as it can be moved, and the model has to say so."""

import triton
import triton.language as tl

from benchmarks.checks.builds import Spec, compiled, nvidia_resources
from benchmarks.model.machine_code import disassemble
from benchmarks.model.machines import Machine
from benchmarks.model.multiprocessor import occupancy, operations, simulate
from benchmarks.model.walk import Way, walk

WAVES = 6
WARPS = 4
COLUMNS = 4096


@triton.jit
def copy(from_ptr, to_ptr, BLOCK: tl.constexpr):
    """Blocks of bfloat16, one a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at))


@triton.jit
def rms_norm(from_ptr, to_ptr, BLOCK: tl.constexpr):
    """Rows of bfloat16, one a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(from_ptr + at).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / BLOCK + 1e-6)
    tl.store(to_ptr + at, (row * scale).to(tl.bfloat16))


def share_of_bandwidth(kernel: str, machine: Machine) -> float:
    """What one of them reaches of the memory's bandwidth, were the multiprocessor the only limit: programs in waves."""
    pointers = {"from_ptr": "*bf16", "to_ptr": "*bf16"}
    signature, multiples = {**pointers, "BLOCK": "constexpr"}, {key: [["tt.divisibility", 16]] for key in pointers}
    spec = Spec(kernel, __name__, kernel, signature, {"BLOCK": COLUMNS}, multiples, {"num_warps": WARPS})
    made = compiled(spec, machine.target)
    code = disassemble(made.asm["cubin"])
    registers, _ = nvidia_resources(made.asm["cubin"])
    at_once = occupancy(registers, made.metadata.shared, WARPS, machine)
    trace = walk(code, Way({}, {}))
    work = operations(code, trace, lambda i, step: ("dram", 32.0 * i.bytes_of_thread), machine)
    seconds = simulate(work, WARPS, at_once, WAVES * at_once, machine) / machine.ghz / 1e9
    return 2 * 2 * COLUMNS * WAVES * at_once * machine.processors / seconds / machine.dram_bytes_per_s
