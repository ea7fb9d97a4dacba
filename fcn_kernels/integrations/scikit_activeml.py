"""For users of scikit-activeml's CoreSet: queries that go on from labelled rows, on our kernels.

``k_greedy_center`` needs scikit-learn alone; ``CoreSet``, a subclass of theirs, is made when it is first asked for.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fcn_kernels.extras import require
from fcn_kernels.integrations.sampling import complete, farthest_points
from fcn_kernels.selection.select import CoresetState

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def k_greedy_center(
    X: Any,
    y: Any,
    batch_size: int = 1,
    random_state: Any = None,
    missing_label: Any = float("nan"),
    mapping: Any = None,
    n_new_cand: int | None = None,
    metric: str = "euclidean",
    metric_dict: dict[str, Any] | None = None,
    *,
    return_utilities: bool = True,
) -> tuple[Array, Array | None]:
    """Rows to label next, each the farthest from those that are labelled or were picked before it.

    Args:
        X: ``(n_samples, n_features)``.
        y: ``(n_samples,)``, labels, and ``missing_label`` where there is none.
        batch_size: rows to pick.
        random_state: of the order in which equals are picked, and of the first pick if no row is labelled.
        mapping: the rows that may be picked, those without a label. None: all of these.
        n_new_cand: the number of rows in ``mapping``, to which utilities are then confined.
        metric, metric_dict: "euclidean" and None.
        return_utilities: (ours) without them, None, nothing of size batch_size x n_samples is made.

    Returns:
        Picked rows ``(batch_size,)``, and utilities ``(batch_size, n_samples)``: before each pick, the distance of each
        row to the nearest row that is labelled or picked; NaN for these and for rows that may not be picked.

    Raises:
        TypeError, ValueError: as theirs; the metric is another; or fewer rows than batch_size may be picked.

    What differs: equals are picked in an order that is drawn once, not anew at each step. Utilities before the first
    pick are 0 where no row is labelled, as theirs. Where all are 0 because rows are copies of labelled ones, theirs
    forgets the labelled rows.

    Source: scikit-activeml 1.0, skactiveml.pool._core_set.k_greedy_center.

    Example:
        >>> nan = float("nan")
        >>> picks, utilities = k_greedy_center([[0.0], [1.0], [4.0], [6.0]], [1.0, nan, nan, nan], batch_size=2)
        >>> picks.tolist(), utilities.tolist()
        ([3, 2], [[nan, 1.0, 4.0, 6.0], [nan, 1.0, 2.0, nan]])
    """
    np, checks = require("numpy", "demo"), require("sklearn.utils", "demo")
    x = checks.check_array(X, dtype=[np.float64, np.float32])
    y = checks.column_or_1d(checks.check_array(y, ensure_2d=False, ensure_all_finite="allow-nan", dtype=None))
    checks.check_consistent_length(x, y)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be a integer, got {type(batch_size).__name__}")
    if n_new_cand is not None and not isinstance(n_new_cand, int):
        raise TypeError(f"Only n_new_cand with type int is supported, got {type(n_new_cand).__name__}")
    if metric != "euclidean" or metric_dict:
        raise ValueError(f"expected metric 'euclidean' without metric_dict, got {metric!r} and {metric_dict}")
    labelled = ~(np.isnan(y) if missing_label != missing_label else np.asarray([v == missing_label for v in y]))
    pool = np.flatnonzero(~labelled) if mapping is None else checks.column_or_1d(mapping, dtype=int)
    if n_new_cand is not None and n_new_cand != len(pool):
        raise ValueError(f"n_new_cand must equal to the length of mapping array, got {n_new_cand} and {len(pool)}")
    free = pool[~labelled[pool]]
    free = checks.check_random_state(random_state).permutation(free)  # the first of equals is then any of them
    rows, known = torch.from_numpy(x[free]), torch.from_numpy(x[labelled])
    picks = complete(farthest_points(rows, batch_size, anchors=known, distinct=True), batch_size)
    if not return_utilities:
        return free[picks.numpy()], None
    utilities = np.full((batch_size, len(x)), np.nan)
    utilities[:, free] = _utilities(rows, known, picks).numpy()
    return free[picks.numpy()], utilities if n_new_cand is None else utilities[:, pool]


def _utilities(rows: Tensor, labelled: Tensor, picks: Tensor) -> Tensor:
    """Distances (K, N) of all rows before each pick, NaN for those that are picked already."""
    state = cast(CoresetState, farthest_points(rows, [0], anchors=labelled, return_min_distances=True))
    first = state.min_distances.sqrt()[None]
    later = torch.cdist(rows[picks[:-1]], rows, compute_mode="donot_use_mm_for_euclid_dist").to(first.dtype)
    gaps = torch.cat([first, later]).cummin(0).values
    if not len(labelled):
        gaps[0] = 0
    for step, pick in enumerate(picks[:-1].tolist(), 1):
        gaps[step:, pick] = torch.nan
    return gaps


@cache
def _core_set() -> Any:
    pool, utils = require("skactiveml.pool", "peers"), require("skactiveml.utils", "peers")
    np = require("numpy", "demo")
    theirs: Any = pool.CoreSet

    class CoreSet(theirs):  # type: ignore[misc]
        """``skactiveml.pool.CoreSet`` with the same parameters, of which ``metric`` is "euclidean"; picks by
        :func:`k_greedy_center`."""

        def query(
            self, X: Any, y: Any, candidates: Any = None, batch_size: int = 1, return_utilities: bool = False
        ) -> Any:
            """Rows to label next, and utilities if asked for, as theirs."""
            X, y, candidates, batch_size, return_utilities = self._validate_data(
                X, y, candidates, batch_size, return_utilities, reset=True
            )
            rows, mapping = self._transform_candidates(candidates, X, y)
            elsewhere = None
            if mapping is None:  # candidates that are no rows of X: the labelled ones are put behind them
                known, elsewhere = utils.labeled_indices(y, missing_label=self.missing_label_), len(rows)
                X, mapping = np.concatenate([rows, X[known]]), np.arange(elsewhere)
                y = np.concatenate([np.full(elsewhere, self.missing_label_), y[known]])
            where = (self.random_state_, self.missing_label_, mapping, elsewhere)
            picks, utilities = k_greedy_center(
                X, y, batch_size, *where, self.metric, self.metric_dict, return_utilities=return_utilities
            )
            return (picks, utilities) if return_utilities else picks

    CoreSet.__module__, CoreSet.__qualname__ = __name__, "CoreSet"  # where pickle finds it
    return CoreSet


def __getattr__(name: str) -> Any:
    """CoreSet, once scikit-activeml is wanted."""
    if name == "CoreSet":
        return _core_set()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
