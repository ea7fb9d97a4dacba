"""What score alignment is worth on digits that no network has seen, from every source of its bank, over several seeds.

Of the ten digits a network learns six, with AdaFace's head; pairs of images of the other four are compared, by their
cosine and by aligned scores. Banks hold nothing but what the training has: its rows, its class centers, virtual rows
drawn after these, or a small network that has learned what the bank would say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.demos import digits
from fcn_kernels.evaluation.verification import Roc, roc
from fcn_kernels.heads.adaface import AdaFace
from fcn_kernels.heads.alignment import DiscrepancyAlignment
from fcn_kernels.heads.hypersphere import HypersphereSampler
from fcn_kernels.neighbors.scores import align_scores

LEARNED = 6  # of the ten digits
STEPS, BATCH = 120, 40
KINDS = {"clean": 0.0, "half spoiled": 0.5}  # share of the images that are blurred or noisy
FAR = 1e-2
COMPARED = 400  # images, each with every other
VIRTUAL, NEIGHBORS = 1000, 50
RAW, DRAWN = "raw cosine", ("raw cosine", "training rows", "class centers", "virtual rows", "learned network")


class Learned(NamedTuple):
    """A trained network, and what of its training a bank can be made of."""

    net: digits.DigitNet
    rows: Tensor
    """(T, C), embeddings of the training images."""
    labels: Tensor
    """(T,), their digits."""
    centers: Tensor
    """(LEARNED, C), the weight of AdaFace's head."""


def learn(data: digits.Digits) -> Learned:
    """Train a network on these digits, which are numbered from 0 on."""
    net = digits.DigitNet()
    head = AdaFace(net.dim, LEARNED, t_alpha=0.1)
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    for _ in range(STEPS):
        labels = torch.randint(LEARNED, (BATCH,))
        rows = torch.multinomial((data.labels == labels[:, None]).float(), 1)[:, 0]
        embedded = net(spoiled(data.images[rows], 0.5))
        norms = torch.linalg.vector_norm(embedded, dim=1)
        loss = F.cross_entropy(head(embedded / norms[:, None], norms, labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rows = net.eval()(spoiled(data.images, 0.5))
    return Learned(net, rows, data.labels, head.weight.detach())


def spoiled(images: Tensor, share: float) -> Tensor:
    """Photographs of images, of which a share is blurred or noisy."""
    size = images.shape[:1]
    bad = torch.rand(size) < share
    conditions = torch.where(bad, torch.randint(1, len(digits.CONDITIONS), size), digits.CLEAR)
    return digits.photographed(images, conditions, torch.empty(size).uniform_(0.5, 1))


def alignments(learned: Learned) -> dict[str, DiscrepancyAlignment]:
    """Alignment by each source of a bank, by its name."""
    by_rows = DiscrepancyAlignment(learned.rows, learned.labels, k=NEIGHBORS, backend="torch")
    sampler = HypersphereSampler.fit(learned.rows, learned.labels)
    return {
        "training rows": by_rows,
        "class centers": DiscrepancyAlignment.from_prototypes(learned.centers, k=2, backend="torch"),
        "virtual rows": DiscrepancyAlignment.from_generator(sampler, VIRTUAL, k=NEIGHBORS, backend="torch"),
        "learned network": by_rows.distil(learned.rows, learned.labels, steps=100),
        "training rows by mean-std": DiscrepancyAlignment(
            learned.rows, k=NEIGHBORS, method="mean-std", backend="torch"
        ),
        "training rows with k 5": DiscrepancyAlignment(learned.rows, k=5, backend="torch"),
    }


def trial(seed: int) -> dict[str, dict[str, Roc]]:
    """ROC of raw and of aligned scores by their names, for each kind of images."""
    torch.manual_seed(seed)
    _, data = digits.load_digits(0)
    order = torch.randperm(digits.CLASSES)  # which digits are learned is drawn, too
    number = torch.empty_like(order)
    number[order] = torch.arange(digits.CLASSES)
    seen = number[data.labels] < LEARNED
    learned = learn(digits.Digits(data.images[seen], number[data.labels[seen]]))
    ways, found = alignments(learned), {}
    test = digits.Digits(*(part[~seen][:COMPARED] for part in data))
    first, second = torch.triu_indices(len(test.labels), len(test.labels), 1)
    same = test.labels[first] == test.labels[second]
    for kind, share in KINDS.items():
        with torch.no_grad():
            rows = learned.net(spoiled(test.images, share))
            unit = F.normalize(rows)
            scores = {RAW: unit @ unit.T}
            for name, way in ways.items():
                context = way.context(rows)
                scores[name] = align_scores(scores[RAW], context, context, **way.method)
        found[kind] = {name: roc(score[first, second], same) for name, score in scores.items()}
    return found


def table(trials: list[dict[str, dict[str, Roc]]]) -> str:
    """TAR of the raw cosine, mean over the seeds, and by how much each way of alignment changes it."""
    names = [name for name in trials[0][next(iter(KINDS))] if name != RAW]
    changes = {name: {kind: changes_of(trials, kind, name) for kind in KINDS} for name in names}
    lines = [f"{f'TAR at FAR {FAR:.0e}':26}" + "".join(f"{kind:>24}" for kind in KINDS)]
    raw = (sum(one[kind][RAW].tar_at([FAR])[0] for one in trials) / len(trials) for kind in KINDS)
    lines.append(f"{RAW:26}" + "".join(f"{tar:24.3f}" for tar in raw))
    for name, row in changes.items():
        cells = (f"{sum(by) / len(by):+.3f} ({won(by)} of {len(by)} better)" for by in row.values())
        lines.append(f"{name:26}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join([*lines, verdict(changes)])


def changes_of(trials: list[dict[str, dict[str, Roc]]], kind: str, name: str) -> list[float]:
    """Aligned less raw TAR, seed by seed."""
    return [one[kind][name].tar_at([FAR])[0] - one[kind][RAW].tar_at([FAR])[0] for one in trials]


def won(changes: list[float]) -> int:
    """Seeds where it was better."""
    return sum(change > 0 for change in changes)


def verdict(changes: Mapping[str, Mapping[str, list[float]]]) -> str:
    """For each kind of images what helps in every seed, and what harms on average."""
    lines = []
    for kind in next(iter(changes.values())):
        helps = [name for name, row in changes.items() if won(row[kind]) == len(row[kind])]
        harms = [name for name, row in changes.items() if sum(row[kind]) < 0]
        said = f"helps in every seed: {', '.join(helps) or 'none'}; harms on average: {', '.join(harms) or 'none'}"
        lines.append(f"{kind}: {said}")
    return "\n".join(lines)
