"""`python -m fcn_kernels train`: a head for your embeddings, from a file of them with identities."""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fcn_kernels.cli.arguments import (
    EXIT_STATUS,
    add_max_unpacked,
    at_least_one,
    chance,
    check_device,
    finite,
    positive,
    run_to_status,
    seed,
)
from fcn_kernels.demos import repeatable
from fcn_kernels.extras import require
from fcn_kernels.files.aggregate import mean_of_coreset
from fcn_kernels.files.embeddings import Embeddings, Keys, read
from fcn_kernels.files.formats import InputError, Scratch
from fcn_kernels.files.output import check_output, replacing
from fcn_kernels.files.resume import check_state, load_state, save_state, state_path, what_was_kept
from fcn_kernels.heads.adaface import AdaFace
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.heads.facecoresetnet import CoresetAggregator
from fcn_kernels.sets import row_norms, usable
from fcn_kernels.training.draw import Recipe, Rows, draw, group
from fcn_kernels.training.loop import Head, Plan, Training, Trial, tar, train

EXTRA = "tool,demo"  # tqdm and formats; matplotlib
T_ALPHA = 0.1  # share of a batch in AdaFace's running norms: runs are short
CODE_WIDTH = 64  # of the code of a quality
MARGINS = {"adaface": 0.8, "cosine": 0.0}
ABOUT = f"""
Each step draws sets of 1 to --longest rows of one identity, with replacement, gives them to the head, and classifies
its descriptors with a margin softmax over the identities: AdaFace, or the same without a margin (cosine). The head is
a CoresetAggregator (--head coreset: --k, --gamma, --dropout) or a ClusterAggregate without styles (--head cluster:
--clusters, --depth), which knows of a row its quality.
A row is made a unit row of quality q, INPUT's quality or the row's norm, as `aggregate` does.
  --corrupt P     of the rows, in training and validation, a share P becomes (1 - s) u + s n, made unit, with n a random
                  direction and s uniform in [1/2, 1); its quality becomes (1 - s) q
  --duplicates P  a share P repeats the row before it, nearly, as frames of a clip do

Rows are held out for validation: those of a share of the identities, or a share of each identity's rows
(--hold-out rows). Half of them make the sets of the gallery and half the probes; all are compared with all. The head
with the best TAR is kept; training ends after --steps, or when --patience validations have brought nothing better.

OUT is the head's state dict, for `aggregate --checkpoint OUT`, given the same --num-heads, and --k of a coreset.
OUT.state is there
while the run is not finished, and --resume goes on from it, with the numbers of a run that was not interrupted. Both
appear whole, or not at all. OUT with the suffix .png shows loss, TAR and a coreset's gamma.

The same seed gives the same numbers on one machine; a CPU computes with one thread. Under torchrun each process takes a
share of every batch:
  torchrun --nproc-per-node 2 -m fcn_kernels train ...

{EXIT_STATUS}
"""
# What a run's numbers follow from: with another of these, --resume would go on with a different run.
FIXED = (
    "features", "ids", "quality", "head", "k", "clusters", "depth", "num_heads", "gamma", "dropout", "loss", "longest",
    "corrupt", "duplicates", "hold_out", "share", "validation_sets", "far", "steps", "batch", "rate", "every",
    "patience", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    add("input", type=Path, nargs="+", metavar="INPUT", help="a file of embeddings, as `aggregate` reads it")
    add("--ids", metavar="KEY", required=True, help="name of the column of identities")
    add("--out", type=Path, required=True, metavar="OUT", help="state dict of the trained head, .pt")
    add("--overwrite", action="store_true", help="replace OUT and its picture if they are there")
    add("--resume", action="store_true", help="go on from OUT.state")
    add("--features", metavar="KEY", default=Keys().features, help="name of that column (default: %(default)s)")
    add("--quality", metavar="KEY", help="name of that column (default: quality if there is one, else the norms)")
    add("--head", choices=["coreset", "cluster"], default="coreset", help="what is trained (default: %(default)s)")
    add("--k", type=at_least_one, default=3, help="picks of a set (default: %(default)s)")
    add("--clusters", type=at_least_one, default=4, help="centers (default: %(default)s)")
    add("--depth", type=at_least_one, default=2, help="blocks before the centers (default: %(default)s)")
    add("--num-heads", type=at_least_one, default=8, help="of the head's attentions (default: %(default)s)")
    add("--gamma", type=finite, default=1.0, help="gamma before training (default: %(default)s)")
    add("--dropout", type=float, default=0.1, help="in the head's attentions (default: %(default)s)")
    add("--loss", choices=list(MARGINS), default="adaface", help="default: %(default)s")
    add("--longest", type=at_least_one, default=20, help="most rows in a set (default: %(default)s)")
    add("--corrupt", type=chance, default=0.0, metavar="P", help="chance of a row (default: %(default)s)")
    add("--duplicates", type=chance, default=0.0, metavar="P", help="chance of a row (default: %(default)s)")
    add("--hold-out", choices=["identities", "rows"], default="identities", help="default: %(default)s")
    add("--share", type=chance, default=0.2, help="of what is held out (default: %(default)s)")
    add("--validation-sets", type=at_least_one, default=200, help="on each side (default: %(default)s)")
    add("--far", type=float, default=1e-2, help="false accept rate of the TAR (default: %(default)s)")
    add("--steps", type=at_least_one, default=1000, help="at most (default: %(default)s)")
    add("--batch", type=at_least_one, default=32, help="sets a step (default: %(default)s)")
    add("--rate", type=positive, default=1e-3, help="highest learning rate (default: %(default)s)")
    add("--every", type=at_least_one, default=50, help="steps between validations (default: %(default)s)")
    add("--patience", type=at_least_one, default=6, help="validations without a better TAR (default: %(default)s)")
    add("--seed", type=seed, default=0, help="default: %(default)s")
    add("--device", default="cpu", help="default: %(default)s; under torchrun, cuda is the process's own")
    add_max_unpacked(parser)


def run(args: argparse.Namespace) -> int:
    """Train and write; returns the exit status that the help promises."""

    def work() -> str:
        # the last digits of a sum depend on the number of threads, and a second one has little to do here
        with repeatable(args.seed), _processes(args):
            summary = run_checked(args)
            return summary if _first() else ""

    return run_to_status("train", work, partial(what_was_kept, args.out))


def run_checked(args: argparse.Namespace) -> str:
    """What :func:`run` does, with errors raised; returns a summary."""
    _check_paths(args)
    if dist.is_initialized() and args.batch < dist.get_world_size():
        raise InputError(f"--batch {args.batch}: expected a set at least for each of {dist.get_world_size()} processes")
    unit, quality, identity = labeled_rows(args)
    rows, trial, held_out = split(unit, quality, identity, args)
    training = make_training(args, rows)
    trial = Trial(*(side.to(args.device) for side in trial))
    _check_far(trial, args.far)
    untrained = tar(
        lambda s: mean_of_coreset(s.unit, s.quality, s.cu_seqlens, k=args.k, gamma=args.gamma)[0], trial, args.far
    )
    fixed = {name: getattr(args, name) for name in FIXED} | {
        "rows": list(unit.shape),
        "sum of the rows": unit.double().sum().item(),
        "sum of the qualities": quality.double().sum().item(),
        "division in identities": zlib.crc32(identity.numpy().tobytes()),
    }
    state = load_state(args.out, fixed) if args.resume else None

    def save(state: dict[str, Any]) -> None:
        save_state(args.out, state, fixed)

    done = state["step"] if state else 0
    with require("tqdm", EXTRA).tqdm(total=args.steps, initial=done, desc="training", disable=not _first()) as bar:

        def show(state: dict[str, Any]) -> None:
            bar.set_postfix(loss=f"{state['losses'][-1]:.3f}", TAR=f"{state['tars'][-1][1]:.3f}", refresh=False)
            bar.update()

        state = train(training, rows, trial, make_plan(args), state, save, show)
    if _first():
        with replacing(args.out, args.overwrite) as file:
            torch.save(state["best"], file)
        draw_curves(args.out.with_suffix(".png"), state, untrained, args.far, args.overwrite)
        state_path(args.out).unlink(missing_ok=True)
    return _summary(args, state, untrained, f"{len(identity.unique())} identities, {held_out}")


def labeled_rows(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows (T, C), quality (T,) and identity (T,), from 0, of the input."""
    keys = Keys(args.features, args.ids, args.quality)
    embeddings = read(args.input, keys, Scratch(args.out.absolute().parent, args.max_unpacked))
    _, identity = require("numpy", EXTRA).unique(embeddings.ids, return_inverse=True)
    return *unit_rows(embeddings), torch.from_numpy(identity).long()


def make_training(args: argparse.Namespace, rows: Rows) -> Training:
    """The head that is asked for and a classifier, on their device, before the first step."""
    width = rows.unit.shape[1]
    head = _head(args, width)
    classifier = AdaFace(width, len(rows.offsets) - 1, m=MARGINS[args.loss], t_alpha=T_ALPHA)
    start_from_rows(head, classifier, rows)
    return Training(head, classifier).to(args.device)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the numbers of a run follow from."""
    recipe = Recipe(args.longest, args.corrupt, args.duplicates)
    return Plan(args.steps, args.batch, args.rate, args.every, args.patience, args.far, args.seed, recipe)


def _head(args: argparse.Namespace, width: int) -> Head:
    if args.head == "coreset":
        return CoresetAggregator(width, args.k, args.num_heads, args.dropout, args.gamma)
    if CODE_WIDTH % args.num_heads:
        raise InputError(f"--num-heads {args.num_heads}: expected a divisor of {CODE_WIDTH} with --head cluster")
    return ClusterAggregate(
        width, args.clusters, args.depth, style_dim=0, norm_dim=CODE_WIDTH, num_heads=args.num_heads
    )


def start_from_rows(head: Head, classifier: AdaFace, rows: Rows) -> None:
    """Start as a coreset's mean (centers start as a mean of all rows), among classes that lie where identities do.

    A cross_norm of weight 0 adds nothing to the picks (as the last norm of a residual block in Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017, section 5.1). Classes at random places would turn embeddings away from what
    the backbone has learned: on 32 identities of faces TAR fell from 0.63 to 0.50 in 100 steps.
    """
    identities, width = len(rows.offsets) - 1, rows.unit.shape[1]
    sums = torch.zeros(identities, width).index_add_(0, rows.identity, rows.unit * rows.quality[:, None])
    with torch.no_grad():
        if isinstance(head, CoresetAggregator):
            head.cross_norm.weight.zero_()
        lengths = row_norms(sums).clamp(min=torch.finfo(sums.dtype).tiny)
        classifier.weight.copy_(sums / lengths[:, None] * width**0.5)  # as long as AdaFace's own are


def unit_rows(embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """Unit rows (T, C) and quality (T,), float32. Raises InputError at the first row that cannot be used."""
    unit = embeddings.features.float()
    norms = row_norms(unit)
    quality = norms if embeddings.quality is None else embeddings.quality.float()
    for what, values in (("the norm of its features", norms), ("its quality", quality)):
        bad = ~usable(norms, values)
        if bad.any():
            at = int(bad.int().argmax())
            value = torch.linalg.vector_norm(unit[at]) if values is norms else values[at]
            raise embeddings.bad_row(at, f"{what} is {float(value):g}, expected finite and above 0")
    return unit / norms[:, None], quality


def split(unit: Tensor, quality: Tensor, identity: Tensor, args: argparse.Namespace) -> tuple[Rows, Trial, str]:
    """Rows to learn from, sets to verify, and in words what was held out; by torch's global generator."""
    counts = torch.bincount(identity)
    usable = (counts >= (2 if args.hold_out == "identities" else 3)).nonzero()[:, 0]
    many = len(usable) if args.hold_out == "rows" else max(2, round(args.share * len(usable)))
    if not 2 <= many <= len(usable) or (args.hold_out == "identities" and len(counts) - many < 2):
        raise InputError(
            f"expected identities enough to hold some out, with 2 rows or more each (3 with --hold-out rows), and at "
            f"least 2 to learn from, got {len(counts)}, of which {len(usable)} have as many rows"
        )
    chosen = usable[torch.randperm(len(usable))[:many]].sort().values
    sides = torch.full_like(identity, -1)  # -1 learn from, 0 gallery, 1 probes
    for one in chosen.tolist():
        own = (identity == one).nonzero()[:, 0]
        own = own[torch.randperm(len(own))]
        if args.hold_out == "rows":
            own = own[: min(max(2, round(args.share * len(own))), len(own) - 1)]
        sides[own] = torch.arange(len(own)) % 2
    learned = identity[sides == -1].unique()
    rows = group(
        unit[sides == -1], quality[sides == -1], torch.searchsorted(learned, identity[sides == -1]), len(learned)
    )
    labels = torch.arange(args.validation_sets) % many
    recipe = Recipe(args.longest, args.corrupt, args.duplicates)
    trial = Trial(
        *(
            draw(group(unit[on], quality[on], torch.searchsorted(chosen, identity[on]), many), labels, recipe)
            for on in (sides == 0, sides == 1)
        )
    )
    return rows, trial, f"{int((sides >= 0).sum())} rows of {many} identities held out"


def draw_curves(path: Path, state: dict[str, Any], untrained: float, far: float, overwrite: bool) -> None:
    """Loss, TAR and gamma over the steps, as a picture."""
    page = require("matplotlib.figure", EXTRA).Figure(figsize=(9, 2.8), dpi=130, facecolor="white")
    page.set_layout_engine("constrained")
    loss, accepted, *exponent = page.subplots(1, 3 if state["gammas"] else 2)
    steps, tars = zip(*state["tars"], strict=True)
    loss.plot(range(1, len(state["losses"]) + 1), state["losses"], color="#225ea8", linewidth=0.8)
    loss.set(title="loss", xlabel="step")
    accepted.plot(steps, tars, color="#225ea8", marker=".", label="head")
    accepted.axhline(untrained, color="#9a9a9a", label="coreset's mean")
    accepted.set(title=f"validation TAR at FAR {far:g}", xlabel="step")
    accepted.legend(frameon=False)
    for axes in exponent:
        axes.plot(steps, state["gammas"], color="#225ea8", marker=".")
        axes.set(title="gamma", xlabel="step")
    with replacing(path, overwrite) as file:
        page.savefig(file, format="png")


def _summary(args: argparse.Namespace, state: dict[str, Any], untrained: float, data: str) -> str:
    losses, best = state["losses"], max(value for _, value in state["tars"])
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    at = next(step for step, value in state["tars"] if value == best)
    gamma, picks = "", ""
    if args.head == "coreset":
        kept = state["best"]["gamma"].item()
        gamma = f"gamma: {args.gamma:g} -> {state['gammas'][-1]:.4f}, {kept:.4f} in the best head\n"
        picks = f"--k {args.k} "
    return (
        f"{args.out}: {data}\n"
        f"loss, first and last tenth of {state['step']} steps: {first:.4f} -> {last:.4f}\n"
        f"{gamma}"
        f"validation TAR at FAR {args.far:g}: coreset's mean {untrained:.4f}, head before training "
        f"{state['tars'][0][1]:.4f}, best {best:.4f} after step {at}\n"
        f"use it: python -m fcn_kernels aggregate INPUT --checkpoint {args.out} {picks}"
        f"--num-heads {args.num_heads} --out OUTPUT"
    )


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it, or would be lost."""
    out: Path = args.out
    for package in ("tqdm", "numpy", "matplotlib.figure"):
        require(package, EXTRA)
    if out.suffix != ".pt":
        raise InputError(f"{out}: expected a file that ends in .pt")
    for path in (out, out.with_suffix(".png")):
        check_output(path, args.input, args.overwrite)
    check_device(args.device)
    check_state(out, args.input, args.resume or args.overwrite)


def _check_far(trial: Trial, far: float) -> None:
    negatives = int((trial.probes.labels[:, None] != trial.gallery.labels).sum())
    if not 1 <= far * negatives <= negatives:
        raise InputError(
            f"--far {far:g}: expected at least {1 / max(negatives, 1):.1e}, one of {negatives} pairs, and at most 1"
        )


@contextmanager
def _processes(args: argparse.Namespace) -> Iterator[None]:
    """The process group that torchrun asks for, and the process's own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
