"""For users of patchcore-inspection's samplers; it is never imported. One line, before its samplers are made::

patchcore.sampler.ApproximateGreedyCoresetSampler = ApproximateGreedyCoresetSampler
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fcn_kernels.extras import require
from fcn_kernels.integrations.sampling import complete, farthest_points
from fcn_kernels.selection.anchors import distances_by_differences
from fcn_kernels.sets import accumulator

if TYPE_CHECKING:
    import numpy as np

Features = TypeVar("Features", Tensor, "np.ndarray[Any, np.dtype[Any]]")


class GreedyCoresetSampler:
    """A share of the rows, k-center-greedily, from the row with the largest sum of squared distances to the others.

    Args:
        percentage: between 0 and 1; of N rows int(N * percentage) are picked.
        device: where to compute. Results come back as they were given: NumPy's, or on the device of the features.
        dimension_to_project_features_to: rows of another width are compared after a random linear projection, drawn
            as theirs is (``torch.manual_seed`` repeats it). None: rows as they are.

    Raises:
        ValueError: the percentage is not between 0 and 1; or, at ``run``, no row would be picked or too few
            are finite.

    What differs: distances are made of differences, where theirs come of norms and products and lose digits; that row
    is found from the mean, without the N x N matrix; None as dimension.

    Source: patchcore-inspection, patchcore.sampler.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [0.0, 1.0], [8.0, 0.0], [9.0, 1.0]])
        >>> sampler = GreedyCoresetSampler(0.5, torch.device("cpu"), dimension_to_project_features_to=2)
        >>> sampler.run(rows)
        tensor([[9., 1.],
                [0., 0.]])
    """

    def __init__(
        self, percentage: float, device: torch.device, dimension_to_project_features_to: int | None = 128
    ) -> None:
        if not 0 < percentage < 1:
            raise ValueError(f"Percentage value not in (0, 1). Got {percentage}")
        self.percentage = percentage
        self.device = device
        self.dimension_to_project_features_to = dimension_to_project_features_to

    def run(self, features: Features) -> Features:
        """The picked rows of ``(N, D)``, in the order in which they were picked."""
        with torch.no_grad():
            rows = self._reduce_features(torch.as_tensor(features, device=self.device))
            picks = self._compute_greedy_coreset_indices(rows)
        if isinstance(features, Tensor):
            return features[picks.to(features.device)]
        return features[picks.cpu().numpy()]  # type: ignore[no-any-return]

    def _reduce_features(self, features: Tensor) -> Tensor:
        width = self.dimension_to_project_features_to
        if width is None or features.shape[1] == width:
            return features
        mapper = torch.nn.Linear(features.shape[1], width, bias=False).to(features)
        return mapper(features)  # type: ignore[no-any-return]

    def _compute_greedy_coreset_indices(self, features: Tensor) -> Tensor:
        start = (features - features.mean(0)).square().sum(1).argmax()
        picks = int(len(features) * self.percentage)
        return complete(farthest_points(features, picks, start=start), picks)


class ApproximateGreedyCoresetSampler(GreedyCoresetSampler):
    """:class:`GreedyCoresetSampler` whose picks begin with the row farthest, on average, from a few random rows.

    Those averages take part in the running minimum, as in theirs, and ``numpy.random.seed`` repeats the random rows.

    Args:
        number_of_starting_points: how many random rows.
        percentage, device, dimension_to_project_features_to: as in :class:`GreedyCoresetSampler`.

    Raises:
        ImportError: NumPy is not installed.

    What differs: no progress bar; and as there.

    Example:
        >>> import numpy as np
        >>> np.random.seed(0)
        >>> sampler = ApproximateGreedyCoresetSampler(0.1, torch.device("cpu"))
        >>> sampler.run(np.random.rand(100, 128).astype("float32")).shape
        (10, 128)
    """

    def __init__(
        self,
        percentage: float,
        device: torch.device,
        number_of_starting_points: int = 10,
        dimension_to_project_features_to: int | None = 128,
    ) -> None:
        super().__init__(percentage, device, dimension_to_project_features_to)
        self.number_of_starting_points = number_of_starting_points

    def _compute_greedy_coreset_indices(self, features: Tensor) -> Tensor:
        np = require("numpy", "tool")
        count = min(self.number_of_starting_points, len(features))
        starts = np.random.choice(len(features), count, replace=False).tolist()
        rows = features.to(accumulator(features.dtype))
        gaps = distances_by_differences(rows, rows[starts]).mean(1)
        picks = int(len(features) * self.percentage)
        return complete(farthest_points(features, picks, min_distances=gaps.square()), picks)
