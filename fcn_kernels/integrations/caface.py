"""For models of the authors of Cluster and Aggregate (CAFace): their checkpoints into our head, our head into theirs.

Their code is never imported. Their aggregator is known by what it has: ``style_maker``, ``fusion_net``, ``norm_emb``
and ``memory_count``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fcn_kernels.clustering.problem import EPS_LAYER_NORM
from fcn_kernels.files.checkpoint import load_checkpoint
from fcn_kernels.heads.cluster_aggregate import LEAST_MASS, ClusterAggregate, Mixer, Mlp
from fcn_kernels.heads.cluster_state import ClusterState
from fcn_kernels.heads.style import NormCode
from fcn_kernels.integrations.patching import (
    Model,
    Patched,
    check_keys,
    check_shapes,
    own_part,
    replace,
    restore,
)

_HOLDER = "aggregator"  # what a model calls the aggregation module that it holds
_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_CLUSTERING, _MIXING = "fusion_net.clustering_layer.", "fusion_net.conf_mlp."
_SAME = {"style_maker.cfcs.0": "style_maker.cfc"}  # one parameter of theirs by two names
_MODULES = {  # a layer of ours, and where it is in their module
    "style.linear": "style_maker.linear",
    "assign.center_norm": f"{_CLUSTERING}cluster_block.norm_tokens",
    "assign.key_norm": f"{_CLUSTERING}cluster_block.norm_x",
    "assign.query": f"{_CLUSTERING}cluster_block.assign.q_proj",
    "assign.key": f"{_CLUSTERING}cluster_block.assign.k_proj",
}
_BLOCK = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_MIXER = {
    "norm": "ln",
    "token1": "tokens_mlp_block.fc1",
    "token2": "tokens_mlp_block.fc2",
    "channel1": "channels_mlp_block.fc1",
    "channel2": "channels_mlp_block.fc2",
}
_TENSORS = {
    "style.mix": "style_maker.cfc",
    "style.prelu.weight": "style_maker.relu.weight",
    **{f"style.norm.{name}": f"style_maker.bn.{name}" for name in (*_AFFINE, *_STATISTICS)},
    **{f"norm_code.norm.{name}": f"norm_emb.norm_bn.{name}" for name in _STATISTICS},
    "norm_code.scale": "norm_emb.scale",
    "norm_code.table": "norm_emb.pe",
    "centers": f"{_CLUSTERING}group_token",
}


def _names(depth: int) -> dict[str, str]:
    """Our names of parameters and buffers, and theirs, of a model with so many blocks and mixers."""
    modules, tensors = dict(_MODULES), dict(_TENSORS)
    for i in range(depth):
        modules |= {f"blocks.{i}.{ours}": f"{_CLUSTERING}blocks.{i}.{theirs}" for ours, theirs in _BLOCK.items()}
        modules |= {f"mixers.{i}.{ours}": f"{_MIXING}{i}.{theirs}" for ours, theirs in _MIXER.items()}
        tensors[f"mixers.{i}.gate"] = f"{_MIXING}{i}.skip_connect_gate"
    modules |= {f"confidence.{layer}": f"{_MIXING}{depth}.{layer}" for layer in ("fc1", "fc2")}
    leaves = {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in modules.items() for leaf in _AFFINE}
    return tensors | leaves


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a :class:`fcn_kernels.ClusterAggregate` from that of the authors' aggregator.

    Args:
        state_dict: of their aggregator; of a model that holds it as ``aggregator``, of which the other keys are passed
            over; of a :class:`fcn_kernels.ClusterAggregate`; or a Lightning checkpoint, ``{"state_dict": ...}``, of any
            of these. Keys may carry the prefixes ``module.`` and ``_orig_mod.`` that DistributedDataParallel and
            torch.compile leave.

    Raises:
        TypeError: what is under "state_dict" is no mapping.
        ValueError: keys of the aggregator are missing, unknown, there twice or not finite; the message names them all.
            Or the one parameter that is there by two names has two values.

    Example:
        >>> ours = {f"module.{name}": value for name, value in ClusterAggregate(32).state_dict().items()}
        >>> ClusterAggregate(32).load_state_dict(convert_state_dict({"state_dict": ours}))
        <All keys matched successfully>
    """
    inner = own_part(state_dict, _HOLDER)
    if "centers" in inner:
        return _ours(inner)
    for copy, name in _SAME.items():
        if copy in inner:
            if name in inner and not inner[copy].equal(inner[name]):
                raise ValueError(f"expected {copy} to be {name}, one parameter by two names, got other values")
            inner[name] = inner.pop(copy)
    names = {theirs: ours for ours, theirs in _names(_depth(inner, f"{_CLUSTERING}blocks")).items()}
    check_keys(inner, names, [key for key in inner if key not in names], "CAFace")
    state = {ours: inner[theirs] for theirs, ours in names.items()}
    centers = state["centers"]
    if centers.ndim != 3 or len(centers) != 1:
        raise ValueError(f"expected {_TENSORS['centers']} of shape (1, M, d), got {tuple(centers.shape)}")
    return state | {"centers": centers[0]}


def _ours(inner: Mapping[str, Any]) -> dict[str, Tensor]:
    """A head of ours, with or without a style input."""
    names = {ours: ours for ours in _names(_depth(inner, "blocks"))}
    if "style.mix" not in inner:
        names = {name: name for name in names if not name.startswith("style.")}
    check_keys(inner, names, [key for key in inner if key not in names], "CAFace")
    return {name: inner[name] for name in names}


def _depth(inner: Mapping[str, Any], blocks: str) -> int:
    found = [re.match(re.escape(blocks) + r"\.(\d+)\.", key) for key in inner]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def recognizes(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of the authors' aggregator or of a :class:`fcn_kernels.ClusterAggregate`, by its keys."""
    inner = checkpoint.get("state_dict", checkpoint)
    return isinstance(inner, Mapping) and any("norm_emb." in key or "norm_code." in key for key in map(str, inner))


def build_head(checkpoint: Mapping[str, Any], *, dim: int | None = None, num_heads: int = 8) -> ClusterAggregate:
    """The head of a checkpoint, in ``eval()``; its sizes are those of the checkpoint's parameters.

    Args:
        checkpoint: as in :func:`convert_state_dict`.
        dim: columns of the features, which a checkpoint with a confidence of one channel does not tell. None: what it
            tells, or 512.
        num_heads: of the attention, which a state dict does not tell.

    Raises:
        TypeError, ValueError: as :func:`convert_state_dict` and :class:`fcn_kernels.ClusterAggregate`; parameters have
            shapes that do not fit each other, which the message names with those expected; or `dim` is not that of the
            checkpoint.

    Example:
        >>> head = ClusterAggregate(32, clusters=5, depth=1)
        >>> build_head(head.state_dict()).extra_repr()
        'dim=32, clusters=5, width=128, num_heads=8, channelwise=True, drop_path=0.1'
    """
    state = convert_state_dict(checkpoint)
    for name, ndim in (("centers", 2), ("norm_code.table", 2), ("confidence.fc2.weight", 2), ("style.mix", 2)):
        if name in state and state[name].ndim != ndim:
            raise ValueError(f"expected {name} of {ndim} dimensions, got shape {tuple(state[name].shape)}")
    (clusters, width), norm_dim = state["centers"].shape, state["norm_code.table"].shape[1]
    channels = len(state["confidence.fc2.weight"])
    if channels > 1 and dim not in (None, channels):
        raise ValueError(f"expected a checkpoint for C = {dim}, got one for C = {channels}")
    head = ClusterAggregate(
        channels if channels > 1 else dim or 512,
        clusters,
        _depth(state, "blocks"),
        width - norm_dim,
        norm_dim,
        num_heads,
        channels > 1,
        style_channels=len(state["style.mix"]) if "style.mix" in state else 0,
    )
    check_shapes(state, head, f"M = {clusters} centers of d = {width}, as the checkpoint has")
    head.load_state_dict(state)
    return head.eval()


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """:func:`convert_state_dict` of a checkpoint file, read onto the CPU with ``weights_only=True``.

    Raises:
        TypeError, ValueError: as :func:`convert_state_dict`; or the file cannot be read, or holds no mapping.
    """
    return convert_state_dict(load_checkpoint(path))


def patch(model: Model) -> Model:
    """Let the authors' model cluster and aggregate with our head; in place, and returned.

    Every module in `model` that has ``style_maker``, ``fusion_net``, ``norm_emb`` and ``memory_count`` gets our
    computation in its ``forward(folded_features, intermediate, return_attn=True)``. Parameters, state dict, results and
    memory stay theirs, by their names, and a sequence goes on by their ``memory_count``. Rows that are not finite are
    left out, where theirs raise or spoil the set; ``attn`` carries no gradient, the mass in the memory does.

    Each such module becomes an instance of a subclass of its own class. Copies, pickles and DataParallel's replicas of
    it are patched too and use their own parameters.

    Raises:
        ValueError: no such module is in the model; or one has other layers than the published configurations.

    Example::

        model = caface.patch(model)  # of the authors, in training or not
    """
    return replace(model, _MARKS, ", ".join(_MARKS), _check_layers, _Patched)


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`; in place, and returned. A model that is not patched stays as it is."""
    return restore(model, _Patched)


_MARKS = ("style_maker", "fusion_net", "norm_emb", "memory_count")
_MEMORY = ("attn", "cluster_features", "cluster_style")  # masses (B, M, 1), means (B, M, C) and styles (B, M, d)


def _check_layers(module: nn.Module) -> None:
    try:
        norms = attrgetter(*(f"{_CLUSTERING}cluster_block.{name}" for name in ("norm_tokens", "norm_x")))(module)
        for block in attrgetter(f"{_CLUSTERING}blocks")(module):
            norms = (*norms, *attrgetter("norm1", "norm2")(block))
            attrgetter(*_BLOCK.values())(block)
        attrgetter(*_MODULES.values(), "norm_emb.norm_bn", "norm_emb.pe")(module)
    except AttributeError as error:
        raise ValueError(f"expected CAFace's aggregator, got one where {error}") from error
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm) or norm.eps != EPS_LAYER_NORM:
            raise ValueError(f"expected blocks with LayerNorms of eps {EPS_LAYER_NORM}, got {norm}")
    maker = getattr(module, "input_maker", None)
    if maker is not None and not isinstance(maker, nn.Identity):
        raise ValueError(f"expected tokens to be styles and codes as they are, got an input_maker {maker}")


class _Patched(Patched):
    """With our head."""

    def forward(self: Any, folded_features: Tensor, intermediate: Tensor, return_attn: bool = True) -> dict[str, Any]:
        """Rows (B, n, C) and their styles (B, n, style_dim) to their result; their memory goes on."""
        head = _adopted(self, folded_features.shape[-1])
        shares, state = head.shares(folded_features, intermediate)
        memory = self.memory if self.memory_count > 0 else None
        if memory is not None:
            mass, means, styles = (memory[name].to(state.masses.dtype) for name in _MEMORY)
            state = ClusterState(mass * means, mass * styles, mass[..., 0], torch.zeros_like(state.counts)) + state
        fused = head.fuse(state)
        dtype = folded_features.dtype
        style = state.styles / state.masses.clamp(min=LEAST_MASS)[..., None]
        mass, mu, style = (t.to(dtype) for t in (state.masses[..., None], fused.means, style))
        self.memory = None
        if self.memory_count > -1 and self.use_memory:
            kept = (mass, mu, style) if self.training else (mass.detach(), mu.detach(), style.detach())
            self.memory_count += 1
            self.memory = dict(zip(_MEMORY, kept, strict=True))
        attn = shares.mT[:, None].to(dtype)  # (B, 1, M, n)
        confidence = fused.confidence.to(dtype)
        conf = confidence * torch.linalg.vector_norm(mu, dim=-1, keepdim=True)
        return {
            "group_token": self.fusion_net.clustering_layer.group_token.expand(len(mu), -1, -1),
            "aggregated": (fused.means * fused.confidence).sum(1).to(dtype),
            "attn_dict_list": [{"attn": attn, "hard": attn, "soft": attn} if return_attn else {"attn": attn}],
            "cluster_feature": mu,
            "cluster_style": style,
            "mu": mu,
            "conf": conf,
            "confidence_weight": confidence,
            "weights": conf / conf.sum(1, keepdim=True),
        }


def _made(kind: type[nn.Module], **parts: Any) -> Any:
    """A module of a kind with these parts, without drawing parameters that nobody will use."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def _taken(kind: type[nn.Module], theirs: Any, names: Mapping[str, str], **more: Any) -> Any:
    return _made(kind, **{ours: attrgetter(name)(theirs) for ours, name in names.items()}, **more)


def _adopted(theirs: Any, dim: int) -> ClusterAggregate:
    """A head whose layers are those of their module: made for a call, as they may be exchanged at any time."""
    layer, embedding = theirs.fusion_net.clustering_layer, theirs.norm_emb
    *mixers, last = theirs.fusion_net.conf_mlp
    blocks = list(layer.blocks)
    rates = [float(getattr(getattr(block, "drop_path", None), "drop_prob", 0) or 0) for block in blocks]
    assign = {name.partition(".")[2]: path for name, path in _MODULES.items() if name.startswith("assign.")}
    head = _made(
        ClusterAggregate,
        dim=dim,
        style_dim=layer.group_token.shape[-1] - embedding.pe.shape[-1],
        num_heads=getattr(blocks[0].attn, "num_heads", 8) if blocks else 8,
        channelwise=len(last.fc2.weight) > 1,
        drop_path=max(rates, default=0.0),
        style=None,
        norm_code=_made(NormCode, norm=embedding.norm_bn, scale=embedding.scale, table=embedding.pe),
        blocks=nn.ModuleList(_taken(nn.Module, block, _BLOCK) for block in blocks),
        assign=_taken(nn.Module, theirs, assign),
        mixers=nn.ModuleList(_taken(Mixer, mixer, _MIXER, gate=mixer.skip_connect_gate) for mixer in mixers),
        confidence=_taken(Mlp, last, {"fc1": "fc1", "fc2": "fc2"}),
        centers=layer.group_token[0],
    )
    # not train(), which would set the mode of their layers
    object.__setattr__(head, "training", theirs.training)
    return head  # type: ignore[no-any-return]
