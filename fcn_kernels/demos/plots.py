"""The pictures of the demos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.demos.sets import Score
from fcn_kernels.evaluation.verification import Roc
from fcn_kernels.extras import require

COLUMNS = 4  # of images in a contact sheet
READING_ORDER = "best quality at the top left, worst at the bottom right"
GAP = 1  # pixels between its images
OURS = "#225ea8"
ROC_COLOURS = ("#9a9a9a", "#7b3294", "#e08214", "#1b7837", OURS)
CENTERS = ("#1b7837", "#e08214", "#7b3294", OURS)
BASELINES = {"random": "#9a9a9a", "best quality only": "#e08214", "plain farthest point": "#7b3294"}


class Sheet(NamedTuple):
    """A set to draw: images (N, 8, 8), quality (N,), and the picked rows (k,) in their order."""

    images: Tensor
    quality: Tensor
    picks: Tensor


class Frames(NamedTuple):
    """A set to draw: images (N, 8, 8), their weights (N,) in the descriptor, and the numbers (N,) of their centers."""

    images: Tensor
    weights: Tensor
    centers: Tensor


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
        for axis, way in zip(grid[row], ways, strict=True):
            contact_sheet(axis, Sheet(set_images, set_norms, picks[way][row]), colour[way])
            if row == 0:
                axis.set_title(way.replace(", ", "\n"), color=colour[way], fontsize=10, weight="bold")
    sheets.supylabel(READING_ORDER, fontsize=8, color="#555")
    left, right = charts.subplots(1, 2)
    draw_trade_off(left, scores, colour)
    draw_bars(right, scores, colour)
    page.savefig(path, format="png")


def contact_sheet(axis: Any, sheet: Sheet, colour: Any) -> None:
    """Lay a set out, best quality first; frame and number the picks in their order, fade the other images."""
    order = sheet.quality.argsort(descending=True)
    images, picked = sheet.images[order], [order.tolist().index(pick) for pick in sheet.picks.tolist()]
    ink = torch.full((len(images), 1, 1), 0.35)
    ink[picked] = 1
    corners = lay_out(axis, images * ink, dict.fromkeys(picked, colour))
    for number, place in enumerate(picked, start=1):
        left, top = corners[place]
        axis.text(left + 0.4, top + 0.4, number, color="white", fontsize=6, va="top",
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2})  # fmt: skip


def lay_out(axis: Any, images: Tensor, colours: Mapping[int, Any]) -> dict[int, tuple[float, float]]:
    """Lay images (N, 8, 8) out in their order, and frame those that have a colour; left and top of these."""
    rectangle = require("matplotlib.patches", "demo").Rectangle
    rows, side = -(-len(images) // COLUMNS), images.shape[-1] + GAP
    tiles = torch.zeros(rows * COLUMNS, side, side)
    tiles[: len(images), GAP:, GAP:] = images
    mosaic = tiles.view(rows, COLUMNS, side, side).transpose(1, 2).reshape(rows * side, COLUMNS * side)
    axis.imshow(F.pad(mosaic, (0, GAP, 0, GAP)).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    corners = {}
    for place, colour in colours.items():
        top, left = (side * x + GAP - 0.5 for x in divmod(place, COLUMNS))  # pixel 0 begins at -0.5
        axis.add_patch(rectangle((left, top), side - GAP, side - GAP, fill=False, edgecolor=colour, linewidth=2.2))
        corners[place] = left, top
    axis.set_anchor("N")  # sets of different sizes begin at the same height
    axis.axis("off")
    return corners


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


def draw_sheets(path: Path, rows: Mapping[str, Sequence[Sheet]]) -> None:
    """Draw a row of sets for each name, best quality first, their picks framed."""
    columns = max(map(len, rows.values()))
    page = figure(1.75 * columns, 2.4 * len(rows))
    grid = page.subplots(len(rows), columns, squeeze=False)
    for axes, (name, sheets) in zip(grid, rows.items(), strict=True):
        axes[0].set_title(f"{name} templates", fontsize=10, weight="bold", loc="left")
        for axis in axes:
            axis.axis("off")
        for axis, sheet in zip(axes, sheets, strict=False):
            contact_sheet(axis, sheet, OURS)
    page.supylabel(READING_ORDER, fontsize=8, color="#555")
    page.savefig(path, format="png")


def draw_frames(path: Path, rows: Mapping[str, Sequence[Frames]]) -> None:
    """Draw two rows of sets for each name, greatest weight first: framed by weight, and by center."""
    shade = require("matplotlib", "demo").colormaps["YlGnBu"]
    columns = max(map(len, rows.values()))
    page = figure(1.75 * columns, 4.8 * len(rows))
    grid = page.subplots(2 * len(rows), columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for place, (name, sets) in enumerate(rows.items()):
        by_weight, by_center = grid[2 * place : 2 * place + 2]
        by_weight[0].set_title(f"{name} templates, by weight: dark is much", fontsize=10, weight="bold", loc="left")
        by_center[0].set_title("the same, by center", fontsize=10, weight="bold", loc="left")
        for upper, lower, frames in zip(by_weight, by_center, sets, strict=False):
            order = frames.weights.argsort(descending=True)
            shares = frames.weights[order] / frames.weights.max()
            dark = (shade(0.15 + 0.85 * float(share)) for share in shares)
            lay_out(upper, frames.images[order], dict(enumerate(dark)))
            centers = (CENTERS[m % len(CENTERS)] for m in frames.centers[order].tolist())
            lay_out(lower, frames.images[order], dict(enumerate(centers)))
    page.savefig(path, format="png")


def draw_rocs(path: Path, rocs: Mapping[str, Mapping[str, Roc]], of: str = "templates") -> None:
    """Draw a panel for each kind of test and in it a ROC for each name, down to the FAR of a single false accept."""
    page = figure(5 * len(rocs), 4)
    for axis, (kind, curves) in zip(
        page.subplots(1, len(rocs), squeeze=False, sharey=True)[0], rocs.items(), strict=True
    ):
        for (name, curve), colour in zip(curves.items(), ROC_COLOURS, strict=True):
            seen = curve.far > 0
            axis.step(curve.far[seen].numpy(), curve.tar[seen].numpy(), where="post", color=colour, label=name)
        axis.set(xscale="log", xlabel="FAR", title=f"{kind} {of}")
        axis.grid(color="#e5e5e5")
        axis.spines[["top", "right"]].set_visible(False)
    page.axes[0].set_ylabel("TAR")
    page.axes[0].legend(frameon=False, loc="best")
    page.savefig(path, format="png")
