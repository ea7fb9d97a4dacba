"""For models of FaceCoresetNet's authors: their checkpoints into our head, our kernels into their model.

Their code is never imported. Their aggregation module is known by what it has: the two methods named below,
`gamma`, and for the attention `coreset_size` and its layers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fcn_kernels.files.checkpoint import load_checkpoint
from fcn_kernels.heads.facecoresetnet import (
    DISTANCE_SCALE,
    CoresetAggregator,
    HeadLayers,
    aggregate_sets,
    select_scaled,
)
from fcn_kernels.integrations.patching import (
    Model,
    Patched,
    check_keys,
    check_shapes,
    own_part,
    replace,
    restore,
)
from fcn_kernels.selection.select import coreset_select

PAPER_K = 3  # the paper's best size of a coreset
_SELECT = "differential_farthest_point_sample"
_AGGREGATE = "aggregate_fps_with_norm_priority"
_HOLDER = "aggregate_model"  # what a model calls the aggregation module that it holds
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
_WIDTH = "pos_trans_norm.weight"  # (C,)
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


def convert_state_dict(state_dict: Mapping[str, Any], *, gamma: float | None = None) -> dict[str, Tensor]:
    """The state dict of a :class:`fcn_kernels.CoresetAggregator` from that of the authors' aggregation module.

    Args:
        state_dict: of their ``TemplateAggregateModel``; of a model that holds it as ``aggregate_model``, of which the
            other keys are passed over; of a :class:`fcn_kernels.CoresetAggregator`; or a Lightning checkpoint,
            ``{"state_dict": ..., "hyper_parameters": ...}``, of any of these. Keys may carry the prefixes ``module.``
            and ``_orig_mod.`` that DistributedDataParallel and torch.compile leave, in any mixture. Parameters that
            their forward pass never uses may be there or not.
        gamma: to use instead of the checkpoint's. A model that was trained with a fixed gamma does not have it in its
            state dict; it is then taken from the ``gamma`` of the hyper-parameters.

    Raises:
        TypeError: what is under "state_dict" is no mapping.
        ValueError: keys of the aggregation module are missing, unknown, there twice or not finite; the message names
            them all.

    Example:
        >>> theirs = {"state_dict": {f"module.{name}": v for name, v in CoresetAggregator(32).state_dict().items()}}
        >>> CoresetAggregator(32).load_state_dict(convert_state_dict(theirs))
        <All keys matched successfully>
    """
    inner = own_part(state_dict, _HOLDER)
    names = {name: name for name in _NAMES.values()} if _NAMES[_WIDTH] in inner else _NAMES
    if gamma is None and "gamma" not in inner:
        gamma = _fixed_gamma(state_dict)
    if gamma is not None:
        inner["gamma"] = torch.tensor(float(gamma))
    known = {*names, *_UNUSED}
    unknown = [key for key in inner if key not in known and not key.startswith(_UNUSED_LAYERS)]
    check_keys(inner, names, unknown, "FaceCoresetNet")
    return {ours: inner[theirs] for theirs, ours in names.items()}


def _hyper_parameters(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    found = checkpoint.get("hyper_parameters")
    return found if isinstance(found, Mapping) else {}


def _fixed_gamma(checkpoint: Mapping[str, Any]) -> float | None:
    gamma = _hyper_parameters(checkpoint).get("gamma")
    return None if gamma is None or gamma == -1 else float(gamma)  # their -1 says that it is learned


def build_head(
    checkpoint: Mapping[str, Any], *, k: int | None = None, num_heads: int = 8, gamma: float | None = None
) -> CoresetAggregator:
    """The head of a checkpoint, in ``eval()``.

    Args:
        checkpoint: as in :func:`convert_state_dict`.
        k: rows to pick per set. None: ``coreset_size`` of the checkpoint's hyper-parameters, or 3 without these.
        num_heads: heads of both attentions, which a state dict does not tell.
        gamma: to use instead of the checkpoint's.

    Raises:
        TypeError, ValueError: as :func:`convert_state_dict` and :class:`fcn_kernels.CoresetAggregator`; or parameters
            have the wrong shapes, which the message names with those expected.

    Warns:
        UserWarning: k is given and is not what the checkpoint was trained with.

    Example:
        >>> state = {f"module.{name}": value for name, value in CoresetAggregator(32).state_dict().items()}
        >>> build_head({"state_dict": state, "hyper_parameters": {"coreset_size": 5}}).k
        5
    """
    state = convert_state_dict(checkpoint, gamma=gamma)
    trained = _hyper_parameters(checkpoint).get("coreset_size")
    if k is None:
        k = PAPER_K if trained is None else trained
    elif trained is not None and trained != k:
        warnings.warn(f"the checkpoint was trained with k = {trained}, and is used with k = {k}", stacklevel=2)
    width = state[_NAMES[_WIDTH]]
    if width.ndim != 1:
        raise ValueError(f"expected {_NAMES[_WIDTH]} of shape (C,), got {tuple(width.shape)}")
    head = CoresetAggregator(len(width), k, num_heads)
    check_shapes(state, head, f"C = {head.dim}, as {_NAMES[_WIDTH]} has")
    head.load_state_dict(state)
    return head.eval()


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """:func:`convert_state_dict` of a checkpoint file, read onto the CPU with ``weights_only=True``.

    Raises:
        TypeError, ValueError: as :func:`convert_state_dict`; or the file cannot be read, or holds no mapping.
    """
    return convert_state_dict(load_checkpoint(path))


def patch(model: Model, *, attention: bool = False) -> Model:
    """Let the authors' model select with :func:`fcn_kernels.coreset_select`; in place, and returned.

    Every module in `model` that has ``differential_farthest_point_sample(x, npoint, norms)`` and ``gamma``
    gets ours in place of that method. With ``attention=True``, so does ``aggregate_fps_with_norm_priority(
    template_features, template_norms, only_FPS)``, and no row is projected any more. Parameters, state dict
    and gradients stay theirs. Picks are samples while training, as theirs, though from other random numbers,
    and plain argmax in ``eval()``.

    Each such module becomes an instance of a subclass of its own class. Copies, pickles and DataParallel's replicas
    of it are patched too and use their own parameters. Patching again replaces the choice of ``attention``.

    Raises:
        ValueError: no such module is in the model; one has the method as an attribute of its own; or, with
            ``attention=True``, one lacks a layer or method.

    Example::

        model = facecoresetnet.patch(model, attention=True)  # of the authors, in training or not
    """

    def check(module: nn.Module) -> None:
        own = [name for name in (_SELECT, _AGGREGATE) if name in vars(module)]
        if own:
            raise ValueError(
                f"expected {own[0]} to be a method of {type(module).__name__}, got one of the module's own"
            )
        if attention:
            _check_layers(module)

    ours = _PatchedAttention if attention else _Patched
    return replace(model, (_SELECT, "gamma"), f"{_SELECT} and gamma", check, ours)


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`; in place, and returned. A model that is not patched stays as it is."""
    return restore(model, _Patched)


class _Patched(Patched):
    """With our selection."""

    def differential_farthest_point_sample(self: Any, x: Tensor, npoint: int | Tensor, norms: Tensor) -> Tensor:
        """Rows (B, N, C) as they are and their norms (B, N) to picks (B, npoint, C)."""
        return coreset_select(
            x, int(npoint), norms, _gamma(self), sample=self.training, distance_scale=DISTANCE_SCALE
        ).features


class _PatchedAttention(_Patched):
    """With the whole head."""

    def aggregate_fps_with_norm_priority(
        self: Any, template_features: Tensor, template_norms: Tensor, only_FPS: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Unit rows (B, N, C) and their norms (B, N) to the aggregate (B, C) and the picks (B, min(k, N), C)."""
        k = max(1, min(int(self.coreset_size), template_features.shape[1]))  # no rows give no pick
        if only_FPS:
            coreset = select_scaled(template_features, template_norms, k, _gamma(self), sample=self.training)
            aggregate = coreset.features.sum(1) / coreset.counts.clamp(min=1)[:, None]
        else:
            layers = HeadLayers(**{ours: attrgetter(theirs)(self) for ours, theirs in _LAYERS.items()})
            coreset, aggregate = aggregate_sets(
                layers, template_features, template_norms, k, _gamma(self), sample=self.training
            )
        dtype = template_features.dtype
        return aggregate.to(dtype), coreset.features.to(dtype)


def _check_layers(module: nn.Module) -> None:
    try:
        attrgetter("coreset_size", _AGGREGATE, *_LAYERS.values())(module)
    except AttributeError as error:
        raise ValueError(f"expected FaceCoresetNet's aggregation module, got one where {error}") from error


def _gamma(module: Any) -> Tensor | float:
    """Their exponent: a learned or a fixed part and, in later versions of their code, a constant."""
    return module.gamma + getattr(module, "gamma_base", 0.0)  # type: ignore[no-any-return]
