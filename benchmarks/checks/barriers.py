"""What a grid barrier takes: an empty cooperative kernel that meets again and again, beside what the model assumes.

    python -m benchmarks.checks.barriers

Parts of a large set meet K times forward and 2 K - 1 times backward, so that a model that is wrong about barriers is
wrong about these calls. Without a GPU there is only what the model says.
"""

import argparse
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.checks.builds import record
from benchmarks.harness import Clock, device_name
from benchmarks.model.machines import H100, Machine
from benchmarks.model.predict import built, cost_of
from benchmarks.model.walk import Way, walk
from fcn_kernels.device.gpu import counters, device_of
from fcn_kernels.device.splits import barrier_phase, grid_barrier

WARPS = 4
FEW, MANY = 8, 264  # barriers of a launch: the difference has neither its begin nor its end
LAUNCHES = 20
LOOKS = 2  # of a program, until it sees that all others came: as the model has it for selection


@triton.jit(do_not_specialize=["parts", "times"])
def meet_often(barrier_ptr, parts, times):
    """Programs that do nothing but wait for each other."""
    phase = barrier_phase(barrier_ptr)
    for _ in range(times):  # @meetings
        phase = grid_barrier(barrier_ptr, tl.program_id(0), parts, phase)


def launch(barrier: Tensor, parts: int, times: int) -> None:
    """One launch of so many parts, all of them resident."""
    kernel: Any = meet_often[(parts,)]
    kernel(barrier_ptr=barrier, parts=parts, times=times, num_warps=WARPS, launch_cooperative_grid=True)


def assumed(machine: Machine) -> float:
    """Microseconds a barrier by the model: counted instructions, assumed latencies and an assumed arrival."""
    barrier = torch.empty(1, dtype=torch.int32)
    (spec,) = record(
        "barriers", sys.modules[__name__], ("meet_often",), lambda: launch(barrier, 2, FEW), machine.target
    )
    code, _, _ = built(spec, machine)

    def cycles(times: int) -> float:
        trace = walk(code, Way({"meetings": times, "seen ^ phase >= 0": LOOKS}, {}))
        return cost_of(code, WARPS, trace, lambda i, step: ("l2", 64.0), machine).cycles

    return (cycles(MANY) - cycles(FEW)) / (MANY - FEW) / machine.ghz / 1e3 + machine.arrival


def measured(device: torch.device, at_once: int) -> float:
    """Microseconds a barrier of so many programs on each multiprocessor."""
    barrier, clock = torch.zeros(1, dtype=torch.int32, device=device), Clock(device)
    parts = at_once * device_of(barrier).processors
    with torch.cuda.device(device):
        barrier = counters(barrier, 1)
        few, many = (
            min(clock.sample(lambda _, times=times: launch(barrier, parts, times), turn, LAUNCHES) for turn in range(5))
            for times in (FEW, MANY)
        )
    return (many - few) / (MANY - FEW) * 1e6


def main(argv: list[str] | None = None) -> int:
    """Print a line for each number of programs on a multiprocessor."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks.barriers", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    print(f"assumed for an {H100.name}: {assumed(H100):.2f} us a grid barrier")
    if not torch.cuda.is_available():
        print("measured: no CUDA device")
        return 0
    device = torch.device("cuda")
    for at_once in (1, 2):
        print(f"measured on {device_name(device)}, {at_once} x 4 warps: {measured(device, at_once):.2f} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
