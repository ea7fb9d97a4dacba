"""Weights and inputs of the golden vectors of Cluster and Aggregate, and a stand-in of its authors' module.

``data/caface.npz`` holds what the authors' own modules gave in float64 (mk-minchul/caface at e94ad02, in eval mode).
Its weights and inputs are not stored: they come from 32-bit integer arithmetic, the same on any machine. The stand-in
has the authors' names of parameters, results and memory; what it computes is written from the paper's equations.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_kernels.integrations.caface import _names

VECTORS = Path(__file__).with_name("data") / "caface.npz"
F64 = torch.float64


def unit(seed: int, *shape: int) -> Tensor:
    """Float64 numbers in (0, 1): a hash of their place and the seed."""

    def times(x: Tensor, factor: int) -> Tensor:
        low, high = x & 0xFFFF, x >> 16  # of 32 bits, so that no product leaves int64
        return (low * factor + ((high * factor & 0xFFFF) << 16)) & 0xFFFFFFFF

    x = times(torch.arange(1, int(np.prod(shape)) + 1), 2654435761) + ((seed + 1) * 2246822519 & 0xFFFFFFFF)
    x = x & 0xFFFFFFFF
    x = times(x ^ x >> 15, 2246822519)
    x = times(x ^ x >> 13, 3266489917)
    return ((x ^ x >> 16).to(F64) + 0.5).div(2**32).view(shape)


@functools.cache
def spread(seed: int, *shape: int) -> Tensor:
    """Numbers in (-1, 1), the same tensor again at each call."""
    return 2 * unit(seed, *shape) - 1


@functools.cache
def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The entry of their state dict that is number `seed` among the sorted names."""
    s = spread(seed, *shape)
    one = torch.ones(shape, dtype=F64)
    if name.startswith("norm_emb"):
        return {"running_var": 40, "running_mean": 22, "scale": 0.8}[name.rpartition(".")[2]] * one
    for ending, value in {
        "running_var": 1 + 0.5 * s,
        "running_mean": 0.3 * s,
        "skip_connect_gate": 0.9 + 0.2 * s,
        "relu.weight": 0.2 * one,
        "cfc": 0.9 * s,
        "cfcs.0": 0.9 * s,
        "group_token": 0.2 * s,
    }.items():
        if name.endswith(ending):
            return value
    if len(shape) == 1:
        return 1 + 0.3 * s if name.endswith("weight") else 0.2 * s
    gain = 3.0 if ".assign." in name or name.endswith("conf_mlp.2.fc2.weight") else 1.7
    return gain * s / shape[1] ** 0.5


def recipe(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Values of the floating entries of these names and shapes; the table is a sinusoid."""
    names = sorted(name for name in shapes if name != "norm_emb.pe")
    state = {name: weight(name, shapes[name], seed) for seed, name in enumerate(names)}
    state["style_maker.cfcs.0"] = state["style_maker.cfc"]  # one parameter by two names
    angle = torch.arange(61, dtype=F64)[:, None] * 10000 ** (-torch.arange(0, 64, 2, dtype=F64) / 64)
    return state | {"norm_emb.pe": torch.stack([angle.sin(), angle.cos()], -1).flatten(1)}


def inputs(case: int, n: int, c: int, channels: int = 384) -> tuple[Tensor, Tensor]:
    """Features (n, c), whose norms lie well inside the steps of their code, and styles (n, channels, 2)."""
    direction = spread(1000 + case, n, c) + 0.5 * spread(2000 + case, 1, c)
    direction = direction / direction.square().sum(-1, keepdim=True).sqrt()
    step = (-33 + 67 * unit(3000 + case, n)).floor() + 0.2 + 0.6 * unit(4000 + case, n)
    styles = spread(5000 + case, n, channels, 2).clone()
    styles[..., 1] = 0.3 + 0.7 * styles[..., 1].abs()
    return direction * (22 + (40 + 1e-5) ** 0.5 * step / 10)[:, None], styles


class Golden:
    """A case: what went in, and what the authors' modules gave."""

    def __init__(self, name: str) -> None:
        with np.load(VECTORS) as arrays:
            about = json.loads(bytes(arrays["about"]))[name]
            self.given = {
                key.partition("/")[2]: torch.from_numpy(arrays[key])
                for key in arrays.files
                if key.startswith(f"{name}/")
            }
        self.chunkings: list[list[int]] = about["chunkings"]
        self.case: int = about["case"]
        self.options: dict[str, Any] = about["options"]
        self.model = Theirs(**self.options)
        self.features, self.styles = inputs(self.case, about["rows"], self.options.get("dim", 512))
        self.loss_weight = spread(7000 + self.case, self.options.get("dim", 512))

    def gradients_of(self, head: nn.Module) -> dict[str, Tensor]:
        """Those of a head's parameters, by the authors' names and in their shapes."""
        ours, shapes = dict(head.named_parameters()), dict(self.model.named_parameters())
        return {
            theirs: ours[name].grad.view(shapes[theirs].shape)
            for name, theirs in _names(self.options.get("depth", 2)).items()
            if name in ours
        }

    def sums(self, gradients: dict[str, Tensor]) -> Tensor:
        """(parameters, 2): of each gradient by their names, in order, a weighted sum and the sum of its absolutes."""
        rows = [
            torch.stack(
                [(gradients[name] * spread(9000 + i, *gradients[name].shape)).sum(), gradients[name].abs().sum()]
            )
            for i, name in enumerate(sorted(gradients))
        ]
        return torch.stack(rows)


def _layers(**layers: Any) -> nn.Module:
    module = nn.Module()
    for name, layer in layers.items():
        if isinstance(layer, nn.Parameter):
            module.register_parameter(name, layer)
        elif isinstance(layer, Tensor):
            module.register_buffer(name, layer)
        else:
            setattr(module, name, layer)
    return module


def _mlp(width: int, hidden: int, out: int | None = None) -> nn.Module:
    return _layers(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width if out is None else out))


def _run_mlp(mlp: Any, x: Tensor) -> Tensor:
    return mlp.fc2(F.gelu(mlp.fc1(x)))


class Theirs(nn.Module):
    """A stand-in of the authors' aggregator, with the weights of the recipe, in eval mode and float64."""

    def __init__(self, dim: int = 512, clusters: int = 4, depth: int = 2, channelwise: bool = True) -> None:
        super().__init__()
        cfc, d = nn.Parameter(torch.zeros(384, 2)), 128
        self.style_maker = _layers(
            cfc=cfc, cfcs=nn.ParameterList([cfc]), relu=nn.PReLU(), linear=nn.Linear(384, 64), bn=nn.BatchNorm1d(64)
        )
        self.norm_emb = _layers(
            scale=nn.Parameter(torch.ones(())), pe=torch.zeros(61, 64), norm_bn=nn.BatchNorm1d(1, affine=False)
        )
        blocks = [
            _layers(
                norm1=nn.LayerNorm(d),
                attn=_layers(qkv=nn.Linear(d, 3 * d), proj=nn.Linear(d, d), num_heads=8),
                norm2=nn.LayerNorm(d),
                mlp=_mlp(d, 4 * d),
            )
            for _ in range(depth)
        ]
        mixers = [
            _layers(
                skip_connect_gate=nn.Parameter(torch.ones(())),
                ln=nn.LayerNorm(2 * d),
                tokens_mlp_block=_mlp(clusters, 2 * clusters),
                channels_mlp_block=_mlp(2 * d, d),
            )
            for _ in range(depth)
        ]
        self.fusion_net = _layers(
            clustering_layer=_layers(
                group_token=nn.Parameter(torch.zeros(1, clusters, d)),
                blocks=nn.ModuleList(blocks),
                cluster_block=_layers(
                    norm_tokens=nn.LayerNorm(d),
                    norm_x=nn.LayerNorm(d),
                    assign=_layers(q_proj=nn.Linear(d, d), k_proj=nn.Linear(d, d)),
                ),
            ),
            conf_mlp=nn.ModuleList([*mixers, _mlp(2 * d, 2 * d, dim if channelwise else 1)]),
        )
        self.memory_count, self.memory, self.use_memory = -1, None, True
        self.double().eval()
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items() if value.is_floating_point()}
        self.load_state_dict(recipe(shapes), strict=False)

    def reset_memory(self) -> None:
        """No sequence runs."""
        self.memory_count, self.memory = -1, None

    def compress_intermediate(self, intermediate: list[Tensor]) -> Tensor:
        """Means and deviations of layers (N, S_i, 2) to styles (N, 64)."""
        sim: Any = self.style_maker
        return sim.bn(sim.linear(sim.relu((torch.cat(intermediate, 1) * sim.cfc).sum(-1))))

    def forward(self, folded_features: Tensor, intermediate: Tensor, return_attn: bool = True) -> dict[str, Any]:
        """Rows (B, n, C) and styles (B, n, 64) of sets of one length."""
        net: Any = self.fusion_net
        layer, embedding = net.clustering_layer, self.norm_emb
        norms = folded_features.norm(dim=-1, keepdim=True)
        code = (10 * embedding.norm_bn(norms.flatten(0, 1)).clamp(-3, 3)).long().view(norms.shape[:2]) + 30
        token = layer.group_token.expand(len(norms), -1, -1)
        h = torch.cat([torch.cat([intermediate, embedding.scale * embedding.pe[code]], -1), token], 1)
        for block in layer.blocks:
            q, k, v = block.attn.qkv(block.norm1(h)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
            weight = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            h = h + block.attn.proj((weight @ v).transpose(1, 2).flatten(2))
            h = h + _run_mlp(block.mlp, block.norm2(h))
        shared, key = layer.cluster_block, layer.cluster_block.norm_x(h[:, : norms.shape[1]])
        query = shared.assign.q_proj(shared.norm_tokens(token))
        attn = (query @ shared.assign.k_proj(key).mT / key.shape[-1] ** 0.5).softmax(-2)  # (B, M, n)
        mass = attn.sum(-1, keepdim=True)
        mean = attn / mass.detach().clamp(min=1)
        mu, style = mean @ (folded_features / (norms + 1e-5)), mean @ key
        memory = self.memory if self.memory_count > 0 else None
        if memory is not None:
            total = (memory["attn"] + mass).clamp(min=1e-6)
            mu = (memory["attn"] * memory["cluster_features"] + mass * mu) / total
            style = (memory["attn"] * memory["cluster_style"] + mass * style) / total
            mass = memory["attn"] + mass
        t = torch.cat([token, style], -1)
        *mixers, last = net.conf_mlp
        for mixer in mixers:
            t = mixer.skip_connect_gate * t + _run_mlp(mixer.tokens_mlp_block, mixer.ln(t).mT).mT
            t = t + _run_mlp(mixer.channels_mlp_block, mixer.ln(t))
        confidence = _run_mlp(last, t).softmax(-2)
        if self.memory_count > -1 and self.use_memory:
            kept = (mass, mu, style) if self.training else (mass.detach(), mu.detach(), style.detach())
            self.memory_count += 1
            self.memory = dict(zip(("attn", "cluster_features", "cluster_style"), kept, strict=True))
        else:
            self.memory = None
        conf = confidence * mu.norm(dim=-1, keepdim=True)
        attn = attn[:, None]
        return {
            "group_token": token,
            "aggregated": (mu * confidence).sum(-2),
            "attn_dict_list": [{"attn": attn, "hard": attn, "soft": attn} if return_attn else {"attn": attn}],
            "cluster_feature": mu,
            "cluster_style": style,
            "mu": mu,
            "conf": conf,
            "confidence_weight": confidence,
            "weights": conf / conf.sum(1, keepdim=True),
        }
