"""FaceCoresetNet's aggregation head: from a set of face embeddings to one descriptor."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fcn_kernels import checks, distributed
from fcn_kernels.attention.encoding import Waves, sinusoid
from fcn_kernels.attention.op import set_attention
from fcn_kernels.backends import without_autocast
from fcn_kernels.group import Group, gather
from fcn_kernels.noise import draw_seed
from fcn_kernels.selection.ranks import Ranks
from fcn_kernels.selection.select import Coreset, CoresetState, coreset_select
from fcn_kernels.sets import RowSets, accumulator, unpack_nested

DISTANCE_SCALE = 0.5  # of the authors' code: (1 - cos) / 2


class Aggregate(NamedTuple):
    """What :class:`CoresetAggregator` returns. One set alone has no leading B."""

    descriptor: Tensor
    """(B, C), unit length, in the dtype of the head's weights; zero for a set with no row to pick."""
    norm: Tensor
    """(B,), the descriptor's length before it was made unit; float32, or float64 for a float64 head."""
    coreset: Coreset
    """The picks; their rows scaled to their norms, in float32 (float64 for float64 features)."""


class HeadLayers(NamedTuple):
    """The learned layers of the head, ours or the authors'."""

    encoding_norm: nn.LayerNorm
    self_attention: nn.MultiheadAttention
    self_dropout: nn.Dropout
    self_norm: nn.LayerNorm
    cross_attention: nn.MultiheadAttention
    cross_dropout: nn.Dropout
    cross_norm: nn.LayerNorm


class CoresetAggregator(nn.Module):
    r"""The aggregation head of FaceCoresetNet: a set of face embeddings in, one descriptor out.

    With unit features f, their norms q, rows x = q f and enc the LayerNorm of a sinusoid of the norm::

        core  = the k rows selected by quality and distance (distance scale 1/2)
        t     = core + enc(|core|);  t = norm(t + attention(t, t, t))
        delta = norm(core + attention(t, x + enc(q), x))            query, key, value
        agg   = mean over the picks of core + delta
        descriptor = agg / |agg|,  norm = |agg|

    The second attention never projects the set (see :mod:`fcn_kernels.attention.op`): its cost is two thin products
    over the rows, so it grows linearly with their number. Picks are samples in ``train()``, argmax in ``eval()``.
    Everything after the selection is computed in float32 (float64 for a float64 head), also under autocast and for
    float16 and bfloat16 weights, so norms above 65,504 are fine.

    Args:
        dim: C, columns of the features; even and divisible by num_heads.
        k: rows to pick per set, at least 1.
        num_heads: heads of both attentions, at least 1.
        dropout: probability in [0, 1), for attention weights and for each attention's output.
        gamma: initial value of the learned exponent of the quality in the distance, finite.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range.

    Source: Shapira and Keller, "FaceCoresetNet: Differentiable Coresets for Face Set Recognition", AAAI 2024,
    section 3. Checkpoints of the authors load through :mod:`fcn_kernels.integrations.facecoresetnet`.

    Example:
        >>> head = CoresetAggregator(dim=512).eval()
        >>> embeddings = torch.randn(2, 20, 512)
        >>> quality = embeddings.norm(dim=-1)
        >>> head(embeddings / quality[..., None], quality).descriptor.shape
        torch.Size([2, 512])
    """

    def __init__(
        self, dim: int = 512, k: int = 3, num_heads: int = 8, dropout: float = 0.1, gamma: float = 0.01
    ) -> None:
        super().__init__()
        dim, k, num_heads = (
            checks.at_least_one(name, value) for name, value in (("dim", dim), ("k", k), ("num_heads", num_heads))
        )
        if dim % 2 or dim % num_heads:
            raise ValueError(f"expected dim even and divisible by num_heads = {num_heads}, got {dim}")
        if not 0 <= _number("dropout", dropout) < 1:
            raise ValueError(f"expected dropout in [0, 1), got {dropout!r}")
        if not math.isfinite(torch.tensor(_number("gamma", gamma), device="cpu").item()):
            raise ValueError(f"expected gamma finite in float32, got {gamma!r}")
        self.dim = dim
        self.k = k
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))
        self.encoding_norm = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        features: Tensor,
        quality: Tensor,
        *,
        noise: Tensor | None = None,
        generator: Generator | None = None,
        distinct: bool = False,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        strict: bool = False,
        group: Group = None,
    ) -> Aggregate:
        """Aggregate each set.

        Args:
            features: (B, N, C) unit rows; (N, C) for one set; or (T, C) packed sets with cu_seqlens. float32,
                bfloat16, float16 or float64. A nested tensor of layout ``torch.jagged`` is packed sets.
            quality: (B, N), (N,) or (T,), the norms the rows had, above 0; a last axis of size 1 may follow. Nested or
                packed for nested features.
            noise: (k, B, N), (k, N) or (k, T) Gumbel samples to pick with; drawn while training if None.
            generator: draws the seed of the picks. Dropout follows torch's default generators.
            distinct: never pick a row twice.
            mask, lengths, cu_seqlens: which rows take part, at most one of the three, as in
                :func:`fcn_kernels.coreset_select`; a mask may be 0/1 integers. No row and no set at all are fine.
            strict: raise if a row that takes part cannot be picked, naming set and row. Waits for the device.
            group: a torch.distributed group over whose ranks the rows of each set are spread; these are this rank's.
                All ranks get the same descriptors, and are to run the same loss on them: then parameters get the same
                gradients on all, those of one process, and each rank's rows their own. Dropout draws the same on all
                ranks, but not what one process draws. None: all rows are here.

        Returns:
            An :class:`Aggregate` of descriptor (B, C), norm (B,) and coreset; without B for one set alone. A set
            with fewer than k rows uses those it has; one without any has descriptor and norm 0. Rows that can never
            be picked (features or quality not finite, features all 0, quality not above 0) take no part at all: they
            change nothing, and their gradient is 0. Gradients reach features, quality and all parameters.

        Raises:
            TypeError, ValueError: as :func:`fcn_kernels.coreset_select`, naming what was expected.
        """
        if not isinstance(features, Tensor) or not isinstance(quality, Tensor):
            got = f"{type(features).__name__} and {type(quality).__name__}"
            raise TypeError(f"expected features and quality to be Tensors, got {got}")
        features, quality, cu_seqlens = unpack_nested(features, quality, mask, lengths, cu_seqlens)
        if features.ndim not in ((2, 3) if cu_seqlens is None else (2,)) or features.shape[-1] != self.dim:
            shape = (
                f"(B, N, {self.dim}) or (N, {self.dim})" if cu_seqlens is None else f"(T, {self.dim}) with cu_seqlens"
            )
            raise ValueError(f"expected features of shape {shape}, got {tuple(features.shape)}")
        coreset, aggregate = aggregate_sets(
            self._layers(),
            features,
            quality,
            self.k,
            self.gamma,
            sample=self.training,
            noise=noise,
            generator=generator,
            distinct=distinct,
            mask=mask,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            strict=strict,
            group=group,
        )
        norm = _length(aggregate)
        descriptor = aggregate / torch.where(norm > 0, norm, 1)[..., None]
        return Aggregate(descriptor.to(self.self_norm.weight.dtype), norm, coreset)

    def _layers(self) -> HeadLayers:
        return HeadLayers(
            self.encoding_norm,
            self.self_attention,
            self.dropout,
            self.self_norm,
            self.cross_attention,
            self.dropout,
            self.cross_norm,
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, k={self.k}"


def select_scaled(
    features: Tensor,
    quality: Tensor,
    k: int,
    gamma: Tensor | float,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
    **options: Any,
) -> Coreset:
    """The coreset of rows x = q f, from unit rows f and their norms q; its rows are float32, or float64 for float64.

    The straight-through mean runs over x and weighs each row by its norm, so x is made where a gradient is asked for.
    The picks themselves do not depend on the rows' lengths: without a gradient, only the picked rows are scaled.
    """
    options |= {"distance_scale": DISTANCE_SCALE, "lengths": lengths, "cu_seqlens": cu_seqlens}
    select: Callable[..., Coreset | CoresetState] = coreset_select
    if group is not None:
        options["group"], select = group, distributed.coreset_select
    scale = quality.to(accumulator(features.dtype))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (features, quality, gamma) if isinstance(t, Tensor)):
        # A row that is not finite is left as it is: the gradient of its product would be 0 times NaN.
        scale = scale.where(_finite(features.detach()) & scale.detach().isfinite(), 1)
        coreset = select(features * scale[..., None], k, quality, gamma, **options)
        assert isinstance(coreset, Coreset)
        return coreset
    coreset = select(features, k, quality, gamma, **options)
    assert isinstance(coreset, Coreset)
    if group is not None:
        sets = _row_sets(features, lengths, cu_seqlens)
        ranks = Ranks(group, sets.lengths)
        places = ranks.places(coreset.indices.view(len(sets.lengths), -1))
        scale = ranks.sum(sets.take(scale.flatten(), places)).view(coreset.indices.shape)
    elif cu_seqlens is not None:
        scale = RowSets.packed(cu_seqlens, features.device).take(scale, coreset.indices)
    else:
        last = torch.where(coreset.indices < 0, scale.shape[-1], coreset.indices)
        scale = F.pad(scale, (0, 1)).gather(-1, last)
    return coreset._replace(features=coreset.features * scale[..., None])


def _finite(rows: Tensor) -> Tensor:
    """Which rows (..., C) have finite elements alone; in two reductions without a copy."""
    return (rows.amax(-1) < torch.inf) & (rows.amin(-1) > -torch.inf)


def aggregate_sets(
    layers: HeadLayers,
    features: Tensor,
    quality: Tensor,
    k: int,
    gamma: Tensor | float,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
    **options: Any,
) -> tuple[Coreset, Tensor]:
    """The head with given layers: the picks, and (B, C) before it is made unit. As in CoresetAggregator.

    ``options`` are those of :func:`coreset_select`, which checks them all.
    """
    if quality.ndim == features.ndim and quality.shape[-1] == 1:
        quality = quality[..., 0]
    if quality.shape != features.shape[:-1]:
        shape = tuple(features.shape[:-1])
        raise ValueError(f"expected quality of shape {shape}, got {tuple(quality.shape)}")
    if not features.is_floating_point():  # their product with the norms would be
        raise TypeError(f"expected features of a floating-point dtype, got {features.dtype}")
    if quality.device != features.device:
        raise ValueError(f"expected quality on the features' device {features.device}, got {quality.device}")
    if mask is not None:
        shape = tuple(quality.shape)
        mask = checks.row_mask(mask, features, shape, checks.may_look(features)).view(shape)
    coreset = select_scaled(
        features, quality, k, gamma, mask=mask, lengths=lengths, cu_seqlens=cu_seqlens, group=group, **options
    )
    single = features.ndim == 2 and cu_seqlens is None
    if mask is not None:
        quality = quality.where(mask, 0)  # such rows are not usable
    sets = _row_sets(features, lengths, cu_seqlens)
    features, quality = features.reshape(-1, features.shape[-1]), quality.flatten()
    core, counts = (coreset.features[None], coreset.counts[None]) if single else (coreset.features, coreset.counts)
    same = group is not None and layers.self_attention.training  # dropout, on all ranks
    with _same_draws(features, group) if same else nullcontext():
        aggregate = refine(layers, core, counts, features, quality, sets, group)
    return coreset, aggregate[0] if single else aggregate


def _row_sets(features: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> RowSets:
    """Which of the features' rows, flattened, belong to which set."""
    if cu_seqlens is not None:
        return RowSets.packed(cu_seqlens, features.device)
    sets = 1 if features.ndim == 2 else features.shape[0]
    return RowSets.padded(sets, features.shape[-2], None if lengths is None else lengths.reshape(-1), features.device)


@contextmanager
def _same_draws(features: Tensor, group: Group) -> Iterator[None]:
    """What is drawn at random meanwhile is the same on all ranks of the group."""
    seed = gather(draw_seed(features, None).to(features.device), group)[0]
    with torch.random.fork_rng([features.device] if features.is_cuda else []):
        torch.manual_seed(int(seed))
        yield


def refine(
    layers: HeadLayers,
    core: Tensor,
    counts: Tensor,
    features: Tensor,
    quality: Tensor,
    sets: RowSets,
    group: Group = None,
) -> Tensor:
    """Let the picks (B, K, C) attend to each other and to their set; their mean, with what they gathered.

    In float32, or float64 for float64 weights, whatever the weights' dtype and autocast are.
    """
    with without_autocast(core.device.type):
        core = core.to(accumulator(layers.self_norm.weight.dtype))
        picked = torch.arange(core.shape[1], device=core.device) < counts[:, None]
        target = core + _encode(_length(core), layers.encoding_norm)
        # A set without picks attends to its zero rows, as a softmax over nothing is NaN; the mean leaves them out.
        attended = _attend_picks(layers.self_attention, target, picked | (counts == 0)[:, None])
        target = _normalized(target + layers.self_dropout(attended), layers.self_norm)
        attended = _attend_set(layers.cross_attention, layers.encoding_norm, target, features, quality, sets, group)
        delta = _normalized(core + layers.cross_dropout(attended), layers.cross_norm)
        total = torch.where(picked[..., None], core + delta, 0).sum(1)
        return total / counts.clamp(min=1)[:, None]


def _attend_picks(layer: nn.MultiheadAttention, rows: Tensor, mask: Tensor) -> Tensor:
    """`layer(rows, rows, rows)` among the rows (B, K, C) that the mask (B, K) leaves, (B, K, C).

    Written out, as PyTorch's own neither takes an empty batch nor half-precision weights with float32 rows.
    """
    heads = layer.num_heads
    projected = _linear(rows, layer.in_proj_weight, layer.in_proj_bias).unflatten(-1, (3, heads, layer.head_dim))
    query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, heads, K, d)
    score = _bounded(query) @ _bounded(key).mT / layer.head_dim**0.5  # (B, heads, K, K)
    weight = torch.softmax(score.masked_fill(~mask[:, None, None], -torch.inf), -1)
    weight = F.dropout(weight, layer.dropout, layer.training)
    gathered = (weight @ value).transpose(1, 2).flatten(-2)
    return _linear(gathered, layer.out_proj.weight, layer.out_proj.bias)


def _attend_set(
    layer: nn.MultiheadAttention,
    encoding_norm: nn.LayerNorm,
    query: Tensor,
    features: Tensor,
    quality: Tensor,
    sets: RowSets,
    group: Group,
) -> Tensor:
    """`layer(query, x + enc(q), x)` with the projections of keys and values moved to the queries' side.

    q_h . W_k,h (x + enc) = (W_k,h^T q_h) . (x + enc), the keys' bias adds the same to every score, and W_v,h
    goes through the weighted sum: (B, K, C) -> (B, K, C).
    """
    heads = layer.num_heads
    in_weight, in_bias = layer.in_proj_weight.to(query.dtype), layer.in_proj_bias.to(query.dtype)
    query_weight, key_weight, value_weight = in_weight.view(3, heads, -1, in_weight.shape[1])  # (heads, d, C)
    query_bias, _, value_bias = in_bias.view(3, heads, -1)  # (heads, d)
    projected = torch.einsum("bkc,hdc->bkhd", query, query_weight) + query_bias
    folded = torch.einsum("bkhd,hdc->bkhc", projected, key_weight) / layer.head_dim**0.5
    gathered, weight_sum = set_attention(
        folded.flatten(1, 2),
        features,
        quality,
        encoding_norm.weight,
        sets,
        encoding_eps=encoding_norm.eps,
        dropout=layer.dropout if layer.training else 0.0,
        group=group,
    )
    gathered = gathered.view(folded.shape).to(query.dtype)
    weight_sum = weight_sum.view(*folded.shape[:3], 1).to(query.dtype)
    values = torch.einsum("bkhc,hdc->bkhd", gathered, value_weight) + weight_sum * value_bias
    return _linear(values.flatten(-2), layer.out_proj.weight, layer.out_proj.bias)


def _encode(norms: Tensor, encoding_norm: nn.LayerNorm) -> Tensor:
    """enc(|r|), (...,) -> (..., C)."""
    wave = sinusoid(norms, Waves.of(encoding_norm.normalized_shape[0], norms.dtype, norms.device))
    return _layer_norm(wave, encoding_norm)


# Rows of any finite length: their squares and products must not leave float32's range.
_LARGE, _SMALL = 2.0**60, 2.0**-60


def _length(rows: Tensor) -> Tensor:
    """|r| of rows (..., C), scaled by a power of two where the squares would overflow or vanish."""
    largest = rows.detach().abs().amax(-1)  # a vector_norm of order inf takes 8 times as long on CPUs
    scale = torch.where(largest > _LARGE, 2.0**-100, torch.where(largest < _SMALL, 2.0**100, 1.0))
    length: Tensor = torch.linalg.vector_norm(rows * scale[..., None], dim=-1) / scale
    return length


def _bounded(rows: Tensor) -> Tensor:
    """Rows (..., d), those with elements above 2^40 shortened to it: softmax and LayerNorm give the same for them."""
    largest = rows.detach().abs().amax(-1, keepdim=True)
    bounded: Tensor = rows * (2.0**40 / largest).clamp(max=1)
    return bounded


def _normalized(rows: Tensor, layer: nn.LayerNorm) -> Tensor:
    return _layer_norm(_bounded(rows), layer)


def _layer_norm(rows: Tensor, layer: nn.LayerNorm) -> Tensor:
    weight, bias = layer.weight.to(rows.dtype), layer.bias.to(rows.dtype)
    return F.layer_norm(rows, layer.normalized_shape, weight, bias, layer.eps)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(rows, weight.to(rows.dtype), bias.to(rows.dtype))


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"expected {name} to be a number, got {value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__}") from None
