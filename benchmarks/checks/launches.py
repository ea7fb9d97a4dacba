"""Calls on their way to a GPU that is not here: all but the driver is what runs on one.

    python -m benchmarks.checks.launches

The steps of `small_shapes.py` go through the package and Triton's own runtime, which compiles each launch for an H100
and hands it to what stands in for the driver's library. That keeps the launch instead of running it, so that what calls
give is whatever was in memory. Checked is what an interpreter does not show, and would fail on a GPU at once: that the
runtime takes the arguments, that each arrives in its place with its value, that the compiled code wants as many, that
threads and grid are those asked for, and that all programs of a cooperative launch fit the GPU together.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fcn_kernels
from benchmarks.checks.builds import PROCESSORS, TARGETS, as_if_on, nvidia_resources, specialized
from benchmarks.checks.small_shapes import TOLERANCE, cases, picked
from benchmarks.model.machines import H100
from benchmarks.model.multiprocessor import occupancy

TARGET = "sm_90"
SOURCE = Path(__file__).with_name("cuda_stand_in.c")
KINDS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
ATTRIBUTE_BYTES = 72  # of a CUlaunchAttribute, which begins with its number
COOPERATIVE = 2  # that of a launch whose programs can wait for each other


class Config(ctypes.Structure):
    """A CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


class Launch(NamedTuple):
    """One that arrived."""

    kernel: str
    programs: int
    threads: int
    shared: int
    registers: int
    cooperative: bool
    arguments: int


class Driver(nvidia.CudaDriver):  # type: ignore[misc]
    """Triton's, without what it asks PyTorch."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget(*TARGETS[TARGET])

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


class Listener:
    """Takes launches in the driver's place, and holds them against what was asked for."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.launches: list[Launch] = []
        self.kinds: list[str] = []  # of the arguments that are on their way
        self.arrived: list[tuple[tuple[int, ...], int, int, bool, list[Any]]] = []
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Config), ctypes.POINTER(ctypes.c_void_p))
        self.function = prototype(self._receive)
        library.listen_with(self.function)

    def _receive(self, config: Any, arguments: Any) -> int:
        at = config[0]
        attributes = [ctypes.c_int.from_address(at.attributes + ATTRIBUTE_BYTES * i).value for i in range(at.count)]
        values = [
            KINDS.get(kind, ctypes.c_uint64).from_address(arguments[i]).value for i, kind in enumerate(self.kinds)
        ]
        self.arrived.append((tuple(at.grid), at.block[0], at.shared, COOPERATIVE in attributes, values))
        return 0

    def follow(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """JITFunction.run, whose launch is looked at."""

        def followed(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
            _, _, _, backend, bind = kernel.device_caches[0]
            bound, signature, _, _ = specialized(kernel, backend, bind, args, kwargs)
            wanted = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
            self.kinds = [kind for _, kind in wanted]
            self.arrived.clear()
            made = run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            ((shape, threads, shared, cooperative, values),) = self.arrived
            for (name, kind), value in zip(wanted, values, strict=True):
                expect(value == _as_passed(bound[name], kind), f"{name} of {kernel.fn.__name__}", bound[name], value)
            registers, _ = nvidia_resources(made.asm["cubin"])
            launch = Launch(
                kernel.fn.__name__, shape[0] * shape[1] * shape[2], threads, shared, registers, cooperative, len(values)
            )
            check(launch, shape, grid, kwargs, made)
            self.launches.append(launch)
            return made

        return followed


def _as_passed(value: Any, kind: str) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return ctypes.c_float(value).value if kind == "fp32" else int(value)


def expect(holds: bool, what: str, wanted: Any, found: Any) -> None:
    """Raise unless it ``holds``."""
    if not holds:
        raise AssertionError(f"{what}: expected {wanted}, got {found}")


def check(launch: Launch, shape: tuple[int, ...], grid: tuple[int, ...], asked: dict[str, Any], made: Any) -> None:
    """Raise unless a launch is the one that was asked for, and of what was ``made`` for it."""
    name, wanted = launch.kernel, (*grid, 1, 1)[:3]
    expect(shape == wanted, f"grid of {name}", wanted, shape)
    threads = 32 * made.metadata.num_warps
    expect(launch.threads == threads == 32 * asked.get("num_warps", 4), f"threads of {name}", threads, launch.threads)
    expect(launch.shared == made.metadata.shared, f"shared bytes of {name}", made.metadata.shared, launch.shared)
    taken = made.asm["ptx"].partition(".entry")[2].partition(")")[0].count(".param")
    # two more are Triton's own
    expect(taken == launch.arguments + 2, f"arguments that the code of {name} takes", launch.arguments + 2, taken)
    cooperative = bool(asked.get("launch_cooperative_grid"))
    expect(launch.cooperative == cooperative, f"whether {name} is cooperative", cooperative, launch.cooperative)
    if cooperative:
        most = H100.processors * occupancy(launch.registers, launch.shared, threads // 32, H100)
        expect(launch.programs <= most, f"programs of {name} at once", f"at most {most}", launch.programs)


@contextmanager
def stand_in() -> Iterator[Listener]:
    """Calls on the CPU go to the kernels, and their launches to what is given. For a process that does nothing else."""
    if torch.cuda.is_available():
        raise RuntimeError("expected no CUDA device: its driver is here, and needs nothing to stand in for it")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("expected TRITON_INTERPRET unset, under which nothing is launched")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        options = ("-shared", "-fPIC", f"-Wl,-soname,{library.name}")
        subprocess.run([os.environ.get("CC", "gcc"), *options, str(SOURCE), "-o", str(library)], check=True)
        triton.knobs.nvidia.libcuda_path = folder
        listener = Listener(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
        driver.set_active(Driver())
        JITFunction.run = listener.follow(JITFunction.run)
        for name, module in list(sys.modules.items()):
            if name.startswith(fcn_kernels.__name__) and hasattr(module, "resolve_backend"):
                module.resolve_backend = lambda *_: "triton"
        yield listener


def launches(dtypes: list[torch.dtype]) -> Iterator[Launch]:
    """Of the steps, and once more of those on one set, whose parts then meet between launches."""
    with stand_in() as listener:
        for cooperative in (True, False):
            with as_if_on(PROCESSORS[TARGET], cooperative):
                for step, dtype, args, options in cases():
                    one_set = step is picked or args[:1] == ((1, 600, 64),)
                    if dtype in dtypes and (cooperative or one_set):
                        step("cpu", dtype, *args, **options)
                        yield from listener.launches
                        listener.launches.clear()


def main(argv: list[str] | None = None) -> int:
    """Print launches, each once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks.launches", description=__doc__.splitlines()[0])
    names = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
    parser.add_argument("--dtypes", nargs="+", choices=names, default=list(names), help="of the rows")
    chosen = [names[name] for name in parser.parse_args(argv).dtypes]
    print("| kernel | programs | threads | shared bytes | registers | cooperative | arguments |")
    print("|---" * len(Launch._fields) + "|")
    seen: set[Launch] = set()
    for launch in launches(chosen):
        if launch not in seen:
            print("| " + " | ".join(map(str, launch)) + " |", flush=True)
            seen.add(launch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
