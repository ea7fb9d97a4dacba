"""What pooling is worth, on embeddings of your own: every way side by side, without training and with it.

    python -m benchmarks.pooling EMBEDDINGS --ids KEY [options of `train`] --seeds 0 1 2 --out TABLE.md

EMBEDDINGS and the options are those of ``python -m fcn_kernels train``. For each seed some rows are held out to test,
and some of the others to choose the best step of training; all ways see the same test sets, drawn as those of training
are. TABLE.md has the mean and the standard deviation of the TAR over the seeds, whichever way wins.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from benchmarks.report.tables import table
from fcn_kernels.cli.arguments import run_to_status
from fcn_kernels.cli.train import add_arguments, labeled_rows, make_plan, make_training, split
from fcn_kernels.demos import repeatable
from fcn_kernels.demos.poolings import average, best_quality, norm_weighted
from fcn_kernels.files.aggregate import mean_of_coreset
from fcn_kernels.files.output import check_output, replacing
from fcn_kernels.training.draw import Rows
from fcn_kernels.training.loop import Trial, describe, tar, train

UNTRAINED = {"mean": average, "quality-weighted mean": norm_weighted, "best quality": best_quality}
TRAINED = {"coreset": "CoresetAggregator, trained", "cluster": "ClusterAggregate, trained"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pooling")
    add_arguments(parser)
    parser.description, parser.epilog = __doc__, None
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """TAR of each way for args.seed."""
    unit, quality, identity = labeled_rows(args)
    rest, test, _ = split(unit, quality, identity, args)
    rows, validation, _ = split(rest.unit, rest.quality, rest.identity, args)
    found = {}
    for name, way in UNTRAINED.items():
        found[name] = tar(lambda s, way=way: way(s.unit, s.quality, cu_seqlens=s.cu_seqlens)[0], test, args.far)
    coreset = partial(mean_of_coreset, k=args.k, gamma=args.gamma)
    found["coreset, untrained"] = tar(lambda s: coreset(s.unit, s.quality, s.cu_seqlens)[0], test, args.far)
    for head, name in TRAINED.items():
        args.head = head
        found[name] = _trained(args, rows, validation, test)
    return found


def _trained(args: argparse.Namespace, rows: Rows, validation: Trial, test: Trial) -> float:
    """TAR of the head that was the best in validation."""
    training = make_training(args, rows)
    state = train(training, rows, validation, make_plan(args), None, lambda _: None, lambda _: None)
    training.head.load_state_dict(state["best"])
    return tar(lambda s: describe(training.head.eval(), s)[0], test, args.far)


def run(args: argparse.Namespace) -> str:
    """Measure for every seed; returns the table, which is written, too."""
    check_output(args.out, args.input, args.overwrite)
    seeds = []
    for seed in args.seeds:
        with repeatable(seed):
            seeds.append(measure(argparse.Namespace(**vars(args) | {"seed": seed})))
    values = {name: [found[name] for found in seeds] for name in seeds[0]}
    spread = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
    lines = [(name, f"{statistics.mean(v):.3f} ± {spread[name]:.3f}") for name, v in values.items()]
    text = "\n".join(table(("pooling", f"TAR at FAR {args.far:g}, {len(seeds)} seeds"), lines))
    with replacing(args.out, args.overwrite) as file:
        file.write(text.encode())
    return text


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    args = parse(arguments)
    assert isinstance(args.out, Path)
    return run_to_status("benchmarks.pooling", partial(run, args), "nothing was written")


if __name__ == "__main__":
    raise SystemExit(main())
