"""The pictures of the demos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.demos.sets import Score
from fcn_kernels.extras import require

COLUMNS = 4  # of images in a contact sheet
GAP = 1  # pixels between its images
BASELINES = {"random": "#9a9a9a", "best quality only": "#e08214", "plain farthest point": "#7b3294"}


def check_output(path: Path) -> None:
    """Raise before the work, not after it, where a picture could not be drawn or written."""
    require("matplotlib", "demo")
    if not path.parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {path}")


def figure(width: float, height: float) -> Any:
    """A figure that needs no display and no global state."""
    made = require("matplotlib.figure", "demo").Figure(figsize=(width, height), dpi=130, facecolor="white")
    made.set_layout_engine("constrained", h_pad=0.04, w_pad=0.04)
    return made


def colours(ways: list[str]) -> dict[str, Any]:
    """A colour for each way of picking: the baselines have their own, the coresets go from light to dark."""
    shades = require("matplotlib", "demo").colormaps["YlGnBu"]
    ours = [way for way in ways if way not in BASELINES]
    return BASELINES | {way: shades(0.4 + 0.55 * i / max(len(ours) - 1, 1)) for i, way in enumerate(ours)}


def draw_picks(
    path: Path, images: Tensor, norms: Tensor, picks: Mapping[str, Tensor], scores: Mapping[str, Score]
) -> None:
    """Draw sets (S, N, 8, 8), best quality first, once for each way of picking, with its rows (S, k) framed.

    What the ways are worth on average is charted below.
    """
    ways = [way for way in picks if way != "random"]
    colour = colours(list(picks))
    page = figure(1.75 * len(ways), 2.6 * len(images) + 3.4)
    sheets, charts = page.subfigures(2, 1, height_ratios=[2.6 * len(images), 3.4])
    grid = sheets.subplots(len(images), len(ways), squeeze=False)
    for row, (set_images, set_norms) in enumerate(zip(images, norms, strict=True)):
        order = set_norms.argsort(descending=True)
        for axis, way in zip(grid[row], ways, strict=True):
            picked = [order.tolist().index(pick) for pick in picks[way][row].tolist()]
            contact_sheet(axis, set_images[order], picked, colour[way])
            if row == 0:
                axis.set_title(way.replace(", ", "\n"), color=colour[way], fontsize=10, weight="bold")
    sheets.supylabel("best quality at the top left, worst at the bottom right", fontsize=8, color="#555")
    left, right = charts.subplots(1, 2)
    draw_trade_off(left, scores, colour)
    draw_bars(right, scores, colour)
    page.savefig(path, format="png")


def contact_sheet(axis: Any, images: Tensor, picked: list[int], colour: Any) -> None:
    """Lay images (N, 8, 8) out in rows; frame and number the picked ones in their order, fade the others."""
    rectangle = require("matplotlib.patches", "demo").Rectangle
    rows, side = -(-len(images) // COLUMNS), images.shape[-1] + GAP
    ink = torch.full((rows * COLUMNS,), 0.35)
    ink[picked] = 1
    tiles = torch.zeros(rows * COLUMNS, side, side)
    tiles[: len(images), GAP:, GAP:] = images
    sheet = (tiles * ink[:, None, None]).view(rows, COLUMNS, side, side).transpose(1, 2)
    sheet = F.pad(sheet.reshape(rows * side, COLUMNS * side), (0, GAP, 0, GAP))
    axis.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    for number, place in enumerate(picked, start=1):
        top, left = (side * x + GAP - 0.5 for x in divmod(place, COLUMNS))  # pixel 0 begins at -0.5
        frame = rectangle((left, top), side - GAP, side - GAP, fill=False, edgecolor=colour, linewidth=2.2)
        axis.add_patch(frame)
        axis.text(left + 0.4, top + 0.4, number, color="white", fontsize=6, va="top",
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2})  # fmt: skip
    axis.axis("off")


def draw_trade_off(axis: Any, scores: Mapping[str, Score], colour: Mapping[str, Any]) -> None:
    """Diversity against quality of the picks, the coresets joined in the order of their gammas."""
    ours = [score for way, score in scores.items() if way not in BASELINES]
    axis.plot([s.diversity for s in ours], [s.quality for s in ours], color="#bbbbbb", zorder=1)
    for way, score in scores.items():
        axis.scatter(score.diversity, score.quality, color=colour[way], s=70, zorder=2)
        above = 9 if score.quality > 1 else -15  # points, away from the line of the coresets
        place = {"xytext": (0, above), "ha": "center"} if way in BASELINES else {"xytext": (7, 4)}
        axis.annotate(way.removeprefix("coreset, "), (score.diversity, score.quality), **place,
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axis.set(xlabel="diversity: mean cosine distance between picks", ylabel="quality: norm over mean norm")
    axis.margins(0.3, 0.2)
    axis.spines[["top", "right"]].set_visible(False)


def draw_bars(axis: Any, scores: Mapping[str, Score], colour: Mapping[str, Any]) -> None:
    """How many of the picks show a clear digit that no other pick shows."""
    values = [score.clear_different for score in scores.values()]
    bars = axis.barh(list(scores), values, color=[colour[way] for way in scores])
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="clear and different digits among the picks, mean per set")
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)
