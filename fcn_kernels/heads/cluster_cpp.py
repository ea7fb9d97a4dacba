"""The parts of Cluster and Aggregate's head that need no gradient, in C++: a small set would wait for PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fcn_kernels.backends import are_plain, has_tangent, is_plain_call
from fcn_kernels.clustering.cpp import launch

if TYPE_CHECKING:
    from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
    from fcn_kernels.heads.cluster_state import ClusterState


class Kept(NamedTuple):
    """What parameters are folded into, and what tells that they have changed."""

    made: list[Tensor]
    key: list[Any]
    held: list[Tensor]  # the parameters' memory, so that no other gets its addresses
    sampled: bytes
    sample: int


def blocks(head: ClusterAggregate, fold_shares: Callable[[torch.dtype], list[Tensor]]) -> list[Tensor] | None:
    """Weights and biases of blocks and shares, as :class:`fcn_kernels.clustering.problem.Chunks` has them.

    None where a graph is wanted, or the call is no plain one on a CPU.
    """
    layers: list[Any] = list(head.blocks)
    assign = head.assign
    given = [t for block in layers for t in _both(block, "norm1", "norm2", "qkv", "proj", "fc1", "fc2")]
    given += [*_both(assign, "center_norm", "key_norm", "query", "key"), head.centers]
    if not layers or not _takes(given):
        return None

    def make() -> list[Tensor]:
        d = head.centers.shape[1]
        kinds = (
            [_layer(block.qkv, block.norm1, d, (d // head.num_heads) ** -0.5) for block in layers],  # the queries
            [_layer(block.proj) for block in layers],
            [_layer(block.fc1, block.norm2) for block in layers],
            [_layer(block.fc2) for block in layers],
        )
        return [*launch.fold(kinds), *fold_shares(torch.float32)]

    return _kept(head, "blocks", given, make)


def fuse(head: ClusterAggregate, state: ClusterState, least_mass: float) -> launch.Fused | None:
    """Descriptors of B sets; None as for :func:`blocks`, or where the state is not of ``eval()``."""
    mixers: list[Any] = list(head.mixers)
    last = head.confidence
    tokens = [[mixer.gate, *_both(mixer, "norm", "token1", "token2")] for mixer in mixers]
    channels = [_both(mixer, "channel1", "channel2") for mixer in mixers]
    packed = [*(t for each in channels for t in each), *_both(last, "fc1", "fc2")]
    sums = (state.sums, state.styles, state.masses)
    parameters = [head.centers, *(t for each in tokens for t in each), *packed]
    if state.masses.dtype != torch.float64 or not _takes(parameters, sums):
        return None

    def make() -> list[Tensor]:
        layers = [layer for mixer in mixers for layer in (mixer.channel1, mixer.channel2)]
        return launch.fold([[_layer(layer)] for layer in (*layers, last.fc1, last.fc2)])

    *made, fc1, bias1, fc2, bias2 = _kept(head, "mixers", packed, make)
    each = [launch.Mixer(*those, *made[4 * i : 4 * i + 4]) for i, those in enumerate(tokens)]
    return launch.fuse(*sums, head.centers, each, (fc1, bias1, fc2, bias2), least_mass)


def _takes(parameters: Sequence[Tensor], others: Sequence[Tensor] = ()) -> bool:
    """Whether a call with these tensors goes here."""
    tensors = (*parameters, *others)
    if not is_plain_call() or has_tangent(*tensors) or not are_plain(tensors) or launch.unavailable(torch.float32):
        return False
    gradient = torch.is_grad_enabled()
    return all(t.dtype == torch.float32 for t in parameters) and not any(
        t.device.type != "cpu" or (gradient and t.requires_grad) for t in tensors
    )


def _kept(head: ClusterAggregate, name: str, given: list[Tensor], make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What was made of parameters in an earlier call, or is now.

    It is made anew where a parameter is another, lies elsewhere or was changed in place: by PyTorch's count of such
    changes, and, as that leaves out those made through ``.data``, by a sample of the numbers.
    """
    key = [(t.data_ptr(), t.shape, t.stride(), 0 if t.is_inference() else t._version) for t in given]
    kept = head._kept.get(name)
    if kept is not None and kept.key == key and launch.sample(kept.sampled) == kept.sample:
        return kept.made
    held = [t.detach() for t in given]
    with torch.inference_mode(False), torch.no_grad():  # for calls in any mode
        made = make()
    lying = [t if t.is_contiguous() or t.ndim < 2 else t.mT for t in held]  # as in memory
    if not all(t.is_contiguous() for t in lying):  # of what lies between others no sample can be taken
        return made
    sampled = launch.sampled(lying)
    head._kept = {**head._kept, name: Kept(made, key, held, sampled, launch.sample(sampled))}
    return made


def _both(module: Any, *names: str) -> list[Tensor]:
    """Weights and biases of layers."""
    layers = [getattr(module, name) for name in names]
    return [t for layer in layers for t in (layer.weight, layer.bias)]


def _layer(layer: Any, norm: nn.LayerNorm | None = None, scaled: int = 0, scale: float = 1.0) -> launch.Layer:
    gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    return launch.Layer(layer.weight, layer.bias, gain, shift, scaled, scale)
