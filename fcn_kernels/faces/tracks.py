"""Which faces of successive frames are one person's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fcn_kernels.faces.models import Detection

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

OVERLAP = 0.3  # intersection over union of the boxes
GAP = 1.0  # seconds without the face, after which a track has ended


class _Track(NamedTuple):
    number: int
    box: tuple[int, int, int, int]
    embedding: Array
    time: float


class Tracker:
    """Gives the faces of a video, frame by frame, the numbers of their tracks.

    A face goes on with the track that it overlaps most, by more than OVERLAP, if that ended less than GAP ago and its
    last embedding is nearer than `same`: where the picture cuts to somebody else, a new track begins.
    """

    def __init__(self, same: float) -> None:
        self._same, self._open, self._count = same, list[_Track](), 0

    def add(self, time: float, faces: Sequence[Detection], embeddings: Array) -> list[int]:
        """Numbers from 0 of the faces of a frame."""
        self._open = [track for track in self._open if time - track.time <= GAP]
        fits = sorted(
            (-overlap, track.number, face)
            for track in self._open
            for face, (found, embedding) in enumerate(zip(faces, embeddings, strict=True))
            if (overlap := overlap_of(track.box, found.box)) > OVERLAP
            and math.dist(track.embedding, embedding) < self._same
        )
        numbers: dict[int, int] = {}
        for _, number, face in fits:
            if face not in numbers and number not in numbers.values():
                numbers[face] = number
        for face in range(len(faces)):
            if face not in numbers:
                numbers[face], self._count = self._count, self._count + 1
        self._open = [track for track in self._open if track.number not in numbers.values()]
        self._open += [_Track(numbers[face], found.box, embeddings[face], time) for face, found in enumerate(faces)]
        return [numbers[face] for face in range(len(faces))]


def overlap_of(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if shared else 0.0
