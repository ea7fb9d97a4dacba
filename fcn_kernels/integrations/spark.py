"""For Spark: descriptors of a frame's templates, by ``applyInPandas`` on its executors."""

from __future__ import annotations

from typing import Any

from fcn_kernels.integrations.groups import BUCKET, AggregateGroups, check_buckets


def aggregate(frame: Any, groups: AggregateGroups | None = None, *, buckets: int | None = None) -> Any:
    """One row for each template of a frame: ``groupBy(id).applyInPandas(groups.pandas, schema)``.

    Args:
        frame: a ``pyspark.sql.DataFrame`` whose columns ``groups`` names: features as arrays of numbers, ids and what
            else.
        groups: what becomes of a template; ``AggregateGroups()`` if it is not given. With ``rows`` the result is the
            same to the bit on any number of executors, and that of ``python -m fcn_kernels aggregate``.
        buckets: bring templates together in so many groups, by a hash of their ids, and aggregate a group's in one
            call. A group's rows have to fit an executor's memory. None: each template is a group.

    Returns:
        A ``pyspark.sql.DataFrame`` with the columns of :class:`AggregateGroups`'s results: descriptors and picks are
        arrays. It is lazy, as all are: errors come as it is read.

    Raises:
        ImportError: pyspark is not installed.
        ValueError: ``buckets`` is below 1, or the frame has no column of ids.
    """
    from pyspark.sql import functions

    groups = groups or AggregateGroups()
    check_buckets(buckets)
    key, kinds = groups.keys.ids, dict(frame.dtypes)
    if key not in kinds:
        raise ValueError(f"expected a column {key!r}, got {', '.join(map(repr, kinds))}")
    schema = f"`{key}` {kinds[key]}, descriptors array<float>, norms float, counts bigint, left_out bigint"
    if groups.rows is not None:
        schema += ", picks array<bigint>"
    if buckets is not None:
        frame, key = frame.withColumn(BUCKET, functions.pmod(functions.hash(key), functions.lit(buckets))), BUCKET
    # a method would be taken for a function of a key and a frame
    return frame.groupBy(key).applyInPandas(lambda rows: groups.pandas(rows), schema)
