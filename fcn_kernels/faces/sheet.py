"""A contact sheet: for each template the picks of the coreset, and below them the faces of best quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fcn_kernels.extras import require
from fcn_kernels.faces.pictures import EXTRA

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

SIDE, GAP, LINE, LEFT = 112, 6, 16, 110  # pixels: of a face, between faces, of a line of text, of the names of the rows
PICKED, INK = (34, 94, 168), (40, 40, 40)


class Face(NamedTuple):
    """One to show."""

    chip: Array
    """(S, S, 3) uint8."""
    caption: str
    picked: bool
    """Whether it is in the coreset: these are framed."""


class Strip(NamedTuple):
    """A template."""

    title: str
    rows: Sequence[tuple[str, Sequence[Face]]]
    """A name, and the faces to the right of it."""


def draw(strips: Sequence[Strip]) -> Any:
    """The sheet, as an image of Pillow's."""
    images, pens, fonts = (require(f"PIL.{name}", EXTRA) for name in ("Image", "ImageDraw", "ImageFont"))
    font = fonts.load_default(12)
    row_height = SIDE + LINE + GAP
    columns = max(len(faces) for strip in strips for _, faces in strip.rows)
    height = sum(2 * LINE + len(strip.rows) * row_height for strip in strips) + GAP
    page = images.new("RGB", (LEFT + columns * (SIDE + GAP) + GAP, height), "white")
    pen = pens.Draw(page)
    top = GAP
    for strip in strips:
        pen.text((GAP, top), strip.title, fill=INK, font=fonts.load_default(14))
        top += 2 * LINE - GAP
        for name, faces in strip.rows:
            pen.multiline_text((GAP, top + 2), name, fill=INK, font=font)
            for number, face in enumerate(faces):
                left = LEFT + number * (SIDE + GAP)
                page.paste(images.fromarray(face.chip).resize((SIDE, SIDE)), (left, top))
                if face.picked:
                    pen.rectangle((left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline=PICKED, width=3)
                pen.text((left, top + SIDE + 1), face.caption, fill=INK, font=font)
            top += row_height
        top += GAP
    return page
