"""``python -m fcn_kernels``: what a call would run on here, and the jobs that show the package at work."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fcn_kernels import _interrupt

COMMANDS = {
    "info": ("fcn_kernels.cli.info", "versions, devices, and the backend and tier that a call would take"),
    "demo": ("fcn_kernels.demos.select_demo", "pick coresets of real handwritten digits; a table and a picture"),
    "train-demo": ("fcn_kernels.demos.train_demo", "train backbone and head end to end on the digits; ROC and picks"),
    "aggregate": ("fcn_kernels.cli.aggregate", "one descriptor a template, from a file of embeddings"),
    "select": ("fcn_kernels.cli.select", "rows that are good and different, from a file larger than memory"),
    "merge": ("fcn_kernels.cli.merge", "one file of the parts that `aggregate --shard` wrote"),
    "faces": ("fcn_kernels.cli.faces", "from a video or folders of photos to picked faces and descriptors"),
    "evaluate": ("fcn_kernels.cli.evaluate", "TAR at FAR of pairs of templates, TPIR at FPIR of searches, ROC"),
    "align": ("fcn_kernels.cli.align", "scores corrected by how descriptors stand to a bank of other people"),
    "train": ("fcn_kernels.cli.train", "train a head on embeddings with identities"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    if sys.stderr is None:  # closed: progress bars write there, and its number would go to the next file opened
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    _interrupt.restore()
    try:
        return _printed(_run(argv))
    except KeyboardInterrupt:  # during imports: a command that has begun says itself what became of its output
        print("python -m fcn_kernels: interrupted", file=sys.stderr)
        return 130


def _printed(status: int) -> int:
    """The status, or that of a failure to write if what is printed cannot be had out."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        sys.stdout = None  # Python would try again, and end with a status of its own
        print(f"python -m fcn_kernels: {error}", file=sys.stderr)
        return status or 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m fcn_kernels", description=__doc__.partition(":")[2].strip())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:  # only the command asked for is imported
            import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return int(import_module(COMMANDS[args.command][0]).run(args))
    except (ImportError, ValueError, OSError) as error:  # a missing extra, input that cannot be used; or a full disk
        print(f"python -m fcn_kernels {args.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2


if __name__ == "__main__":
    sys.exit(main())
