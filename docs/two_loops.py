"""Draws two-loops.png of kernels.md: python docs/two_loops.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

ROWS, COLUMNS, TILE = 12, 16, 4
PLAIN, SEEN, WARPS = "#f4f4f4", "#d9e6f2", ("#1f77b4", "#5799c7", "#8fbcdb", "#c6dbed")
PICK, RESULT = "#d62728", "#ffbf7f"


def main() -> None:
    """Draw it beside this file."""
    figure, axis = plt.subplots(figsize=(11, 5.2), dpi=110)
    axis.set(xlim=(-2.5, 42), ylim=(-4.6, ROWS + 2.6), aspect="equal")
    axis.axis("off")
    tile_loop(axis)
    scalar_loop(axis)
    figure.savefig(Path(__file__).with_name("two-loops.png"), bbox_inches="tight")


def tile_loop(axis: Axes) -> None:
    """Rows and the pick's direction, from memory to a product a row."""
    axis.text(8, ROWS + 1.7, "tile loop: rows, [n, c] at a time", ha="center", weight="bold")
    for row in range(ROWS):
        tile, of_tile = divmod(row, TILE)
        color = {0: SEEN, 1: WARPS[of_tile]}.get(tile, PLAIN)
        box(axis, 0, row, COLUMNS, color)
    for at in range(4, COLUMNS, 4):
        axis.plot([at, at], [ROWS - 2 * TILE, ROWS - TILE], color="white", lw=0.8)
    axis.text(-0.4, ROWS - 1.5 * TILE, "tile", ha="right", va="center")
    axis.text(-0.4, ROWS / 2 - 5.2, "next", ha="right", va="center", color="gray")
    axis.text(COLUMNS / 2, ROWS - 2.4 * TILE, "a warp has whole rows, a thread 16 bytes of each", ha="center",
              va="center", size=8.5)  # fmt: skip
    box(axis, 0, ROWS + 1, COLUMNS, PICK, 0.35)
    axis.text(COLUMNS / 2, -1.5, "the pick's direction [c], loaded before the loop", ha="center", va="center", size=9)
    arrow(axis, (COLUMNS + 0.4, ROWS - 1.5 * TILE), (COLUMNS + 3.2, ROWS - 1.5 * TILE))
    axis.text(COLUMNS + 1.7, ROWS - 1.5 * TILE + 0.5, "sum\nalong\nthe row", ha="center", va="bottom", size=8)
    for row in range(ROWS):
        box(axis, COLUMNS + 3.4, row, 1.4, RESULT if row < 2 * TILE else PLAIN)
    axis.text(COLUMNS + 3.6, -1.3, "products [n],\n4 bytes a row", ha="center", va="center", size=8.5)


def scalar_loop(axis: Axes) -> None:
    """A row a thread, from products to the next pick."""
    left = COLUMNS + 6.4
    axis.plot([left, left], [-0.6, ROWS + 0.6], color="black", lw=1.2, ls="--")
    axis.text(left, ROWS + 0.9, "barrier", ha="center", size=9)
    left += 1.6
    axis.text(left + 8, ROWS + 1.7, "scalar loop: a row a thread", ha="center", weight="bold")
    steps = ("gap", "nearest", "weight", "noise", "score")
    for column, name in enumerate(steps):
        for row in range(ROWS):
            box(axis, left + 2.2 * column, row, 1.9, SEEN)
        axis.text(left + 2.2 * column + 0.95, -0.7, name, ha="center", va="center", size=8)
    axis.text(left + 5.4, -2.0, "1 - product / norm, the running minimum,\ntimes q^gamma, plus noise",
              ha="center", va="center", size=8)  # fmt: skip
    end = left + 2.2 * len(steps)
    arrow(axis, (end + 0.1, ROWS / 2), (end + 2.0, ROWS / 2))
    axis.text(end + 1.0, ROWS / 2 + 0.5, "best", ha="center", size=8)
    axis.add_patch(Rectangle((end + 2.2, ROWS / 2 - 0.9), 3.4, 1.8, facecolor=PICK, alpha=0.35, edgecolor="gray"))
    axis.text(end + 3.9, ROWS / 2, "pick", ha="center", va="center")
    axis.text(end + 3.9, ROWS / 2 + 1.9, "merged over the\nparts of the set", ha="center", va="center", size=8)
    axis.plot([end + 3.9, end + 3.9, 8], [ROWS / 2 - 1.0, -3.8, -3.8], color=PICK, lw=1.3)
    arrow(axis, (8, -3.8), (8, -2.2), PICK)
    axis.text(end - 8, -3.7, "next step, K - 1 in all", ha="center", va="bottom", color=PICK, size=9)


def box(axis: Axes, left: float, row: int, width: float, color: str, alpha: float = 1.0) -> None:
    """One row of a tensor, counted from the top."""
    at = (left, ROWS - 1 - row + 0.06)
    axis.add_patch(Rectangle(at, width, 0.88, facecolor=color, alpha=alpha, edgecolor="gray", lw=0.4))


def arrow(axis: Axes, begin: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
    """From one part to another."""
    axis.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=12, color=color, lw=1.3))


if __name__ == "__main__":
    main()
