"""For Ray Data: descriptors of a dataset's templates, on all of a cluster's workers (extra ``[ray]``)."""

from __future__ import annotations

from typing import Any

from fcn_kernels.extras import require
from fcn_kernels.files.aggregate import shard_of
from fcn_kernels.integrations.groups import BUCKET, AggregateGroups, check_buckets


def aggregate(
    dataset: Any, groups: AggregateGroups | None = None, *, buckets: int | None = None, **options: Any
) -> Any:
    """One row for each template of a dataset, wherever its rows lie: ``groupby(id).map_groups(groups)``.

    Args:
        dataset: a ``ray.data.Dataset`` whose columns ``groups`` names: features, ids and what else.
        groups: what becomes of a template; ``AggregateGroups()`` if it is not given. With ``rows`` the result is the
            same to the bit on any number of workers, and that of ``python -m fcn_kernels aggregate``.
        buckets: bring templates together in so many groups, by a hash of their ids, and aggregate a group's in one
            call. A group's rows have to fit a worker's memory. None: each template is a group.
        options: of ``map_groups``: num_cpus, num_gpus, concurrency and others.

    Returns:
        A ``ray.data.Dataset`` with the columns of :class:`AggregateGroups`'s results, in no order of their own. It is
        lazy, as all are: errors come as it is read.

    Raises:
        ImportError: Ray is not installed.
        ValueError: ``buckets`` is below 1.

    Example:
        ``aggregate(ray.data.read_parquet("embeddings/"), buckets=200).write_parquet("descriptors/")``
    """
    require("ray.data", "ray")
    groups = groups or AggregateGroups()
    check_buckets(buckets)
    key = groups.keys.ids
    if buckets is not None:
        arrow, ids, key = require("pyarrow", "ray"), key, BUCKET

        def bucket(table: Any) -> Any:
            return arrow.array([shard_of(one, buckets) for one in table[ids].to_pylist()])

        dataset = dataset.add_column(BUCKET, bucket, batch_format="pyarrow")
    return dataset.groupby(key).map_groups(groups.__call__, batch_format="numpy", **options)
