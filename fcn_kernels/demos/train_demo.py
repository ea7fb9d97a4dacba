"""`python -m fcn_kernels train-demo`: train backbone and aggregation end to end on real digits, and verify.

Closed-set verification: the identities are the ten digits, the question is whether two templates show the same one.
The networks learn from 1,200 images. Of the other 597, one half makes the templates of the gallery and the other
those of the probes, so that the networks have seen none of them and no pair of templates shares one. All ways of
pooling start from the same backbone and AdaFace head and see the same templates in the same order, with the same
loss and optimizer: nothing differs but the pooling. Last, on digits that a network has not learned, scores are aligned
by banks of every source: see aligned.py.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_kernels.cli.arguments import check_device, seed
from fcn_kernels.demos import aligned, digits, plots, repeatable
from fcn_kernels.demos.poolings import CLUSTERS, OURS, Pooling, poolings, split_norm
from fcn_kernels.demos.templates import Templates, make_templates
from fcn_kernels.evaluation.verification import FARS, Roc, roc
from fcn_kernels.extras import require
from fcn_kernels.files.output import check_output
from fcn_kernels.heads.adaface import AdaFace

TRAIN_IMAGES = 1200
BATCH = 20  # as in the paper
CORRUPTED = {"clean": 0.0, "corrupted": 0.5}  # share of the media of a test template that are blurred or noisy
TEMPLATES_DRAWN = 5


class TemplateNet(nn.Module):
    """Backbone and pooling: templates in, unit descriptors (B, C) and the norms (B,) that they had out."""

    pooling: Any

    def __init__(self, backbone: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling

    def forward(self, templates: Templates) -> tuple[Tensor, Tensor]:
        """Describe each template."""
        features, quality = split_norm(self.backbone(templates.images))
        descriptor, norm, *_ = self.pooling(features, quality, cu_seqlens=templates.cu_seqlens)
        return descriptor, norm


class Trained(NamedTuple):
    """A network and the losses of its training steps."""

    net: TemplateNet
    losses: list[float]


class Trial(NamedTuple):
    """Test templates of one kind: those of the gallery, and the probes that are compared with every one of them."""

    gallery: Templates
    probes: Templates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("train-demo"), help="folder for the pictures (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace pictures that are there")
    add("--seed", type=seed, default=0, help="the same seed gives the same figures (default: %(default)s)")
    add("--k", type=int, default=3, help="size of a coreset (default: %(default)s)")
    add("--gamma", type=float, default=0.01, help="gamma before training (default: %(default)s)")
    add("--steps", type=int, default=800, help="training steps for each way of pooling (default: %(default)s)")
    add("--templates", type=int, default=600, help="test templates on each side (default: %(default)s)")
    add("--seeds", type=int, default=3, help="trials of aligned scores, 0 for none (default: %(default)s)")
    add("--device", default="cpu", help="where the networks run (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, verify, print the tables and write the pictures."""
    if args.steps < 10 or args.templates < digits.CLASSES:
        got = f"{args.steps} and {args.templates}"
        raise ValueError(f"expected --steps of at least 10 and --templates of at least {digits.CLASSES}, got {got}")
    plots.check_output(args.out)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {args.out}")
    check_device(args.device)
    args.out.mkdir(exist_ok=True)
    for picture in pictures(args):
        check_output(picture, (), args.overwrite)
    with repeatable(args.seed):
        demonstrate(args)
    return 0


def demonstrate(args: argparse.Namespace) -> None:
    """Do what `run` promises, once the options are known to be good."""
    train_data, held_out = digits.load_digits(TRAIN_IMAGES)
    trials = make_trials(held_out, args.templates)
    trained = train_all(train_data, args)
    print(
        f"Do two templates show the same digit? {TRAIN_IMAGES} images to learn from, {len(held_out.labels)} held out.\n"
    )
    print(training_table(trained, held_out, args.device))
    print(f"gamma of {OURS}: {args.gamma:g} -> {trained[OURS].net.pooling.gamma.item():.4f}")
    rocs = {
        kind: {name: verify(way.net, trial, args.device) for name, way in trained.items()}
        for kind, trial in trials.items()
    }
    for kind, curves in rocs.items():
        print(f"\n{kind} templates, {args.templates} probes x {args.templates} of the gallery")
        print("\n".join([verification_table(curves), *(standing(curves, name) for name in (OURS, CLUSTERS))]))
    print("\n*: best; -: there are too few pairs to measure this FAR")
    plots.draw_rocs(args.out / "roc.png", rocs)
    drawn = {kind: picks_of(trained[OURS].net, trial.probes, args.device) for kind, trial in trials.items()}
    plots.draw_sheets(args.out / "picks.png", drawn)
    frames = {kind: frames_of(trained[CLUSTERS].net, trial.probes, args.device) for kind, trial in trials.items()}
    plots.draw_frames(args.out / "clusters.png", frames)
    if args.seeds > 0:
        align(args)
    print("pictures: " + ", ".join(map(str, pictures(args))))


def pictures(args: argparse.Namespace) -> list[Path]:
    """What a run draws."""
    names = ["roc", "picks", "clusters"] + ["aligned"] * (args.seeds > 0)
    return [args.out / f"{name}.png" for name in names]


def align(args: argparse.Namespace) -> None:
    """Compare raw and aligned scores of images of digits that a network has not learned."""
    trials = [aligned.trial((args.seed + number) % 2**64) for number in range(args.seeds)]
    digits_left = digits.CLASSES - aligned.LEARNED
    print(f"\nAligned scores of two images, of {digits_left} digits that no network learned; seeds: {args.seeds}")
    print(aligned.table(trials) + "\n")
    curves = {kind: {name: found[name] for name in aligned.DRAWN} for kind, found in trials[0].items()}
    plots.draw_rocs(args.out / "aligned.png", curves, "images")


def make_trials(held_out: digits.Digits, count: int) -> dict[str, Trial]:
    """`count` templates in the gallery and as many probes, from two halves of the images, for each kind of test."""
    half = len(held_out.labels) // 2
    sides = digits.Digits(*(part[:half] for part in held_out)), digits.Digits(*(part[half:] for part in held_out))
    labels = torch.arange(count) % digits.CLASSES
    return {
        kind: Trial(*(make_templates(side, labels, torch.full((count,), share)) for side in sides))
        for kind, share in CORRUPTED.items()
    }


def train_all(data: digits.Digits, args: argparse.Namespace) -> dict[str, Trained]:
    """Train a network for each way of pooling, from the same start and on the same templates."""
    labels = torch.randint(digits.CLASSES, (args.steps, BATCH))
    templates = [make_templates(data, batch, corrupted=torch.rand(BATCH)) for batch in labels]
    backbone = digits.DigitNet()
    head = AdaFace(backbone.dim, digits.CLASSES, t_alpha=0.1)  # norms change fast in a run this short
    ways = poolings(backbone.dim, args.k, args.gamma)
    trained = {}
    with require("tqdm", "demo").tqdm(total=args.steps * len(ways), unit="step") as bar:
        for name, pooling in ways.items():
            bar.set_description(f"training: {name}")
            net = TemplateNet(copy.deepcopy(backbone), pooling)
            own_head = copy.deepcopy(head).to(args.device)
            trained[name] = train(net.to(args.device), own_head, templates, args.device, bar)
    return trained


def train(net: TemplateNet, head: AdaFace, templates: Sequence[Templates], device: str, bar: Any) -> Trained:
    """Train backbone, pooling and AdaFace head together, one step for each batch of templates."""
    gamma = [parameter for name, parameter in net.named_parameters() if name.endswith("gamma")]
    rest = [parameter for name, parameter in net.named_parameters() if not name.endswith("gamma")]
    rest += head.parameters()
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 1e-3}, {"params": gamma, "weight_decay": 0.0}])
    # gamma is one number of the order of 1, the weights are small and many
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[2e-3, 2e-2], total_steps=len(templates))
    losses = []
    for batch in templates:
        batch = batch.to(device)
        loss = F.cross_entropy(head(*net(batch), batch.labels), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rest + gamma, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.update()
    return Trained(net.eval(), losses)


@torch.no_grad()
def verify(net: TemplateNet, trial: Trial, device: str) -> Roc:
    """Compare every probe with every template of the gallery."""
    gallery, probes = (net(side.to(device))[0].cpu() for side in trial)
    genuine = trial.probes.labels[:, None] == trial.gallery.labels
    return roc((probes @ gallery.T).flatten(), genuine.flatten())


@torch.no_grad()
def outranked(net: TemplateNet, images: Tensor, condition: int, device: str) -> float:
    """Share of the pairs of a clear image and one in `condition` where the clear one has the larger norm."""
    size = (len(images),)
    photographs = (
        digits.photographed(images, torch.full(size, each), severity=torch.full(size, 0.75))
        for each in (digits.CLEAR, condition)
    )
    clear, bad = (net.backbone(photograph.to(device)).norm(dim=1) for photograph in photographs)
    return float((clear[:, None] > bad).float().mean())


@torch.no_grad()
def picks_of(net: TemplateNet, templates: Templates, device: str) -> list[plots.Sheet]:
    """The first templates of a dozen images or more, with what the coreset takes from them."""
    features, quality = split_norm(net.backbone(templates.images.to(device)))
    coreset = net.pooling(features, quality, cu_seqlens=templates.cu_seqlens.to(device)).coreset
    return [
        plots.Sheet(templates.images[rows], quality[rows].cpu(), coreset.indices[i, : coreset.counts[i]].cpu())
        for i, rows in _drawn(templates).items()
    ]


@torch.no_grad()
def frames_of(net: TemplateNet, templates: Templates, device: str) -> list[plots.Frames]:
    """The same templates, with each image's share of the descriptor and the center that has most of it."""
    frames = []
    for rows in _drawn(templates).values():
        features, quality = split_norm(net.backbone(templates.images[rows].to(device)))
        weights = net.pooling.head(features, quality=quality, weights=True).weights
        shares, _ = net.pooling.head.shares((features * quality[:, None])[None], None)
        frames.append(plots.Frames(templates.images[rows], weights.cpu(), shares[0].argmax(-1).cpu()))
    return frames


def _drawn(templates: Templates) -> dict[int, slice]:
    """The rows of the first templates of a dozen images or more, by number."""
    ends = templates.cu_seqlens.tolist()
    long = [i for i in range(len(templates.labels)) if ends[i + 1] - ends[i] >= 12][:TEMPLATES_DRAWN]
    return {i: slice(ends[i], ends[i + 1]) for i in long}


def training_table(trained: Mapping[str, Trained], held_out: digits.Digits, device: str) -> str:
    """One line per way of pooling: how the loss fell, and whether its norms tell good images from bad."""
    lines = [f"{'pooling':16}  {'loss, first and last tenth':>27}  clear above blurred  clear above noisy"]
    for name, way in trained.items():
        tenth = len(way.losses) // 10
        first, last = (sum(part) / tenth for part in (way.losses[:tenth], way.losses[-tenth:]))
        blurred, noisy = (outranked(way.net, held_out.images, bad, device) for bad in (digits.BLURRED, digits.NOISY))
        lines.append(f"{name:16}  {first:18.2f} -> {last:5.2f}  {blurred:19.1%}  {noisy:17.1%}")
    return "\n".join(lines)


def verification_table(curves: Mapping[str, Roc]) -> str:
    """One line per way of pooling, one column per FAR with the false accepts it allows; * marks the best."""
    negatives = curves[OURS].negatives
    tars = {name: curve.tar_at(FARS) for name, curve in curves.items()}
    best = [max(column) for column in zip(*tars.values(), strict=True)]
    lines = [
        f"{'TAR at FAR':16}" + "".join(f"{far:>8.0e} " for far in FARS),
        f"{'false accepts':16}" + "".join(f"{math.floor(far * negatives + 1e-6):>8,} " for far in FARS),
    ]
    for name, row in tars.items():
        marked = (f"{tar:8.3f}{'*' if tar == top else ' '}" for tar, top in zip(row, best, strict=True))
        lines.append(f"{name:16}" + "".join(marked).replace("nan", "  -"))
    return "\n".join(line.rstrip() for line in lines)


def standing(curves: Mapping[str, Roc], ours: str) -> str:
    """At which FARs a way beats every other way of pooling, and at which one of them is as good or better."""
    rivals = [curve.tar_at(FARS) for name, curve in curves.items() if name != ours]
    verdicts: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for far, tar, others in zip(FARS, curves[ours].tar_at(FARS), zip(*rivals, strict=True), strict=True):
        if not math.isnan(tar):
            verdict = "ahead" if tar > max(others) else "level" if tar == max(others) else "behind"
            verdicts[verdict].append(f"{far:.0e}")
    return f"{ours}: " + ", ".join(f"{verdict} at {' '.join(fars) or 'none'}" for verdict, fars in verdicts.items())
