"""Selection from DTensors that are sharded over sets: each rank takes the sets that it has, and nothing is exchanged.

Importing this registers the rule. It is one for the operators as wholes (``torch.library.register_torch_dispatch``):
DTensor's own sharding strategies, which ``register_sharding`` makes, do not know of lists among the results, nor that a
set's noise depends on its number among all sets. The noise is PyTorch's, which may differ from C++'s in its last bit.

Example:
    >>> import fcn_kernels.distributed.dtensor
    >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: no arguments
    >>> mesh = init_device_mesh("cpu", (1,))
    >>> sets = distribute_tensor(torch.randn(8, 100, 64), mesh, [Shard(0)])
    >>> picks = fcn_kernels.coreset_select(sets, 3)
    >>> picks.indices.placements
    (Shard(dim=0),)
    >>> dist.destroy_process_group()
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fcn_kernels.noise import STEPS_PER_DRAW, gumbel_noise
from fcn_kernels.selection.problem import Gradients, Problem, Selected

_SETS = {"noise": 1}
"""Arguments whose sets are not along their first dimension."""


def _local(p: Problem) -> tuple[Problem, DeviceMesh]:
    """This rank's sets."""
    if not isinstance(p.features, DTensor):
        raise ValueError("expected features to be a DTensor where other arguments are")
    mesh = p.features.device_mesh
    if p.cu_seqlens is not None or mesh.ndim != 1 or p.features.placements != (Shard(0),):
        raise NotImplementedError(
            f"expected padded DTensors (B, N, C) with placements (Shard(0),) on a mesh of one dimension, "
            f"got {p.features.placements}; see fcn_kernels.distributed.coreset_select for sets on several ranks"
        )
    local = {name: _local_value(name, value) for name, value in p._asdict().items()}
    mine = p._replace(**local)
    for name, value in local.items():
        size = value.shape[_SETS.get(name, 0)] if isinstance(value, Tensor) and value.ndim else mine.rows
        if size not in (mine.sets, mine.rows):
            raise ValueError(f"expected {name} to be sharded over sets as the features are, got {size} local values")
    return _with_noise_of(p, mine, mesh), mesh


def _local_value(name: str, value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(f"expected {name} to be a DTensor as the features are, got a Tensor")
    return value


def _with_noise_of(p: Problem, mine: Problem, mesh: DeviceMesh) -> Problem:
    """A set's noise depends on its number among all sets, which the local ones do not have."""
    if p.seed is None:
        return mine
    first = min(mesh.get_local_rank() * -(-p.sets // mesh.size()), p.sets)
    numbers = torch.arange(first, first + mine.sets, device=mine.features.device)
    blocks = range(-(-p.k // STEPS_PER_DRAW))
    noise = torch.cat([gumbel_noise(int(p.seed), numbers, mine.features.shape[1], block) for block in blocks])
    quality = mine.features.dtype if mine.features.dtype == torch.float64 else torch.float32
    return mine._replace(seed=None, noise=noise[: p.k].flatten(1).to(quality))


def _sharded(values: Tensor, mesh: DeviceMesh, dim: int, size: int) -> DTensor:
    """A result of this rank's sets, of all of them ``size`` along ``dim``."""
    shape = torch.Size([*values.shape[:dim], size, *values.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)


@torch.library.register_torch_dispatch("fcn_kernels::select", DTensor)
def _select(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Selected:
    *fields, keep, backend = args
    p = Problem(*fields)
    mine, mesh = _local(p)
    out = Selected(*func(*mine, keep, backend))
    features, distances, indices, counts = (_sharded(values, mesh, 0, p.sets) for values in out[:4])
    state = [_sharded(values, mesh, 0, p.rows) for values in out.state]
    # softmax and gaps (K, R), norms (R,); the softmax of Triton (B, K, 3)
    sizes = {1: (0, p.rows), 2: (1, p.rows), 3: (0, p.sets)}
    kept = [_sharded(values, mesh, *sizes[values.ndim]) for values in out.kept]
    return Selected(features, distances, indices, counts, state, kept)


@torch.library.register_torch_dispatch("fcn_kernels::anchor_distances", DTensor)
def _anchor_distances(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> DTensor:
    *fields, anchors, offsets = args
    p = Problem(*fields)
    mine, mesh = _local(p._replace(seed=None))
    if offsets is not None:
        raise NotImplementedError("expected anchors (A, C), or a DTensor (B, A, C), with features that are DTensors")
    near = func(*mine, anchors.to_local() if isinstance(anchors, DTensor) else anchors, None)
    return _sharded(near, mesh, 0, p.rows)


@torch.library.register_torch_dispatch("fcn_kernels::select_backward", DTensor)
def _select_backward(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Gradients:
    fields = len(Problem._fields)
    p = Problem(*args[:fields])
    mine, mesh = _local(p)
    rest = [value.to_local() if isinstance(value, DTensor) else value for value in args[fields:]]
    found = Gradients(*func(*mine, *rest))
    gamma = found.gamma.clone()
    dist.all_reduce(gamma, group=mesh.get_group())
    features = _sharded(found.features, mesh, 0, p.sets)
    quality = _sharded(found.quality, mesh, 0, p.quality_shape[0])
    return Gradients(features, quality, gamma)
