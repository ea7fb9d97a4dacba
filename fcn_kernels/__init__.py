"""Fused, differentiable coreset selection: pick the few rows of a set that are both good and different."""

import sys

if sys.argv[:1] == ["-m"]:  # on the way to __main__: PyTorch takes seconds to import, and Ctrl-C meanwhile is no fault
    from fcn_kernels import _interrupt

    _interrupt.say_so()

from fcn_kernels._version import __version__
from fcn_kernels.clustering.sums import cluster_sums
from fcn_kernels.heads.alignment import ContextNet, DiscrepancyAlignment
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.heads.cluster_state import ClusterState
from fcn_kernels.heads.cluster_stream import ClusterStream
from fcn_kernels.heads.coreset_select import CoresetSelect
from fcn_kernels.heads.facecoresetnet import CoresetAggregator
from fcn_kernels.heads.hypersphere import HypersphereSampler
from fcn_kernels.heads.style import StyleInput
from fcn_kernels.neighbors.context import Context, context_statistics
from fcn_kernels.neighbors.scores import align_scores, search_rows
from fcn_kernels.selection.select import Coreset, CoresetState, coreset_select

__all__ = [
    "ClusterAggregate",
    "ClusterState",
    "ClusterStream",
    "Context",
    "ContextNet",
    "Coreset",
    "CoresetAggregator",
    "CoresetSelect",
    "CoresetState",
    "DiscrepancyAlignment",
    "HypersphereSampler",
    "StyleInput",
    "__version__",
    "align_scores",
    "cluster_sums",
    "context_statistics",
    "coreset_select",
    "search_rows",
]
