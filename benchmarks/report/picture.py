"""README's picture of how the selection works, drawn from a call.

python -m benchmarks.report.picture OUT.png
"""

import math
import sys

import torch

from fcn_kernels import coreset_select

K = 3


def photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows in the plane, in three crowds and some stragglers, with a quality each."""
    generator = torch.Generator().manual_seed(4)
    crowds = torch.tensor([20.0, 28.0, 115.0, 230.0]).repeat_interleave(7)
    degrees = torch.cat((crowds + 12 * torch.randn(28, generator=generator), 360 * torch.rand(4, generator=generator)))
    angles = degrees * (math.pi / 180)
    quality = 0.3 + 0.7 * torch.rand(len(angles), generator=generator)
    return torch.stack((angles.cos(), angles.sin()), 1), quality


def draw(path: str) -> None:
    """One panel a pick: how far each row is from the picks so far, and which one that makes the next."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, quality = photos()
    gamma = 0.5
    picks = coreset_select(rows, K, quality, gamma, normalized=True).indices.tolist()
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, K)
    for step, panel in enumerate(panels):
        logits = quality
        if step:
            cosine = rows @ rows[picks[:step]].T
            logits = quality**gamma * (1 - cosine.amax(1))
        x, y = (rows * (1 + 0.25 * quality[:, None])).T.tolist()
        seen = panel.scatter(x, y, s=(160 * quality).tolist(), c=logits.tolist(), cmap=colormaps["viridis"])
        for number, pick in enumerate(picks[: step + 1]):
            colour = "crimson" if number == step else "black"
            panel.scatter(x[pick], y[pick], s=340, facecolors="none", edgecolors=colour, linewidths=2)
            panel.annotate(str(number + 1), (0.72 * x[pick], 0.72 * y[pick]), color=colour, ha="center", va="center")
        label = "quality" if step == 0 else "weighted distance to the nearest pick"
        figure.colorbar(seen, ax=panel, orientation="horizontal", label=label, shrink=0.85)
        title = "1: the best quality" if step == 0 else f"{step + 1}: the largest weighted distance"
        panel.set_title(title, fontsize=11)
        panel.set(aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        panel.axis("off")
    figure.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.report.picture OUT.png")
    draw(sys.argv[1])
