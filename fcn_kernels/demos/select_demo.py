"""`python -m fcn_kernels demo`: coresets of real handwritten digits, in a table and in a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fcn_kernels.cli.arguments import at_least_one, check_device, seed
from fcn_kernels.demos import digits, plots, repeatable
from fcn_kernels.demos.sets import SIZE, Score, make_sets, outranked, pick_all, score
from fcn_kernels.extras import require
from fcn_kernels.files.output import check_output

TRAIN_IMAGES = 1200
SETS_DRAWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("coresets.png"), help="picture to write (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the picture if it is there")
    add("--seed", type=seed, default=0, help="the same seed gives the same figures (default: %(default)s)")
    add("--k", type=int, default=5, help="picks per set (default: %(default)s)")
    add("--gammas", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0], help="(default: 0 1 2 4)")
    add("--sets", type=int, default=200, help=f"sets; {SETS_DRAWN} are drawn (default: %(default)s)")
    add("--steps", type=at_least_one, default=1000, help="steps of training (default: %(default)s)")
    add("--device", default="cpu", help="where network and selection run (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train the network, pick, print the table and write the picture."""
    if not 2 <= args.k <= SIZE:
        raise ValueError(f"--k: expected 2 to {SIZE}, the size of a set, got {args.k}")
    if args.sets < 1:
        raise ValueError(f"--sets: expected at least 1, got {args.sets}")
    plots.check_output(args.out)
    if args.out.is_dir():
        raise ValueError(f"--out: expected a file, got the folder {args.out}")
    check_output(args.out, (), args.overwrite)
    check_device(args.device)
    with repeatable(args.seed):
        demonstrate(args)
    return 0


def demonstrate(args: argparse.Namespace) -> None:
    """Do what `run` promises, once the options are known to be good."""
    train_data, held_out = digits.load_digits(TRAIN_IMAGES)
    net = train(train_data, args.steps, args.device)
    sets = make_sets(held_out, args.sets)
    with torch.no_grad():
        features = net(sets.images.to(args.device))
    picks = pick_all(features, args.k, args.gammas)
    features = features.cpu()
    norms = features.norm(dim=-1)
    scores = {way: score(features, sets, rows) for way, rows in picks.items()}
    print(
        f"{args.sets} sets of {SIZE} images that the network has not seen, {args.k} picks from each.\n"
        f"A clear image has a larger norm than a blurred one of its set in "
        f"{outranked(norms, sets, digits.BLURRED):.1%} of pairs, "
        f"than a noisy one in {outranked(norms, sets, digits.NOISY):.1%}.\n\n{table(scores)}"
    )
    drawn = {way: rows[:SETS_DRAWN] for way, rows in picks.items()}
    plots.draw_picks(args.out, sets.images[:SETS_DRAWN], norms[:SETS_DRAWN], drawn, scores)
    print(f"\npicture: {args.out}")


def train(data: digits.Digits, steps: int, device: str) -> digits.DigitNet:
    """Train an embedding whose norm says how much can be known of what the image shows.

    Cross-entropy of the logits x . w_c with unit class vectors w_c makes the norm |x| an inverse temperature:
    a long embedding pays where its direction is right and costs where it is wrong. The label of an image of
    severity t is worth 1 - t, the rest is spread over all classes, which pulls bad images towards the centre.
    """
    net = digits.DigitNet().to(device)
    classes = nn.Parameter(torch.randn(digits.CLASSES, net.dim).to(device))
    optimizer = torch.optim.AdamW([*net.parameters(), classes], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    bar = require("tqdm", "demo").trange(steps, desc="training", unit="step")
    for _ in bar:
        rows = torch.randint(len(data.labels), (128,))
        conditions, severity = torch.randint(len(digits.CONDITIONS), rows.shape), torch.rand(rows.shape)
        images = digits.photographed(data.images[rows], conditions, severity)
        doubt = (severity * (conditions != digits.CLEAR))[:, None]
        targets = F.one_hot(data.labels[rows], digits.CLASSES) * (1 - doubt) + doubt / digits.CLASSES
        loss = F.cross_entropy(net(images.to(device)) @ F.normalize(classes).T, targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return net.eval()


def table(scores: Mapping[str, Score]) -> str:
    """One line per way of picking, one column per figure."""
    width = max(map(len, scores))
    head = f"{'picks':{width}}  quality  diversity  clear  different  clear and different"
    lines = [
        f"{way:{width}}  {s.quality:7.2f}  {s.diversity:9.3f}  {s.clear:5.2f}  {s.different:9.2f}"
        f"  {s.clear_different:19.2f}"
        for way, s in scores.items()
    ]
    return "\n".join([head, *lines])
