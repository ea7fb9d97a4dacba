"""For models of FaceCoresetNet's authors: their checkpoints into our head, our kernels into their model.

Their code is never imported. Their aggregation module is known by what it has: the two methods named below,
`gamma`, and for the attention `coreset_size` and its layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from operator import attrgetter
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fcn_kernels.heads.facecoresetnet import HeadLayers, aggregate_sets
from fcn_kernels.selection.select import Coreset, coreset_select

Model = TypeVar("Model", bound=nn.Module)

_SELECT = "differential_farthest_point_sample"
_AGGREGATE = "aggregate_fps_with_norm_priority"
_PREFIX = "aggregate_model."
_LAYERS = {  # a field of HeadLayers, and where it is in their module
    "encoding_norm": "pos_trans_norm",
    "self_attention": "decoder_layer1.self_attn1",
    "self_dropout": "decoder_layer1.dropout1",
    "self_norm": "decoder_layer1.norm1",
    "cross_attention": "decoder_layer1.multihead_attn1",
    "cross_dropout": "decoder_layer1.dropout2",
    "cross_norm": "decoder_layer1.norm2",
}
_LEAVES = {
    "norm": ("weight", "bias"),
    "attention": ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"),
    "dropout": (),
}
_NAMES = {"gamma": "gamma"} | {
    f"{theirs}.{leaf}": f"{ours}.{leaf}" for ours, theirs in _LAYERS.items() for leaf in _LEAVES[ours.split("_")[1]]
}
# In their state dict, but in no forward pass of theirs.
_UNUSED = ("tau", "feature_norm_normalizer", "ur_center", "dist_from_ur_center_norm_size_balance")
_UNUSED_LAYERS = (
    "quality_measure.",
    "decoder_layer1.self_attn2.",
    "decoder_layer1.multihead_attn2.",
    "decoder_layer1.multihead_attn3.",
    "decoder_layer1.norm3.",
    "decoder_layer1.norm4.",
)


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a :class:`fcn_kernels.CoresetAggregator` from that of the authors' aggregation
    module.

    Args:
        state_dict: of their ``TemplateAggregateModel``; or of a model that holds it as ``aggregate_model``,
            of which the other keys are passed over; or a Lightning checkpoint, ``{"state_dict": ...}``.
            Parameters that their forward pass never uses may be there or not.

    Raises:
        TypeError: what is under "state_dict" is no mapping.
        ValueError: keys of the aggregation module are missing or unknown; the message names them all.
    """
    inner = state_dict.get("state_dict", state_dict)
    if not isinstance(inner, Mapping):
        raise TypeError(f'expected a mapping under "state_dict", got {type(inner).__name__}')
    if any(key.startswith(_PREFIX) for key in inner):
        inner = {key.removeprefix(_PREFIX): v for key, v in inner.items() if key.startswith(_PREFIX)}
    missing = [key for key in _NAMES if key not in inner]
    known = {*_NAMES, *_UNUSED}
    unknown = [key for key in inner if key not in known and not key.startswith(_UNUSED_LAYERS)]
    if missing or unknown:
        raise ValueError(
            "expected the state dict of FaceCoresetNet's aggregation module, got one with missing keys "
            f"{missing} and unknown keys {unknown}"
        )
    return {ours: inner[theirs] for theirs, ours in _NAMES.items()}


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """:func:`convert_state_dict` of a checkpoint file, read onto the CPU with ``weights_only=True``."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"expected {os.fspath(path)} to hold a state dict, got {type(checkpoint).__name__}")
    return convert_state_dict(checkpoint)


def patch(model: Model, *, attention: bool = False) -> Model:
    """Let the authors' model select with :func:`fcn_kernels.coreset_select`; in place, and returned.

    Every module in `model` that has ``differential_farthest_point_sample(x, npoint, norms)`` and ``gamma``
    gets ours in place of that method. With ``attention=True``, so does ``aggregate_fps_with_norm_priority(
    template_features, template_norms, only_FPS)``, and no row is projected any more. Parameters, state dict
    and gradients stay theirs. Picks are samples while training, as theirs, though from other random numbers,
    and plain argmax in ``eval()``.

    Raises:
        ValueError: no such module is in the model; or, with ``attention=True``, one lacks a layer or method.
    """
    found = [module for module in model.modules() if hasattr(module, _SELECT) and hasattr(module, "gamma")]
    if not found:
        raise ValueError(f"expected a module with {_SELECT} and gamma in {type(model).__name__}, found none")
    if attention:
        for module in found:
            _check_layers(module)
    for module in found:
        setattr(module, _SELECT, MethodType(_select, module))
        if attention:
            setattr(module, _AGGREGATE, MethodType(_aggregate, module))
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`; in place, and returned. A model that is not patched stays as it is."""
    for module in model.modules():
        for name, ours in ((_SELECT, _select), (_AGGREGATE, _aggregate)):
            if getattr(vars(module).get(name), "__func__", None) is ours:
                delattr(module, name)
    return model


def _check_layers(module: nn.Module) -> None:
    try:
        attrgetter("coreset_size", _AGGREGATE, *_LAYERS.values())(module)
    except AttributeError as error:
        raise ValueError(f"expected FaceCoresetNet's aggregation module, got one where {error}") from error


def _coreset(module: Any, x: Tensor, k: int, norms: Tensor) -> Coreset:
    return coreset_select(x, k, norms, _gamma(module), sample=module.training, distance_scale=0.5)


def _gamma(module: Any) -> Tensor:
    """Their exponent: a learned part and, in later versions of their code, a constant."""
    return module.gamma + getattr(module, "gamma_base", 0.0)  # type: ignore[no-any-return]


def _select(self: Any, x: Tensor, npoint: int | Tensor, norms: Tensor) -> Tensor:
    """Rows (B, N, C) as they are and their norms (B, N) to picks (B, npoint, C)."""
    return _coreset(self, x, int(npoint), norms).features


def _aggregate(
    self: Any, template_features: Tensor, template_norms: Tensor, only_FPS: bool = False
) -> tuple[Tensor, Tensor]:
    """Unit rows (B, N, C) and their norms (B, N) to the aggregate (B, C) and the picks (B, min(k, N), C)."""
    k = min(int(self.coreset_size), template_features.shape[1])
    if only_FPS:
        coreset = _coreset(self, template_features * template_norms[..., None], k, template_norms)
        return coreset.features.sum(1) / coreset.counts.clamp(min=1)[:, None], coreset.features
    layers = HeadLayers(**{ours: attrgetter(theirs)(self) for ours, theirs in _LAYERS.items()})
    coreset, aggregate = aggregate_sets(
        layers, template_features, template_norms, k, _gamma(self), sample=self.training
    )
    return aggregate, coreset.features
