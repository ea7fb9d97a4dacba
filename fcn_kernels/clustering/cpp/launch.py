"""Chunks in C++: the forward pass of CPUs that have a compiler. ``clustering.cpp`` says how it works.

The backward pass is ``torch_backend``'s, from the tokens kept here.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fcn_kernels.clustering import torch_backend
from fcn_kernels.clustering.problem import Chunks, ChunksGradients, Clustered, Summed
from fcn_kernels.cpp import calls

_SOURCE = Path(__file__).with_name("clustering.cpp")
_function = calls.functions(_SOURCE, {"forward": 0, "fold": 0, "fuse": 1, "sample": 1})
# Call and Clustered of batch.h; Many, Given and Sampled of fold.h; FuseCall, Fused and Mixer of fuse.h: addresses, 0
# for what is not given; sizes; numbers
_CALL, _OUT = struct.Struct("24P10q"), struct.Struct("6P")
_MANY, _LAYER, _SAMPLED = struct.Struct("2q"), struct.Struct("7P3qd"), struct.Struct("Pq")
_FUSE, _FUSED, _MIXER = struct.Struct("8P7qd"), struct.Struct("4P"), struct.Struct("11P")
_LAYERS = ("qkv", "proj", "fc1", "fc2")
_PANEL = 32  # outputs that a layer's panels have room for are a multiple of it
_panels = WeakTensorKeyDictionary()
"""Of weights that :func:`fold` has made, and nobody changes."""


def chunks_backward(p: Chunks, grad: Summed, out: Clustered, wanted: bool) -> ChunksGradients:
    """PyTorch's, from the tokens that the forward pass kept."""
    return torch_backend.chunks_backward(p, grad, out, wanted)


class Layer(NamedTuple):
    """A layer (outputs, inputs), the LayerNorm before it, and a scale of its first outputs."""

    weight: Tensor
    bias: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    scaled: int = 0
    scale: float = 1.0


@functools.cache
def unavailable(dtype: torch.dtype) -> str:
    """Why chunks of rows of this type cannot run in C++, or "" if they can."""
    if dtype == torch.float64:
        return "float64 rows are PyTorch's"
    return calls.why_unavailable(_SOURCE, dtype)


def chunks_forward(p: Chunks, keep: bool) -> Clustered:
    """Everything in one call."""
    features = p.features if p.features.stride(1) == 1 or p.features.shape[1] == 1 else p.features.contiguous()
    found = Clustered.empty(p, keep)
    found.shares.zero_()  # of rows that take no part
    found.hidden.zero_()
    weights = [getattr(p, f"{name}_weight") for name in _LAYERS]
    panels = [_panels.get(weight) for weight in weights]
    layers = [
        t for name, w in zip(_LAYERS, weights, strict=True) for t in (_inputs_first(w), getattr(p, f"{name}_bias"))
    ]
    plain = functools.partial(calls.plain, dtype=p.tokens.dtype)
    held = (
        features,
        *map(plain, (p.quality, p.styles)),
        calls.plain(p.valid, torch.bool),
        *map(plain, (p.table, p.edges, p.tokens, *layers, *panels, _inputs_first(p.weight), p.bias, p.residual)),
        *(calls.plain(t, torch.int64) for t in (p.offsets, p.lengths)),
    )
    (rows, width), (centers, dim), chunks = features.shape, p.tokens.shape, p.lengths.shape[0]
    call = _CALL.pack(
        *calls.addresses(held),
        rows,
        chunks,
        width,
        features.stride(0),
        dim,
        p.table.shape[1],
        centers,
        p.depth,
        p.heads,
        calls.threads(),
    )
    status = _function("forward", features.dtype)(call, _OUT.pack(*calls.addresses(found)))
    calls.check_status(status, f"the clustering C++ for {rows} rows of {width} in {chunks} chunks")
    return found


def fold(kinds: Sequence[Sequence[Layer]]) -> list[Tensor]:
    """Weight (L, outputs, inputs) and bias (L, outputs) of each kind, for rows that no LayerNorm's own are applied to.

    float32, without a graph, and not to be changed: the forward pass keeps what it packs of them while they live.
    """
    made: list[Tensor] = []
    packed, held = [], []
    for layers in kinds:
        (outputs, inputs), new = layers[0].weight.shape, layers[0].weight.new_empty
        weights, biases = new(len(layers), inputs, outputs), new(len(layers), outputs)
        panels = new(len(layers), -(-outputs // _PANEL) * _PANEL * inputs)
        for i, layer in enumerate(layers):
            given = [calls.plain(t, torch.float32) for t in layer[:4]]
            held.append(given)
            addresses = calls.addresses((*given, weights[i], biases[i], panels[i]))
            packed.append(_LAYER.pack(*addresses, inputs, outputs, layer.scaled, layer.scale))
        made += [weights.mT, biases]
        _panels[made[-2]] = panels
    status = _function("fold", torch.float32)(_MANY.pack(len(packed), 1), b"".join(packed))
    calls.check_status(status, f"the folding of {len(packed)} layers")
    return made


def sampled(tensors: Sequence[Tensor]) -> bytes:
    """float32 tensors as :func:`sample` takes them, while they are where they are."""
    return b"".join(_SAMPLED.pack(t.data_ptr(), t.numel()) for t in tensors)


def sample(tensors: bytes) -> int:
    """A number that all of a small tensor, and a little of a large one, changes."""
    found = ctypes.c_uint64()
    count = len(tensors) // _SAMPLED.size
    _function("sample", torch.float32)(_MANY.pack(count, 1), tensors, ctypes.addressof(found))
    return found.value


class Fused(NamedTuple):
    """What comes of B sets."""

    descriptor: Tensor  # (B, C)
    norm: Tensor  # (B,)
    means: Tensor  # (B, M, C)
    confidence: Tensor  # (B, M, C) or (B, M, 1)


class Mixer(NamedTuple):
    """A layer of the aggregation network, of d = 2 width: the channels' weights are :func:`fold`'s."""

    gate: Tensor
    gain: Tensor
    shift: Tensor
    token1: Tensor
    token1_bias: Tensor
    token2: Tensor
    token2_bias: Tensor
    channel1: Tensor
    channel1_bias: Tensor
    channel2: Tensor
    channel2_bias: Tensor


def fuse(
    sums: Tensor,
    styles: Tensor,
    masses: Tensor,
    centers: Tensor,
    mixers: Sequence[Mixer],
    confidence: Sequence[Tensor],
    least_mass: float,
) -> Fused:
    """Descriptors of sets from their sums, float64; the head's parameters are float32, and get no graph.

    Args:
        sums, styles, masses: (B, M, C), (B, M, d), (B, M).
        centers: (M, d).
        mixers: each layer's.
        confidence: weights and biases of its two layers, (1, ..), as :func:`fold` makes them.
        least_mass: that sums are divided by.
    """
    (sets, clusters, width), new = sums.shape, centers.new_empty
    channels = confidence[3].shape[1]
    found = Fused(new(sets, width), new(sets), new(sets, clusters, width), new(sets, clusters, channels))
    given = [calls.plain(t, torch.float64) for t in (sums, styles, masses)]
    given += [calls.plain(t, torch.float32) for t in (centers, *map(_packed, confidence))]
    held = [[calls.plain(_packed(t), torch.float32) for t in mixer] for mixer in mixers]
    sizes = (sets, clusters, width, centers.shape[1], len(mixers), channels, calls.threads())
    status = _function("fuse", torch.float32)(
        _FUSE.pack(*calls.addresses(given), *sizes, least_mass),
        _FUSED.pack(*calls.addresses(found)),
        b"".join(_MIXER.pack(*calls.addresses(mixer)) for mixer in held),
    )
    calls.check_status(status, f"the clustering C++ for the descriptors of {sets} sets")
    return found


def _packed(tensor: Tensor) -> Tensor:
    """The panels of a weight that :func:`fold` has made; any other tensor as it is."""
    found: Tensor = _panels.get(tensor, tensor)
    return found


def _inputs_first(weight: Tensor) -> Tensor:
    """(..., outputs, inputs) to (..., inputs, outputs), contiguous: as it is, if it lies so in memory."""
    return weight.mT.contiguous()
