"""For users of anomalib's k-center-greedy coreset, in PatchCore and AnomalyDINO. anomalib is never imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fcn_kernels.integrations.sampling import complete, farthest_points
from fcn_kernels.selection.select import CoresetState


class KCenterGreedy:
    """The coreset of a memory bank, in place of ``anomalib.models.components.KCenterGreedy``.

    anomalib's models use it after one line::

        anomalib.models.image.patchcore.torch_model.KCenterGreedy = KCenterGreedy  # or ...anomaly_dino.torch_model...

    Args:
        embedding: ``(N, C)``, or ``(N, ...)``, which is flattened.
        sampling_ratio: the coreset has int(N * sampling_ratio) rows.
        project: what to measure distances on instead of the embedding. None: the embedding itself; anomalib's
            ``SparseRandomProjection(eps=0.9).fit_transform`` is what anomalib does, to save time.

    Attributes:
        embedding, coreset_size, n_observations: as there.
        features: the rows that were compared, after a selection.
        min_distances: ``(N, 1)`` Euclidean distances to the coreset, after a selection.

    Raises:
        ValueError: the coreset would have no row; or, at the selection, fewer rows than that are finite.

    What differs: no projection unless asked for, so that the coreset is that of the embedding; distances are squared
    while they are compared, so that those which a root would round to equals are not equals. The start is the one that
    anomalib draws with this seed where it does not project, and ``reset_distances``, ``update_distances`` and
    ``get_new_idx``, the steps of its loop, are not there.

    Source: anomalib 2.7, anomalib.models.components.sampling.k_center_greedy.

    Example:
        >>> bank = torch.tensor([[0.0, 0.0], [0.0, 1.0], [8.0, 0.0], [8.0, 1.0]])
        >>> sampler = KCenterGreedy(bank, sampling_ratio=0.5)
        >>> sampler.sample_coreset().shape, sampler.min_distances.flatten().sort().values
        (torch.Size([2, 2]), tensor([0., 0., 1., 1.]))
    """

    def __init__(
        self, embedding: Tensor, sampling_ratio: float, project: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.embedding = embedding
        self.n_observations = len(embedding)
        self.coreset_size = int(self.n_observations * sampling_ratio)
        if self.coreset_size <= 0:
            raise ValueError(
                f"coreset_size must be a positive integer, got {self.coreset_size}. "
                f"Check sampling_ratio ({sampling_ratio}) and embedding size ({self.n_observations})."
            )
        self.project = project
        self.features: Tensor
        self.min_distances: Tensor | None = None

    def select_coreset_idxs(self) -> list[int]:
        """Rows of the coreset, in the order in which they were picked, from a random one on."""
        rows = self.embedding.flatten(1)
        self.features = rows if self.project is None else self.project(rows)
        start = torch.randint(high=self.n_observations, size=(1,), device=self.features.device).reshape(1)
        found = farthest_points(self.features, self.coreset_size, start=start, return_min_distances=True)
        self.min_distances = cast(CoresetState, found).min_distances.sqrt()[:, None]
        return complete(found, self.coreset_size).tolist()

    def sample_coreset(self) -> Tensor:
        """Rows of the embedding, ``(coreset_size, ...)``."""
        return self.embedding[self.select_coreset_idxs()]
