"""The head of Cluster and Aggregate (CAFace): from a set of face embeddings and their styles to one descriptor."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_kernels import checks
from fcn_kernels.backends import resolve_backend, without_autocast
from fcn_kernels.clustering import op
from fcn_kernels.clustering.cpp import launch as cpp
from fcn_kernels.clustering.cut import Cut, cut, inside, owners, uncut
from fcn_kernels.clustering.problem import EPS_LAYER_NORM, Chunks, Clustered
from fcn_kernels.clustering.sums import Layout, row_layout
from fcn_kernels.clustering.torch_backend import BATCHED_ROWS, finite_rows, linear, usable_rows
from fcn_kernels.heads import cluster_cpp
from fcn_kernels.heads.cluster_state import STYLE_BITS, SUM_BITS, ClusterState, on_grid
from fcn_kernels.heads.style import NormCode, StyleInput
from fcn_kernels.sets import accumulator

LEAST_MASS = 1e-6  # of a center, by which sums are divided


class Fused(NamedTuple):
    """What :class:`ClusterAggregate` returns. One set alone has no leading B."""

    descriptor: Tensor
    """(B, C), unit length, in the dtype of the head's weights; zero for a set without rows."""
    norm: Tensor
    """(B,), the descriptor's length before it was made unit; float32, or float64 in a float64 head, as what follows."""
    means: Tensor
    """(B, M, C), of the unit rows of each center."""
    confidence: Tensor
    """(B, M, C) or (B, M, 1), how much of each mean is in the descriptor; sums to 1 over the centers."""
    counts: Tensor
    """(B,) int64, rows that took part."""
    weights: Tensor | None
    """(B, N), (N,) or (T,), each row's share of the descriptor, without gradient; None unless asked for."""


class Block(nn.Module):
    """The parameters of a transformer block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)


class Assignment(nn.Module):
    """The parameters that share out rows among centers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.center_norm, self.key_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Two layers with a gelu between, (..., width) to (..., out)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, out)

    def forward(self, t: Tensor) -> Tensor:
        return _linear(F.gelu(_linear(t, self.fc1)), self.fc2)


class Mixer(nn.Module):
    """A layer over tokens (B, M, width): mixed across the M centers, then across the channels."""

    def __init__(self, centers: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))
        self.norm = nn.LayerNorm(width)
        self.token1, self.token2 = nn.Linear(centers, 2 * centers), nn.Linear(2 * centers, centers)
        self.channel1, self.channel2 = nn.Linear(width, width // 2), nn.Linear(width // 2, width)

    def forward(self, t: Tensor) -> Tensor:
        y = _padded(_layer_norm(t, self.norm), 0, -t.shape[1] % BATCHED_ROWS)
        across = _from_left(F.gelu(_from_left(y, self.token1)), self.token2)[:, : t.shape[1]]
        t = self.gate.to(t.dtype) * t + across
        return t + _linear(F.gelu(_linear(_layer_norm(t, self.norm), self.channel1)), self.channel2)


class _Rows(NamedTuple):
    """The rows of a call, flat, and what is needed of them."""

    features: Tensor  # (T, C)
    quality: Tensor | None  # (T,)
    styles: Tensor | None  # (T, style_dim)
    edges: Tensor  # (60,)
    layout: Layout
    cut: Cut


class ClusterAggregate(nn.Module):
    r"""Cluster and Aggregate: a set of face embeddings and their styles in, one descriptor out; also chunk by chunk.

    With rows x_n, their norms r_n, unit rows u_n = x_n / (r_n + 1e-5) and styles s_n; M learned centers g_m; and mu, v
    the running mean and variance of the norms::

        h_n  = [s_n ; alpha P[c_n]],   c_n = trunc(10 clip((r_n - mu) / sqrt(v + 1e-5), -3, 3)) + 30     P: sinusoids
        k_n  = LayerNorm of h_n after transformer blocks over a chunk's rows and the centers
        a_mn = softmax over m of q_m . (W_k k_n + b_k) / sqrt(d),   q_m = W_q LayerNorm(g_m) + b_q
        w_m  = sum_n a_mn,   S_m = sum_n a_mn u_n,   K_m = sum_n a_mn k_n              of one chunk
        A_m += (w_m / w'_m) S_m,   B_m += (w_m / w'_m) K_m,   W_m += w_m               w'_m = max(w_m, 1), a constant
        mean_m = A_m / W_m,   style_m = B_m / W_m
        p    = softmax over m of MLP(mixers([g_m ; style_m]))
        agg  = sum_m p_m mean_m,   descriptor = agg / |agg|,   norm = |agg|

    Rows of a chunk attend to each other; chunks meet in the sums alone, so that their order does not matter, though how
    a set is cut does. All chunks of all sets run at once, and nothing of size N x C is made or kept for the backward
    pass. In ``train()`` batch statistics are those of the call's rows, and a block is dropped for a chunk with a
    probability that rises from 0 to ``drop_path`` over the blocks.

    Args:
        dim: C, columns of the features.
        clusters: M, centers.
        depth: blocks, and mixers; 0 for none.
        style_dim: columns of a style; 0 for a head without styles.
        norm_dim: columns of a norm's code, even. Tokens have d = style_dim + norm_dim columns.
        num_heads: of the attention; divides d.
        channelwise: a confidence for each channel, or one for a center.
        drop_path: probability in [0, 1).
        style_channels: S of the statistics that ``head.style`` makes styles of; 0: the head has no such module, as
            DistributedDataParallel wants it where styles come ready made.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range.

    Source: Kim, Liu, Jain and Liu, "Cluster and Aggregate: Face Recognition with Large Probe Set", NeurIPS 2022,
    sections 3.1 to 3.3. The authors' checkpoints load through :mod:`fcn_kernels.integrations.caface`.

    Example:
        >>> head = ClusterAggregate(dim=512).eval()
        >>> embeddings, styles = 20 * torch.randn(2, 100, 512), torch.randn(2, 100, 64)
        >>> head(embeddings, styles).descriptor.shape
        torch.Size([2, 512])
        >>> first, second = (head.update(embeddings[:, i : i + 50], styles[:, i : i + 50]) for i in (0, 50))
        >>> head.finish(first + second).descriptor.shape
        torch.Size([2, 512])
    """

    _kept: Mapping[str, cluster_cpp.Kept] = MappingProxyType({})  # what parameters are folded into, without a graph

    def __init__(
        self,
        dim: int = 512,
        clusters: int = 4,
        depth: int = 2,
        style_dim: int = 64,
        norm_dim: int = 64,
        num_heads: int = 8,
        channelwise: bool = True,
        drop_path: float = 0.1,
        *,
        style_channels: int = 384,
    ) -> None:
        super().__init__()
        checks.check_flags(channelwise=channelwise)
        self.dim = checks.at_least_one("dim", dim)
        clusters, norm_dim = checks.at_least_one("clusters", clusters), checks.at_least_one("norm_dim", norm_dim)
        depth, style_dim = _count("depth", depth), _count("style_dim", style_dim)
        style_channels = _count("style_channels", style_channels)
        width, self.num_heads = style_dim + norm_dim, checks.at_least_one("num_heads", num_heads)
        if norm_dim % 2:
            raise ValueError(f"expected norm_dim even, for sines and cosines, got {norm_dim}")
        if width % num_heads:
            raise ValueError(f"expected num_heads to divide style_dim + norm_dim = {width}, got {num_heads}")
        if isinstance(drop_path, bool) or not isinstance(drop_path, float | int):
            raise TypeError(f"expected drop_path to be a number, got {type(drop_path).__name__}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"expected drop_path in [0, 1), got {drop_path}")
        self.style_dim, self.channelwise, self.drop_path = style_dim, channelwise, float(drop_path)
        self.style = StyleInput(style_channels, style_dim) if style_dim and style_channels else None
        self.norm_code = NormCode(norm_dim)
        dtype = torch.get_default_dtype()  # of half precision, it has no orthogonal rows
        centers = nn.init.orthogonal_(torch.empty(clusters, width, dtype=accumulator(dtype)))
        self.centers = nn.Parameter(centers.to(dtype))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.assign = Assignment(width)
        self.mixers = nn.ModuleList(Mixer(clusters, 2 * width) for _ in range(depth))
        self.confidence = Mlp(2 * width, dim if channelwise else 1)
        for module in (self.blocks, self.assign, self.mixers, self.confidence):
            module.apply(_initialize)

    def forward(
        self,
        features: Tensor,
        styles: Tensor | None = None,
        quality: Tensor | None = None,
        *,
        chunk: int | None = 512,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        weights: bool = False,
        strict: bool = False,
    ) -> Fused:
        """Fuse each set.

        Args:
            features: (B, N, C), (N, C) for one set, or (T, C) packed sets with cu_seqlens. Rows as the backbone gives
                them, or unit rows with their norms as quality. float32, bfloat16 or float16; float64 in a float64 head.
            styles: (..., style_dim) for the rows of features, or (..., S, 2), which goes through ``head.style`` first.
            quality: (B, N), (N,) or (T,), the norms that unit rows had; a last axis of size 1 may follow. None: the
                features' own.
            chunk: the most rows that see one another. A set of n rows is cut in ceil(n / chunk) pieces whose sizes
                differ by at most one, longer first. None: one piece.
            lengths, mask, cu_seqlens: which rows take part, at most one of the three, as in
                :func:`fcn_kernels.coreset_select`.
            weights: give each row's share of the descriptor, too.
            strict: raise if a row of a set cannot take part, naming set and row. Waits for the device.

        Returns:
            A :class:`Fused`. A row whose features, style or quality is not finite, or whose quality is below 0, is as
            if it were not there, and its gradient is 0. A set without rows has descriptor, norm and means 0. Gradients
            reach features, styles, quality and all parameters; the norms get theirs through u alone. In ``eval()`` a
            set gives the same bits alone or in a batch, padded, packed or masked, here or by update and finish (but a
            float64 set of one chunk, which only a state rounds to the grid); with and without a graph, and compiled, it
            gives the same within rounding.

        Raises:
            TypeError, ValueError: saying what was expected, before anything runs.
            NotImplementedError: a second or a forward-mode derivative is asked for.
        """
        checks.check_flags(weights=weights)
        rows, out = self._cluster(features, styles, quality, chunk, lengths, mask, cu_seqlens, strict)
        state = self._state(rows.cut, out, rounded=not self.training, whole=True)
        fused = self.fuse(state)
        if weights:
            fused = fused._replace(weights=_row_weights(rows, out, state, fused))
        if rows.layout.single:
            fused = fused._replace(**{name: getattr(fused, name)[0] for name in Fused._fields[:5]})
        return fused

    def update(
        self,
        features: Tensor,
        styles: Tensor | None = None,
        quality: Tensor | None = None,
        state: ClusterState | None = None,
        *,
        chunk: int | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        strict: bool = False,
    ) -> ClusterState:
        """What is known of B sets after these rows: of ``state``, if one is given, and of these.

        Arguments are as in :meth:`forward`; chunk None makes a call one chunk of each set. One set alone is a batch of
        one. In ``eval()`` the state has no graph; in ``train()`` it carries it, so that losses can compare states.

        Raises:
            TypeError, ValueError: as :meth:`forward`; or the state is of other sizes, or of another mode.
        """
        if state is not None:
            self._check_state(state)
        rows, out = self._cluster(features, styles, quality, chunk, lengths, mask, cu_seqlens, strict, state)
        added = self._state(rows.cut, out, rounded=not self.training)
        if not self.training:
            added = added.detach()
        return added if state is None else state + added

    def finish(self, state: ClusterState) -> Fused:
        """Descriptors of B sets from their states; weights is None.

        Raises:
            TypeError, ValueError: the state is of other sizes.
        """
        self._check_state(state)
        return self.fuse(state)

    def shares(self, features: Tensor, styles: Tensor | None) -> tuple[Tensor, ClusterState]:
        """Shares (B, n, M) of the rows of sets (B, n, C), each one chunk; their state, with its graph, not rounded."""
        rows, out = self._cluster(features, styles, None, None, None, None, None, False)
        return out.shares.view(*rows.layout.shape, out.shares.shape[1]), self._state(rows.cut, out, rounded=False)

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, ClusterState):
            raise TypeError(f"expected state to be a ClusterState, got {type(state).__name__}")
        sizes = state.masses.shape[1], state.sums.shape[2], state.styles.shape[2]
        if sizes != (expected := (self.centers.shape[0], self.dim, self.centers.shape[1])):
            raise ValueError(f"expected a state of M, C, d = {expected}, got {sizes}")
        if state.masses.device != self.centers.device:
            raise ValueError(f"expected a state on {self.centers.device}, got one on {state.masses.device}")
        if not self.training and any(t.requires_grad for t in (state.sums, state.styles, state.masses)):
            raise ValueError("expected a state without a graph in eval(), got one of train(): detach it")

    def _check_joins(self, state: ClusterState, sets: int) -> None:
        """Raise ValueError unless a state can be added to those of so many sets."""
        dtype = accumulator(self.centers.dtype) if self.training else torch.float64
        theirs = state.counts.shape[0]  # a symbol, where len would fix it
        if theirs != sets or state.masses.dtype != dtype:
            mode = "train()" if self.training else "eval()"
            got = f"{theirs} sets in {state.masses.dtype}"
            raise ValueError(f"expected a state of {sets} sets in {dtype}, as {mode} makes it of these rows, got {got}")

    def _cluster(
        self,
        features: Tensor,
        styles: Tensor | None,
        quality: Tensor | None,
        chunk: int | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        strict: bool,
        state: ClusterState | None = None,
    ) -> tuple[_Rows, Clustered]:
        """Everything of the rows: checks, also of a state that they join, and what comes of their chunks."""
        checks.check_flags(strict=strict)
        layout = row_layout("features", features, mask, lengths, cu_seqlens)
        self.check_rows(features, styles, quality, layout.shape)
        if state is not None:
            self._check_joins(state, layout.sets.lengths.shape[0])
        if chunk is not None:
            checks.at_least_one("chunk", chunk)
        with without_autocast(features.device.type):
            rows = self._rows(features, styles, quality, layout, chunk, strict)
            return rows, op.cluster_chunks(self._problem(rows), resolve_backend(None, rows.features, cpp.unavailable))

    def check_rows(
        self, features: Tensor, styles: Tensor | None, quality: Tensor | None, shape: tuple[int, ...]
    ) -> None:
        """Raise TypeError or ValueError unless rows of a shape (B, N), (N,) or (T,) are what the head takes."""
        if features.shape[-1] != self.dim:
            raise ValueError(f"expected features of {self.dim} columns, got {features.shape[-1]}")
        if features.device != self.centers.device:
            raise ValueError(f"expected features on the head's device {self.centers.device}, got {features.device}")
        if features.dtype == torch.float64 != self.centers.dtype:
            raise TypeError(f"expected a float64 head for float64 features, got one of {self.centers.dtype}")
        if quality is not None:
            trailing = isinstance(quality, Tensor) and quality.ndim == features.ndim and quality.shape[-1] == 1
            checks.check_tensor("quality", quality, features, (*shape, 1) if trailing else shape, checks.DTYPES)
        if self.style_dim == 0:
            if styles is not None:
                raise ValueError("expected no styles, for a head of style_dim = 0")
            return
        shapes = [(*shape, self.style_dim)]
        if self.style is not None:
            shapes.append((*shape, self.style.mix.shape[0], 2))
        if not isinstance(styles, Tensor):
            raise TypeError(f"expected styles of shape {shapes[0]}, got {type(styles).__name__}")
        expected = shapes[-1] if styles.ndim == len(shapes[-1]) else shapes[0]
        checks.check_tensor("styles", styles, features, expected, checks.DTYPES)

    def _rows(
        self,
        features: Tensor,
        styles: Tensor | None,
        quality: Tensor | None,
        layout: Layout,
        chunk: int | None,
        strict: bool,
    ) -> _Rows:
        """Rows laid flat, with styles made, codes set, and sets cut."""
        dtype = accumulator(self.centers.dtype)
        features = features.reshape(-1, self.dim)
        if dtype == torch.float64:
            features = features.double()
        quality = None if quality is None else quality.reshape(-1).to(dtype)
        made = styles is not None and styles.ndim == len(layout.shape) + 2
        if styles is not None:
            styles = styles.reshape(features.shape[0], *styles.shape[len(layout.shape) :]).to(dtype)
        # an exported graph cuts whatever the lengths turn out to be
        pieces = chunk is not None and (torch.compiler.is_compiling() or _longest(layout) > chunk)
        counting = self.norm_code.norm.training or (self.style is not None and made and self.style.norm.training)
        taking = norms = None
        if pieces or counting or strict:
            if not checks.may_look(features):
                layout = layout._replace(sets=layout.sets.within(features.shape[0]))
            with torch.no_grad():
                usable, norms = usable_rows(features, quality, None if styles is None else styles.flatten(1), dtype)
                belongs = inside(layout, features.shape[0])
                taking = usable & belongs
            if strict:
                _check_taking(belongs & ~usable, layout)
        if made:
            assert self.style is not None
            assert styles is not None
            styles = self.style(styles, taking)
            if taking is not None:  # statistics may be finite where the style is not
                sound = finite_rows(styles.detach())
                if strict:
                    _check_taking(taking & ~sound, layout)
                taking = taking & sound
        edges = self.norm_code.edges(norms, taking, dtype)
        cuts = cut(layout, taking, chunk) if pieces and chunk is not None and taking is not None else uncut(layout)
        return _Rows(features, quality, styles, edges, layout, cuts)

    def _problem(self, rows: _Rows) -> Chunks:
        """The operator's call, with LayerNorms' weights folded into what follows them, and keys into the queries."""
        dtype, depth = rows.edges.dtype, len(self.blocks)
        *weights, share_weight, share_bias = cluster_cpp.blocks(self, self._folded_shares) or (
            *self._folded(dtype),
            *self._folded_shares(dtype),
        )
        centers = self.centers.to(dtype)
        given = (rows.features, rows.quality, rows.styles, self.norm_code.rows(dtype), rows.edges, centers)
        residual = self._residual(depth, rows.cut.lengths.shape[0], dtype)
        where = (rows.cut.offsets, rows.cut.lengths, rows.layout.valid)
        constants = self.num_heads, rows.layout.shape[-1]
        return Chunks._make((*given, *weights, share_weight, share_bias, residual, *where, *constants))

    def _folded_shares(self, dtype: torch.dtype) -> list[Tensor]:
        """Weight and bias of the shares' logits."""
        assign, centers = self.assign, self.centers.to(dtype)
        query = _linear(_layer_norm(centers, assign.center_norm), assign.query) / self.centers.shape[1] ** 0.5
        weight, bias = _folded(assign.key_norm, assign.key, dtype)
        return [query @ weight, query @ bias]

    def _folded(self, dtype: torch.dtype) -> list[Tensor]:
        """Weights and biases of the blocks as :class:`Chunks` has them, with their graph."""
        d = self.centers.shape[1]
        scale = self.centers.new_ones(3 * d, dtype=dtype)
        scale[:d] = (d // self.num_heads) ** -0.5  # of the queries
        folded: list[list[Tensor]] = [[] for _ in range(8)]
        block: Any
        for block in self.blocks:  # one by one: a product of stacked weights would keep the stack for backward
            weight, bias = _folded(block.norm1, block.qkv, dtype)
            parts = (
                *(weight * scale[:, None], bias * scale),
                *_plain(block.proj, dtype),
                *_folded(block.norm2, block.fc1, dtype),
                *_plain(block.fc2, dtype),
            )
            for values, value in zip(folded, parts, strict=True):
                values.append(value)
        shapes = ((3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,))
        return [
            torch.stack(values) if values else scale.new_empty((0, *shape))
            for values, shape in zip(folded, shapes, strict=True)
        ]

    def _residual(self, depth: int, chunks: int, dtype: torch.dtype) -> Tensor | None:
        """Stochastic depth: (L, 2, P), 0 where a chunk's attention or MLP is dropped."""
        if not self.training or not self.drop_path or depth < 2:  # the first block is never dropped
            return None
        device = self.centers.device
        rate = torch.linspace(0, self.drop_path, depth, dtype=dtype, device=device)[:, None, None]
        kept = torch.rand(depth, 2, chunks, dtype=dtype, device=device) >= rate
        return kept / (1 - rate)

    def _state(self, cuts: Cut, out: Clustered, rounded: bool, whole: bool = False) -> ClusterState:
        """The sums of chunks, of a center with less than one row in part, added up over each set, with their graph.

        Rounded to the grid, unless the sets are `whole`, no more rows are to come, and are float64: then a set of one
        chunk keeps all its digits.
        """
        w, norm = out.masses[..., None], self.assign.key_norm
        part = w / w.detach().clamp(min=1)
        keys = norm.weight.to(w.dtype) * out.key_sums + w * norm.bias.to(w.dtype)
        sums, styles, masses = part * out.sums, part * keys, out.masses
        exact = whole and w.dtype == torch.float64
        if rounded and not (exact and cuts.pieces is None):
            kept = cuts.alone() if exact else None
            sums, styles, masses = (
                _on_grid(values, bits, kept)
                for values, bits in ((sums, SUM_BITS), (styles, STYLE_BITS), (masses, SUM_BITS))
            )
        counts = out.counts if cuts.pieces is None else cuts.per_set(out.counts.double()).long()
        return ClusterState(cuts.per_set(sums), cuts.per_set(styles), cuts.per_set(masses), counts)

    def fuse(self, state: ClusterState) -> Fused:
        """:meth:`finish` without checks, also of a state that carries its graph in ``eval()``."""
        with without_autocast(state.sums.device.type):
            return self._fuse(state, accumulator(self.centers.dtype))

    def _fuse(self, state: ClusterState, dtype: torch.dtype) -> Fused:
        """Means, what the mixers make of them, and the descriptor."""
        fused = cluster_cpp.fuse(self, state, LEAST_MASS)
        if fused is not None:
            return Fused(*fused, state.counts, None)
        mass = state.masses.clamp(min=LEAST_MASS)[..., None]
        means, styles = (state.sums / mass).to(dtype), (state.styles / mass).to(dtype)
        t = torch.cat([self.centers.to(dtype).expand(means.shape[0], -1, -1), styles], -1)
        for mixer in self.mixers:
            t = mixer(t)
        # over the last axis, where a softmax does not depend on how rows are given to threads
        confidence = self.confidence(t).mT.softmax(-1).mT
        parts = (confidence * means).unbind(1)
        aggregate = parts[0]
        for part in parts[1:]:  # in a fixed order
            aggregate = aggregate + part
        norm = torch.linalg.vector_norm(aggregate, dim=-1)
        descriptor = aggregate / torch.where(norm > 0, norm, 1)[:, None]
        return Fused(descriptor.to(self.centers.dtype), norm, means, confidence, state.counts, None)

    def train(self, mode: bool = True) -> Self:
        """As every module's; ``eval()`` also forgets what was made of parameters, as ``.data`` may have changed."""
        self._kept = MappingProxyType({})
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    def extra_repr(self) -> str:
        clusters, width = self.centers.shape
        return (
            f"dim={self.dim}, clusters={clusters}, width={width}, num_heads={self.num_heads}, "
            f"channelwise={self.channelwise}, drop_path={self.drop_path}"
        )


def _on_grid(values: Tensor, bits: int, kept: Tensor | None) -> Tensor:
    """Rounded to multiples of 2^-bits, but for chunks (P,) that are kept as they are, if any."""
    rounded = on_grid(values, bits)
    return rounded if kept is None else torch.where(kept.view(-1, *[1] * (values.ndim - 1)), values, rounded)


def _row_weights(rows: _Rows, out: Clustered, state: ClusterState, fused: Fused) -> Tensor:
    """sum_m a_mn / W_m mean_c p_mc of each row, 0 for rows that take no part."""
    share = fused.confidence.detach().mean(-1) / state.masses.detach().clamp(min=LEAST_MASS)  # (B, M)
    if share.shape[0] == 0:
        return out.shares.new_zeros(rows.layout.shape)
    owner = owners(rows.layout, out.shares.shape[0])
    return (out.shares * share.to(out.shares.dtype)[owner]).sum(-1).view(rows.layout.shape)


def _check_taking(bad: Tensor, layout: Layout) -> None:
    """Raise ValueError naming the first bad row (T,)."""
    if bad.any():
        row = int(bad.int().argmax())
        b = int(owners(layout, bad.shape[0])[row])
        at = row - int(layout.sets.offsets[b])
        raise ValueError(
            f"row {at} of set {b} cannot take part: its features, style or quality are not finite, or its quality is "
            "below 0"
        )


def _longest(layout: Layout) -> int:
    """At least the rows of the longest set: exact where offsets may be looked at."""
    if len(layout.shape) == 1 and layout.sets.lengths.shape[0] > 0 and checks.may_look(layout.sets.lengths):
        return int(layout.sets.lengths.max())
    return layout.shape[-1]


def _linear(rows: Tensor, layer: nn.Linear) -> Tensor:
    return linear(rows, layer.weight.to(rows.dtype), layer.bias.to(rows.dtype))


def _from_left(t: Tensor, layer: nn.Linear) -> Tensor:
    """A layer across the centers of (B, M, width), with as many as batched products want; the others are left over."""
    weight, bias = layer.weight.to(t.dtype), layer.bias.to(t.dtype)
    more = -weight.shape[0] % BATCHED_ROWS
    weight, bias = _padded(weight, t.shape[1] - weight.shape[1], more), _padded(bias[:, None], 0, more)
    sets, width = t.shape[0], t.shape[2]
    return torch.baddbmm(bias.expand(sets, -1, width), weight.expand(sets, -1, -1), t)


def _padded(t: Tensor, columns: int, rows: int) -> Tensor:
    """(..., rows, columns) with so many more of each, of 0; itself without a copy where there are none."""
    return F.pad(t, (0, columns, 0, rows)) if columns or rows else t


def _layer_norm(rows: Tensor, layer: nn.LayerNorm) -> Tensor:
    weight, bias = layer.weight.to(rows.dtype), layer.bias.to(rows.dtype)
    return F.layer_norm(rows, layer.normalized_shape, weight, bias, EPS_LAYER_NORM)


def _plain(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layer.weight.to(dtype), layer.bias.to(dtype)


def _folded(norm: nn.LayerNorm, layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that follows a LayerNorm, for rows that the LayerNorm's own are not applied to."""
    weight = layer.weight.to(dtype)
    return weight * norm.weight.to(dtype), weight @ norm.bias.to(dtype) + layer.bias.to(dtype)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {name} to be an integer of at least 0, got {value!r} of type {type(value).__name__}")
    if value < 0:
        raise ValueError(f"expected {name} to be an integer of at least 0, got {value}")
    return value


def _initialize(module: nn.Module) -> None:
    """As the authors: small weights, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


torch.serialization.add_safe_globals([Fused])
