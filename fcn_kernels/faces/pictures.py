"""Photos and frames of videos as upright RGB arrays of 8 bits, and what is wrong with those that are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fcn_kernels.extras import require
from fcn_kernels.files.formats import InputError

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

EXTRA = "faces"
PHOTOS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Picture(NamedTuple):
    """What faces are looked for in."""

    rgb: Array
    """(H, W, 3) uint8, upright."""
    path: Path
    time: float | None
    """Seconds from the beginning of a video; None for a photo."""


def is_photo(path: Path) -> bool:
    """Whether the name is a photo's; everything else is taken for a video."""
    return path.suffix.lower() in PHOTOS


def folders_of_photos(folder: Path, sheet: Path) -> dict[Path, list[Path]]:
    """The folder and those below it which have photos, each with its photos, in the order of their names.

    Args:
        sheet: a picture that is no photo, as an earlier run may have left it there.
    """
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if is_photo(path) and path.is_file() and not path.name.startswith(".") and path.resolve() != sheet.resolve():
            found.setdefault(path.parent, []).append(path)
    return found


def photo(path: Path) -> Picture:
    """A photo, turned as its EXIF data says; gray and 16-bit photos too.

    Raises InputError where the file is no photo, is damaged, too large, or has floating-point numbers.
    """
    images, ops = require("PIL.Image", EXTRA), require("PIL.ImageOps", EXTRA)
    np = require("numpy", EXTRA)
    try:
        with images.open(path) as file:
            image = ops.exif_transpose(file)
            if image.mode == "F":
                raise InputError(f"{path}: has floating-point numbers, expected 8 or 16 bits a channel")
            if image.mode.startswith("I"):  # gray, of 16 bits
                high = np.asarray(image).astype("int64").clip(0, 65535) >> 8
                image = images.fromarray(high.astype("uint8"))
            return Picture(np.ascontiguousarray(image.convert("RGB")), path, None)
    except images.UnidentifiedImageError as error:
        raise InputError(f"{path}: is no photo that can be read") from error
    except images.DecompressionBombError as error:
        raise InputError(f"{path}: is too large: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's plugins raise for damaged files
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error


def frames(path: Path, per_second: float) -> Iterator[Picture]:
    """Frames of a video, at most `per_second` of each second, turned as the video says.

    Raises InputError where the file is no video, and, after the frames before it, where it is damaged.
    """
    av, np = require("av", EXTRA), require("numpy", EXTRA)
    following, count = float("-inf"), 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: has no pictures, expected a video")
            for frame in container.decode(container.streams.video[0]):
                time = float(frame.time or 0.0)
                if time < following:
                    continue
                following = max(following, time) + 1 / per_second - 1e-6
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield Picture(np.ascontiguousarray(turned), path, time)
                count += 1
    except av.error.FFmpegError as error:
        reason = _reason(error)
        if count:
            raise InputError(f"{path}: is damaged after {time:.1f} s: {reason}") from error
        raise InputError(f"{path}: is no video that can be read: {reason}") from error
    if not count:
        raise InputError(f"{path}: has no frames")


def _reason(error: Any) -> str:
    return str(error.strerror or error).lower()
