"""Where the tests run: on the GPU if there is one, else on the CPU, with Triton's kernels interpreted there."""

import os
import signal
from itertools import product
from pathlib import Path

# Workers that each take all cores make each other wait at every operation. Programs that the tests start are no
# workers, and can be interrupted even where a shell or nohup made its jobs deaf to that.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Triton and fcn_kernels read this once, when they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from everywhere import select, where  # noqa: E402

import fcn_kernels  # noqa: E402
from fcn_kernels.backends import INTERPRETED  # noqa: E402
from fcn_kernels.cpp import calls  # noqa: E402

if INTERPRETED:
    from interpreted import replace_once_a_launch

    replace_once_a_launch()

__all__ = ["select", "where"]

settings.register_profile("fcn_kernels", deadline=None, derandomize=True)
settings.load_profile("fcn_kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The tests' own option."""
    parser.addoption("--on-device", action="store_true", help="only the tests that run on a GPU where there is one")


def pytest_configure(config: pytest.Config) -> None:
    """Workers compile the C++ between them: each begins elsewhere among the libraries, and finds what others made."""
    if (worker := getattr(config, "workerinput", None)) is None:
        return
    libraries = list(product(sorted(Path(fcn_kernels.__file__).parent.glob("*/cpp/*.cpp")), calls.ROWS))
    begin = len(libraries) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for source, dtype in libraries[begin:] + libraries[:begin]:
        calls.why_unavailable(source, dtype)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The others show nothing of a GPU."""
    if config.getoption("--on-device"):
        chosen = [item for item in items if "device" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
