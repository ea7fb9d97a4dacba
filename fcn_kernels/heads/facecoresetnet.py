"""FaceCoresetNet's aggregation head: from a set of face embeddings to one descriptor."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fcn_kernels.attention.encoding import Waves, sinusoid
from fcn_kernels.attention.op import set_attention
from fcn_kernels.selection.select import Coreset, coreset_select
from fcn_kernels.sets import RowSets


class Aggregate(NamedTuple):
    """What :class:`CoresetAggregator` returns."""

    descriptor: Tensor
    """(B, C), unit length; zero for a set with no row to pick."""
    norm: Tensor
    """(B,), the descriptor's length before it was made unit."""
    coreset: Coreset
    """The picks, rows scaled to their norms."""


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

    The second attention never projects the set: see :mod:`fcn_kernels.attention.op`. Its cost is two thin
    products over the rows, and so it is linear in their number. Picks are samples in ``train()``, argmax in
    ``eval()``.

    Args:
        dim: C, even and divisible by num_heads.
        k: picks a set, at least 1.
        num_heads: of both attentions.
        dropout: on attention weights and on each attention's output.
        gamma: initial value of the learned exponent of the quality in the distance.

    Source: Shapira and Keller, "FaceCoresetNet: Differentiable Coresets for Face Set Recognition", AAAI 2024,
    section 3. Checkpoints of the authors load by way of :mod:`fcn_kernels.integrations.facecoresetnet`.

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
        if dim % 2 or dim % num_heads:
            raise ValueError(f"expected dim even and divisible by num_heads = {num_heads}, got {dim}")
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
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Aggregate:
        """Aggregate each set.

        Args:
            features: (B, N, C) unit rows, or (T, C) packed with cu_seqlens.
            quality: (B, N) or (T,), the norms the rows had, above 0.
            noise: (k, B, N) or (k, T) Gumbel samples to pick with; drawn while training if None.
            lengths: (B,), the rows of each padded set that take part.
            cu_seqlens: (B + 1,), offsets of packed sets. At most one of the two is given.

        Returns:
            An :class:`Aggregate` of descriptor (B, C), norm (B,) and coreset. A set with fewer than k rows
            uses those it has. Rows that can never be picked (see :func:`coreset_select`) take no part at all.
        """
        expected = 3 if cu_seqlens is None else 2
        if features.ndim != expected or features.shape[-1] != self.dim:
            shape = f"(B, N, {self.dim})" if cu_seqlens is None else f"(T, {self.dim}) with cu_seqlens"
            raise ValueError(f"expected features of shape {shape}, got {tuple(features.shape)}")
        coreset, aggregate = aggregate_sets(
            self._layers(),
            features,
            quality,
            self.k,
            self.gamma,
            sample=self.training,
            noise=noise,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
        )
        norm = torch.linalg.vector_norm(aggregate, dim=-1)
        descriptor = aggregate / torch.where(norm > 0, norm, 1)[:, None]
        return Aggregate(descriptor, norm, coreset)

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


def aggregate_sets(
    layers: HeadLayers,
    features: Tensor,
    quality: Tensor,
    k: int,
    gamma: Tensor | float,
    *,
    sample: bool,
    noise: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Coreset, Tensor]:
    """The head with given layers: the picks, and (B, C) before it is made unit. As in CoresetAggregator."""
    if quality.shape != features.shape[:-1]:
        shape = tuple(features.shape[:-1])
        raise ValueError(f"expected quality of shape {shape}, got {tuple(quality.shape)}")
    # The straight-through mean runs over x = q f and weighs each row by its norm, so x is made where a
    # gradient is asked for. The picks themselves do not depend on the rows' lengths.
    graded = torch.is_grad_enabled() and any(
        t.requires_grad for t in (features, quality, gamma) if isinstance(t, Tensor)
    )
    coreset = coreset_select(
        features * quality[..., None].to(features.dtype) if graded else features,
        k,
        quality,
        gamma,
        sample=sample,
        noise=noise,
        distance_scale=0.5,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
    )
    if cu_seqlens is not None:
        sets = RowSets.packed(cu_seqlens, features.device)
    else:
        sets = RowSets.padded(features.shape[0], features.shape[1], lengths, features.device)
        features, quality = features.flatten(0, 1), quality.flatten()
    if not graded:
        scale = sets.take(quality, coreset.indices)[..., None].to(features.dtype)
        coreset = coreset._replace(features=coreset.features * scale)
    return coreset, refine(layers, coreset.features, coreset.counts, features, quality, sets)


def refine(
    layers: HeadLayers, core: Tensor, counts: Tensor, features: Tensor, quality: Tensor, sets: RowSets
) -> Tensor:
    """Let the picks (B, K, C) attend to each other and to their set; their mean, with what they gathered."""
    core = core.to(layers.self_norm.weight.dtype)
    picked = torch.arange(core.shape[1], device=core.device) < counts[:, None]
    target = core + _encode(torch.linalg.vector_norm(core, dim=-1), layers.encoding_norm)
    # A set without picks attends to its zero rows, as a softmax over nothing is NaN; the mean leaves them
    # out.
    missing = ~picked & (counts > 0)[:, None]
    attended, _ = layers.self_attention(target, target, target, key_padding_mask=missing, need_weights=False)
    target = layers.self_norm(target + layers.self_dropout(attended))
    attended = _attend(layers.cross_attention, layers.encoding_norm, target, features, quality, sets)
    delta = layers.cross_norm(core + layers.cross_dropout(attended))
    total = torch.where(picked[..., None], core + delta, 0).sum(1)
    return total / counts.clamp(min=1)[:, None]


def _encode(norms: Tensor, encoding_norm: nn.LayerNorm) -> Tensor:
    """enc(|r|), (...,) -> (..., C); angles of half precision would be off by whole turns."""
    angles = norms.to(torch.promote_types(norms.dtype, torch.float32))
    wave = sinusoid(angles, Waves.of(encoding_norm.normalized_shape[0], angles.dtype, angles.device))
    return encoding_norm(wave.to(norms.dtype))  # type: ignore[no-any-return]


def _attend(
    layer: nn.MultiheadAttention,
    encoding_norm: nn.LayerNorm,
    query: Tensor,
    features: Tensor,
    quality: Tensor,
    sets: RowSets,
) -> Tensor:
    """`layer(query, x + enc(q), x)` with the projections of keys and values moved to the queries' side.

    q_h . W_k,h (x + enc) = (W_k,h^T q_h) . (x + enc), the keys' bias adds the same to every score, and W_v,h
    goes through the weighted sum: (B, K, C) -> (B, K, C).
    """
    heads = layer.num_heads
    in_weight, in_bias = layer.in_proj_weight, layer.in_proj_bias
    query_weight, key_weight, value_weight = in_weight.view(3, heads, -1, in_weight.shape[1])  # (heads, d, C)
    query_bias, _, value_bias = in_bias.view(3, heads, -1)  # (heads, d)
    projected = torch.einsum("bkc,hdc->bkhd", query, query_weight) + query_bias
    folded = torch.einsum("bkhd,hdc->bkhc", projected, key_weight) / layer.head_dim**0.5
    gathered, mass = set_attention(
        folded.flatten(1, 2),
        features,
        quality,
        encoding_norm.weight,
        sets,
        encoding_eps=encoding_norm.eps,
        dropout=layer.dropout if layer.training else 0.0,
    )
    gathered = gathered.view(folded.shape).to(value_weight.dtype)
    mass = mass.view(*folded.shape[:3], 1).to(value_bias.dtype)
    values = torch.einsum("bkhc,hdc->bkhd", gathered, value_weight) + mass * value_bias
    return layer.out_proj(values.flatten(-2))  # type: ignore[no-any-return]
