"""A command that is killed in the middle of its work."""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence


def kill_when(ready: Callable[[], bool], command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Start a command, and kill it as soon as it is ready, which has to be before its end."""
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 120
        while not ready():
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
