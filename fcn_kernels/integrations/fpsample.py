"""For users of fpsample: the same calls, NumPy to NumPy, on our kernels. fpsample is never imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fcn_kernels.extras import require
from fcn_kernels.integrations.sampling import complete, farthest_points

if TYPE_CHECKING:
    import numpy as np

    Points = np.ndarray[Any, np.dtype[Any]]


def fps_sampling(pc: Points, n_samples: int, start_idx: int | Sequence[int] | None = None) -> Points:
    """Indices of n_samples points, each the farthest from those before it.

    Args:
        pc: ``(n_pts, D)``, taken as float32.
        n_samples: points to pick, from 1 to n_pts.
        start_idx: the first pick, or a list of points that come first. None: a random one, which ``numpy.random.seed``
            repeats.

    Returns:
        ``(n_samples,)`` uint64.

    Raises:
        ImportError: NumPy is not installed.
        ValueError: pc is not ``(n_pts, D)``, n_samples is not from 1 to n_pts, a start is not in [0, n_pts), there are
            more of them than n_samples, or fewer finite points than n_samples. (AssertionError in fpsample.)

    What differs: the lowest point is picked on ties, the highest in fpsample, and no point twice, which fpsample does
    when only copies are left. A list of starts, once each, is what fpsample takes from version 1 on.

    Source: fpsample 0.3.3, fpsample.fps_sampling.

    Example:
        >>> import numpy as np
        >>> fps_sampling(np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]]), 2, start_idx=0)
        array([0, 2], dtype=uint64)
    """
    np = require("numpy", "tool")
    if pc.ndim != 2 or not 1 <= n_samples <= len(pc):
        raise ValueError(f"expected pc (n_pts, D) and n_samples from 1 to n_pts, got {pc.shape} and {n_samples}")
    points = torch.from_numpy(np.array(pc, dtype=np.float32))
    if start_idx is None:
        start_idx = int(np.random.randint(low=0, high=len(pc)))
    first = [int(row) for row in np.atleast_1d(start_idx)]
    if len(set(first)) != len(first) or len(first) > n_samples or not all(0 <= row < len(pc) for row in first):
        raise ValueError(f"expected up to {n_samples} different start_idx in [0, {len(pc)}), got {start_idx}")
    known = points.new_full((len(pc),), torch.inf)
    known[first] = -torch.inf  # chosen, and out of what can be picked
    more = n_samples - len(first)
    found = farthest_points(points, [more], anchors=points[first], min_distances=known, distinct=True)
    return np.array(first + complete(found, more).tolist(), dtype=np.uint64)  # type: ignore[no-any-return]


def bucket_fps_kdtree_sampling(pc: Points, n_samples: int, start_idx: int | Sequence[int] | None = None) -> Points:
    """:func:`fps_sampling`, which fpsample's buckets are another way to.

    Example:
        >>> import numpy as np
        >>> bucket_fps_kdtree_sampling(np.array([[0.0], [1.0], [5.0]]), 3, start_idx=[0, 1])
        array([0, 1, 2], dtype=uint64)
    """
    return fps_sampling(pc, n_samples, start_idx)


def bucket_fps_kdline_sampling(
    pc: Points, n_samples: int, h: int, start_idx: int | Sequence[int] | None = None
) -> Points:
    """:func:`fps_sampling`; ``h``, the height of fpsample's tree, is of no use here.

    Example:
        >>> import numpy as np
        >>> bucket_fps_kdline_sampling(np.array([[0.0], [1.0], [5.0]]), 2, 3, start_idx=0)
        array([0, 2], dtype=uint64)
    """
    return fps_sampling(pc, n_samples, start_idx)
