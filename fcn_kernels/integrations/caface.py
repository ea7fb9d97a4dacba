"""For models of the authors of Cluster and Aggregate (CAFace): their checkpoints into our head.

Their code is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fcn_kernels.integrations.patching import check_keys, own_part

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
