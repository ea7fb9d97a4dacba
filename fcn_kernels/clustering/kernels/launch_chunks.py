"""Launches of cluster_chunks: the functions of ``torch_backend``, on the device.

Forward, chunks of up to 64 tokens take one launch, a program each; which these are is known on the device. The others
take a launch a step, for the tokens of all of them: embedding; for each block LayerNorm, queries with keys and values,
attention, its projection, LayerNorm, and the two layers of the MLP; a last LayerNorm; shares and sums. Backward: the
sums' gradients of all chunks; then those of the blocks, each of which is made again from its input and taken back, last
to first: in one launch for small chunks, a launch a step for the others; then the weights', summed over all tokens.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.clustering.kernels import launch_sums
from fcn_kernels.clustering.kernels.attention import attend, attend_keys, attend_queries
from fcn_kernels.clustering.kernels.layers import (
    GELU,
    GELU_GRADIENT,
    LINEAR,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_weights,
)
from fcn_kernels.clustering.kernels.products import how, product_of
from fcn_kernels.clustering.kernels.resident import Constants, blocks_of_small_chunks
from fcn_kernels.clustering.kernels.resident_backward import Taken, blocks_of_small_chunks_backward
from fcn_kernels.clustering.kernels.tokens import embed
from fcn_kernels.clustering.problem import CODES, EPS_NORM, Chunks, ChunksGradients, Clustered, Summed, Sums
from fcn_kernels.device.constants import constants
from fcn_kernels.device.gpu import MOST_REGISTERS

TILE, WIDE_TILE = 32, 16  # tokens of a chunk that a program has, and at a time; with heads of 128 channels and more
SMALL = 64  # tokens of a chunk that one program has to itself: its rows and the centers
LAYER_TILE = (64, 64, 32)  # of a layer: tokens, outputs, inputs at a time
LEAST_TOKENS = 32  # of them for tensor cores: with 64, Triton takes wgmma, see `product`
ROW_ELEMENTS = 4096  # of the tokens that a program normalizes
PART_TOKENS = 512  # at least, of a part of the weights' gradients
MOST_PARTS = 64
WEIGHTS = Chunks._fields[Chunks._fields.index("qkv_weight") : Chunks._fields.index("weight")]  # of blocks
OPTIONS = {"num_warps": 4, "num_stages": 1, **MOST_REGISTERS}


class Tokens(NamedTuple):
    """A call's tokens, R = T + P M in all.

    Those of chunk p stand from offsets[p] + p M on: lengths[p] rows, then the centers, then what padding needs. So
    where a center stands among them does not depend on padding.
    """

    hidden: Tensor  # (R, d)
    attending: Tensor  # (R,) bool
    chunk: Tensor  # (R,) int32
    norms: Tensor  # (T,), 0 for rows that take no part
    scale: Tensor  # (T,), what makes features unit rows
    usable: Tensor  # (T,) bool, the rows that take part
    codes: Tensor  # (T,) int32, -1 for rows that take no part
    places: Tensor  # (T,) int64, the rows among the tokens
    starts: Tensor  # (P + 1,) int64, the chunks' first tokens
    sizes: Tensor  # (P,) int64, their rows and centers
    tile: int  # tokens of a program

    @property
    def slots(self) -> int:
        """The most tiles that there can be."""
        return self.hidden.shape[0] // self.tile + self.sizes.shape[0]

    def sums(self, p: Chunks, keys: Tensor) -> Sums:
        """The last step, with the tokens' keys (R, d)."""
        return Sums(p.features, keys, self.scale, p.weight, p.bias, p.offsets, p.lengths, self.usable, ghosts=0)


class Block(NamedTuple):
    """What a block makes on its way."""

    unit: Tensor  # (R, d), the first LayerNorm
    rstd: Tensor  # (R,)
    qkv: Tensor  # (R, 3 d)
    attended: Tensor  # (R, d)
    lse: Tensor | None  # (heads, R), for the backward pass
    middle: Tensor  # (R, d), after attention
    unit2: Tensor
    rstd2: Tensor
    wide: Tensor | None  # (R, 4 d), before gelu, for the backward pass
    active: Tensor


def chunks_forward(p: Chunks, keep: bool) -> Clustered:
    """Everything: keys of the small chunks, keys of the others, and the sums of all."""
    out = Clustered.empty(p, keep)
    out.shares.zero_()  # of rows that take no part
    out.hidden.zero_()  # of padding
    if p.lengths.shape[0] == 0:
        return out
    with torch.cuda.device_of(p.features):
        tokens = _tokens(p)
        keys, working = torch.zeros_like(tokens.hidden), None
        if _has_small(p):
            _run_small(p, tokens, keys, out, keep)
            working = torch.zeros_like(tokens.attending)
        if _has_large(p):
            _embed(p, tokens, working)
            hidden = tokens.hidden
            for block in range(p.depth):
                made = _run_block(p, tokens, hidden, block, working)
                hidden = out.hidden[block] if keep else torch.empty_like(hidden)
                _linear(
                    p.features.dtype, made.active, p.fc2_weight[block], p.fc2_bias[block], hidden,
                    residual=made.middle, working=working, **_factor(p, tokens, block, 1),
                )  # fmt: skip
            _layer_norm(hidden, keys, working)
            launch_sums.share(
                tokens.sums(p, keys), Summed(*out[:3]), out.shares, check=False, gap=p.tokens.shape[0],
                fewest=0 if working is None else SMALL + 1,
            )  # fmt: skip
    counted = F.pad(tokens.usable.cumsum(0), (1, 0))[p.offsets.clamp(0, p.features.shape[0])]
    return out._replace(counts=counted.diff())


def chunks_backward(p: Chunks, grad: Summed, out: Clustered, wanted: bool) -> ChunksGradients:
    """Blocks again from their inputs, one at a time, last to first. Not `wanted`: the features are frozen."""
    none = p.tokens.new_empty(0)
    found = ChunksGradients(
        p.features.new_empty(p.features.shape if wanted else 0),
        none,
        none,
        *(torch.zeros_like(getattr(p, name)) for name in ChunksGradients._fields[3:]),
    )
    if p.lengths.shape[0] == 0:
        given = {n: torch.zeros_like(t) for n in ("quality", "styles") if (t := getattr(p, n)) is not None}
        return found._replace(features=found.features.zero_(), **given)
    with torch.cuda.device_of(p.features):
        tokens = _tokens(p)
        # which rows have shares, the forward pass knows
        _embed(p._replace(valid=out.shares.any(-1)), tokens, None, look=p.quality is None)
        inputs = [tokens.hidden, *out.hidden[: p.depth]]
        keys = torch.empty_like(inputs[-1])
        rstd = _layer_norm(inputs[-1], keys)
        shared = launch_sums.share_gradients(
            tokens.sums(p, keys), grad, wanted, check=False, norms=tokens.norms if p.quality is None else None,
            gap=p.tokens.shape[0],
        )  # fmt: skip
        grads = p.tokens.new_zeros(p.depth + 1, *keys.shape)  # of each block's input, and of the last one's output
        _layer_norm_backward(shared.keys, keys, rstd, None, grads[p.depth])
        _blocks_gradient(p, tokens, inputs, out.hidden, grads, found)
        found = found._replace(features=shared.values, weight=shared.weight, bias=shared.bias)
        if p.quality is not None:
            dquality = shared.scale * (EPS_NORM / (tokens.norms + EPS_NORM).square())
            found = found._replace(quality=dquality.where(tokens.usable, 0))
        return found._replace(**_embed_gradient(p, tokens, grads[0]))


def _has_small(p: Chunks) -> bool:
    """Whether small chunks have programs of their own: wider tokens do not fit a tile."""
    return _row_tile(p.tokens.shape[1])["BLOCK_N"] == TILE


def _has_large(p: Chunks) -> bool:
    """Whether there may be others, as far as the host knows."""
    return not _has_small(p) or p.longest + p.tokens.shape[0] > SMALL


def _tokens(p: Chunks) -> Tokens:
    """Room for a call's tokens."""
    rows, (centers, dim), chunks = p.features.shape[0], p.tokens.shape, p.lengths.shape[0]
    new, zeros, count = p.tokens.new_empty, p.tokens.new_zeros, rows + chunks * centers
    owned = p.offsets.diff().clamp(min=0)
    return Tokens(
        # what stays where rows are in no chunk: before the first, or behind the last
        hidden=zeros(count, dim),
        attending=zeros(count, dtype=torch.bool),
        chunk=zeros(count, dtype=torch.int32),
        norms=new(rows),
        scale=new(rows),
        usable=zeros(rows, dtype=torch.bool),
        codes=zeros(rows, dtype=torch.int32) - 1,
        places=zeros(rows, dtype=torch.int64),
        starts=p.offsets + centers * torch.arange(chunks + 1, device=p.offsets.device),
        sizes=p.lengths.clamp(min=0).minimum(owned) + centers,
        tile=TILE if dim // p.heads < 128 else WIDE_TILE,
    )


def _given(p: Chunks, tokens: Tokens) -> dict[str, Any]:
    """Arguments of the kernels that embed tokens."""
    (rows, width), (centers, dim) = p.features.shape, p.tokens.shape
    features = p.features if p.features.stride(1) == 1 else p.features.contiguous()
    return {
        "features_ptr": features,
        "quality_ptr": None if p.quality is None else p.quality.contiguous(),
        "styles_ptr": None if p.styles is None else p.styles.contiguous(),
        "valid_ptr": None if p.valid is None else p.valid.contiguous(),
        "table_ptr": p.table.contiguous(),
        "edges_ptr": p.edges.contiguous(),
        "centers_ptr": p.tokens.contiguous(),
        "offsets_ptr": p.offsets.contiguous(),
        "lengths_ptr": p.lengths.contiguous(),
        "starts_ptr": tokens.starts,
        "sizes_ptr": tokens.sizes,
        "hidden_ptr": tokens.hidden,
        "attending_ptr": tokens.attending,
        "chunk_ptr": tokens.chunk,
        "norms_ptr": tokens.norms,
        "scale_ptr": tokens.scale,
        "usable_ptr": tokens.usable,
        "code_ptr": tokens.codes,
        "place_ptr": tokens.places,
        "stride": features.stride(0),
        "T": rows,
        "tokens": tokens.hidden.shape[0],
        "C": width,
        "D": dim,
        "STYLE": dim - p.table.shape[1],
        "M": centers,
        "chunks": p.lengths.shape[0],
    }


def _embed(p: Chunks, tokens: Tokens, working: Tensor | None, look: bool = True) -> None:
    """Fill in the tokens: of all chunks, or of those that are not small, which `working` (R,) then names.

    Without a `look` at the rows, given their norms, those that are valid are usable.
    """
    fewest = 0 if working is None else SMALL + 1
    given = _given(p, tokens) | ({} if look else {"features_ptr": None})
    embed[(tokens.slots,)](**given, working_ptr=working, fewest=fewest, BLOCK_N=tokens.tile, BLOCK_C=32, **OPTIONS)


def _run_small(p: Chunks, tokens: Tokens, keys: Tensor, out: Clustered, keep: bool) -> None:
    """Fill in what comes of small chunks, their tokens, and their keys (R, d)."""
    (count, dim), new = tokens.hidden.shape, tokens.hidden.new_empty
    width = dim // p.heads
    blocks_of_small_chunks[(p.lengths.shape[0],)](
        **_given(p, tokens),
        **_blocks(p),
        weight_ptr=p.weight.contiguous(),
        bias_ptr=p.bias.contiguous(),
        sums_ptr=out.sums,
        key_sums_ptr=out.key_sums,
        masses_ptr=out.masses,
        shares_ptr=out.shares,
        kept_ptr=out.hidden if keep else None,
        unit_ptr=new(count, dim),
        qkv_ptr=new(count, 3 * dim),
        attended_ptr=new(count, dim),
        middle_ptr=new(count, dim),
        active_ptr=new(count, 4 * dim),
        keys_ptr=keys,
        width=width,
        depth=p.depth,
        most=SMALL,
        SUMS=launch_sums.Plan.of(p.tokens.shape[0]).constants(check=False),
        **_small_options(p, tokens),
    )


def _blocks(p: Chunks) -> dict[str, Any]:
    """Arguments of the kernels that have all blocks."""
    weights = {f"{name}_ptr": getattr(p, name).contiguous() for name in WEIGHTS}
    return weights | {"residual_ptr": None if p.residual is None else p.residual.contiguous()}


def _small_options(p: Chunks, tokens: Tokens) -> dict[str, Any]:
    """What the kernels that have all blocks are built for."""
    dim, (_, tile_f, tile_k) = p.tokens.shape[1], LAYER_TILE
    width = dim // p.heads
    build = constants(
        Constants,
        BLOCK_N=tokens.tile,
        BLOCK_F=tile_f,
        BLOCK_K=tile_k,
        BLOCK_D=_power_of_two(dim),
        BLOCK_H=_power_of_two(width),
        **how(p.features.dtype),
    )
    return {"BUILD": build, **OPTIONS, "num_warps": _warps(width)}


def _run_block(
    p: Chunks, tokens: Tokens, hidden: Tensor, block: int, working: Tensor | None = None, again: bool = False
) -> Block:
    """Tokens (R, d) through a block, but for its last layer: all of them, or those `working` (R,) of large chunks.

    `again`, in the backward pass, with what that takes.
    """
    (rows, dim), dtype = hidden.shape, p.features.dtype
    new = hidden.new_empty
    unit = torch.empty_like(hidden)
    rstd = _layer_norm(hidden, unit, working)
    qkv, attended = new(rows, 3 * dim), torch.zeros_like(hidden)
    lse, wide = (new(p.heads, rows), new(rows, 4 * dim)) if again else (None, None)
    _linear(dtype, unit, p.qkv_weight[block], p.qkv_bias[block], qkv, working=working)
    attend[(tokens.slots, p.heads)](
        qkv_ptr=qkv, attending_ptr=tokens.attending, starts_ptr=tokens.starts, sizes_ptr=tokens.sizes,
        out_ptr=attended, lse_ptr=lse, fewest=0 if working is None else SMALL + 1, **_attention(p, tokens),
    )  # fmt: skip
    middle, active = new(rows, dim), new(rows, 4 * dim)
    _linear(
        dtype, attended, p.proj_weight[block], p.proj_bias[block], middle, residual=hidden, working=working,
        **_factor(p, tokens, block, 0),
    )  # fmt: skip
    unit2 = torch.empty_like(middle)
    rstd2 = _layer_norm(middle, unit2, working)
    _linear(dtype, unit2, p.fc1_weight[block], p.fc1_bias[block], active, after=GELU, wide=wide, working=working)
    return Block(unit, rstd, qkv, attended, lse, middle, unit2, rstd2, wide, active)


def _blocks_gradient(
    p: Chunks, tokens: Tokens, inputs: list[Tensor], kept: Tensor, grads: Tensor, found: ChunksGradients
) -> None:
    """Fill in gradients (L + 1, R, d) of the blocks' inputs (R, d) from the last; those of weights go to `found`."""
    taken, small, large = None, None, None
    if _has_small(p) and p.depth:
        large = (tokens.sizes > SMALL)[tokens.chunk.long()]
        small = tokens.attending & ~large
        taken = _run_small_back(p, tokens, kept, grads)
    for block in reversed(range(p.depth)):
        if taken is not None:
            _block_weights(p, tokens, Taken(*(t[block] for t in taken)), grads[block + 1], small, block, found)
        if _has_large(p):
            made = _block_gradient(p, tokens, inputs[block], grads[block + 1], grads[block], block, large)
            _block_weights(p, tokens, made, grads[block + 1], large, block, found)


def _run_small_back(p: Chunks, tokens: Tokens, kept: Tensor, grads: Tensor) -> Taken:
    """Fill in small chunks' gradients (L + 1, R, d) from the last; what those of the weights are made of."""
    (count, dim), new, width = tokens.hidden.shape, tokens.hidden.new_empty, p.tokens.shape[1] // p.heads
    widths = Taken(unit=1, attended=1, unit2=1, active=4, dqkv=3, dmiddle=1, dwide=4)
    taken = Taken(*(new(p.depth, count, n * dim) for n in widths))
    blocks_of_small_chunks_backward[(p.lengths.shape[0],)](
        **_blocks(p),
        **{f"{name}_ptr": t for name, t in taken._asdict().items()},
        starts_ptr=tokens.starts,
        sizes_ptr=tokens.sizes,
        attending_ptr=tokens.attending,
        hidden_ptr=tokens.hidden,
        kept_ptr=kept,
        grads_ptr=grads,
        qkv_ptr=new(count, 3 * dim),
        lse_ptr=new(p.heads, count),
        middle_ptr=new(count, dim),
        wide_ptr=new(count, 4 * dim),
        rstd_ptr=new(count),
        rstd2_ptr=new(count),
        back_ptr=new(count, dim),
        tokens=count,
        D=dim,
        width=width,
        depth=p.depth,
        chunks=p.lengths.shape[0],
        most=SMALL,
        **_small_options(p, tokens),
    )
    return taken


def _block_weights(
    p: Chunks, tokens: Tokens, t: Taken, grad: Tensor, working: Tensor | None, block: int, found: ChunksGradients
) -> None:
    """Add the gradients of a block's weights, from the tokens at work, to `found`; grad (R, d) is of its output."""
    attention, mlp = _factor(p, tokens, block, 0), _factor(p, tokens, block, 1)
    for name, arriving, x, factor in (
        ("fc2", grad, t.active, mlp),
        ("fc1", t.dwide, t.unit2, {}),
        ("proj", t.dmiddle, t.attended, attention),
        ("qkv", t.dqkv, t.unit, {}),
    ):
        weight, bias = (getattr(found, f"{name}_{kind}")[block] for kind in ("weight", "bias"))
        _linear_weights(p.features.dtype, arriving, x, weight, bias, working=working, **factor)


def _block_gradient(
    p: Chunks, tokens: Tokens, hidden: Tensor, grad: Tensor, out: Tensor, block: int, working: Tensor | None
) -> Taken:
    """Fill in the gradient (R, d) of a block's input from that of its output, for the tokens at work; what those of
    its weights are made of."""
    made = _run_block(p, tokens, hidden, block, working, again=True)
    attention, mlp = _factor(p, tokens, block, 0), _factor(p, tokens, block, 1)
    new, dtype = hidden.new_empty, p.features.dtype
    dwide, dunit2, dmiddle = new(made.active.shape), new(hidden.shape), new(hidden.shape)
    _linear(
        dtype, grad, p.fc2_weight[block].T, None, dwide, after=GELU_GRADIENT, wide=made.wide, working=working, **mlp
    )
    _linear(dtype, dwide, p.fc1_weight[block].T, None, dunit2, working=working)
    _layer_norm_backward(dunit2, made.unit2, made.rstd2, grad, dmiddle, working)
    dattended, dqkv, dunit = new(hidden.shape), torch.zeros_like(made.qkv), new(hidden.shape)
    _linear(dtype, dmiddle, p.proj_weight[block].T, None, dattended, working=working, **attention)
    for kernel in (attend_queries, attend_keys):
        kernel[(tokens.slots, p.heads)](
            qkv_ptr=made.qkv, attending_ptr=tokens.attending, starts_ptr=tokens.starts, sizes_ptr=tokens.sizes,
            grad_ptr=dattended, out_ptr=made.attended, lse_ptr=made.lse, dqkv_ptr=dqkv,
            fewest=0 if working is None else SMALL + 1, **_attention(p, tokens),
        )  # fmt: skip
    _linear(dtype, dqkv, p.qkv_weight[block].T, None, dunit, working=working)
    _layer_norm_backward(dunit, made.unit, made.rstd, dmiddle, out, working)
    return Taken(made.unit, made.attended, made.unit2, made.active, dqkv, dmiddle, dwide)


def _embed_gradient(p: Chunks, tokens: Tokens, grad: Tensor) -> dict[str, Tensor]:
    """Of styles, table and centers, from that of the tokens (R, d)."""
    rows, style = grad[tokens.places], p.tokens.shape[1] - p.table.shape[1]
    found = {"table": torch.zeros_like(p.table)}
    if p.styles is not None:
        found["styles"] = rows[:, :style].where(tokens.usable[:, None], 0)
    coded = (tokens.codes[:, None] == torch.arange(CODES, device=grad.device)).to(grad.dtype)
    _linear_weights(torch.float32, coded, rows[:, style:].contiguous(), found["table"], None)
    centers = p.tokens.shape[0]
    first = tokens.starts[:-1] + tokens.sizes - centers
    places = first[:, None] + torch.arange(centers, device=grad.device)  # (P, M)
    found["tokens"] = grad[places.clamp(0, grad.shape[0] - 1)].sum(0)
    return found


def _factor(p: Chunks, tokens: Tokens, block: int, which: int) -> dict[str, Any]:
    """What scales a block's attention (0) or MLP (1) in each chunk."""
    return {} if p.residual is None else {"factor": p.residual[block, which].contiguous(), "chunk": tokens.chunk}


def _attention(p: Chunks, tokens: Tokens) -> dict[str, Any]:
    dim = p.tokens.shape[1]
    width = _power_of_two(dim // p.heads)
    return OPTIONS | {
        "num_warps": _warps(width),
        "tokens": tokens.hidden.shape[0],
        "D": dim,
        "width": dim // p.heads,
        "chunks": p.lengths.shape[0],
        "BLOCK_N": tokens.tile,
        "BLOCK_H": width,
        "HOW": product_of(p.features.dtype),
    }


def _warps(width: int) -> int:
    """For heads of so many channels. Built for sm_80 and sm_90, those of up to 128 spill no register."""
    return 4 if width < 64 else 8


def _power_of_two(size: int) -> int:
    """The least that a product takes, from a size up."""
    return max(16, int(triton.next_power_of_2(size)))


def _row_tile(dim: int) -> dict[str, int]:
    block = _power_of_two(dim)
    return {"BLOCK_N": max(1, min(TILE, ROW_ELEMENTS // block)), "BLOCK_D": block}


def _layer_norm(x: Tensor, out: Tensor, working: Tensor | None = None) -> Tensor:
    """Fill in normalized rows (N, d); the reciprocal of each one's deviation."""
    rstd, (rows, dim) = x.new_empty(x.shape[0]), x.shape
    tile = _row_tile(dim)
    layer_norm[(triton.cdiv(rows, tile["BLOCK_N"]),)](
        x_ptr=x, working_ptr=working, out_ptr=out, rstd_ptr=rstd, N=rows, D=dim, **tile, **OPTIONS
    )
    return rstd


def _layer_norm_backward(
    grad: Tensor, unit: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor, working: Tensor | None = None
) -> None:
    """Fill in gradients (N, d) of what was normalized to unit."""
    rows, dim = unit.shape
    tile = _row_tile(dim)
    layer_norm_backward[(triton.cdiv(rows, tile["BLOCK_N"]),)](
        grad_ptr=grad, unit_ptr=unit, rstd_ptr=rstd, residual_ptr=residual, working_ptr=working, out_ptr=out, N=rows,
        D=dim, **tile, **OPTIONS,
    )  # fmt: skip


def _linear(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, after: Any = LINEAR,
    wide: Tensor | None = None, residual: Tensor | None = None, factor: Tensor | None = None,
    chunk: Tensor | None = None, working: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill in out (N, F) = factor after(x weight^T + bias) + residual, for a call with rows of a dtype."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    tile_n, tile_f, tile_k = LAYER_TILE
    if dtype != torch.float32:
        tile_n = LEAST_TOKENS
    linear[(triton.cdiv(rows, tile_n), triton.cdiv(outputs, tile_f))](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        wide_ptr=wide,
        residual_ptr=residual,
        factor_ptr=factor,
        chunk_ptr=chunk,
        working_ptr=working,
        out_ptr=out,
        N=rows,
        K=inputs,
        F=outputs,
        stride_f=weight.stride(0),
        stride_k=weight.stride(1),
        AFTER=after,
        BLOCK_N=tile_n,
        BLOCK_F=tile_f,
        BLOCK_K=tile_k,
        HOW=product_of(dtype),
        **OPTIONS,
    )


def _linear_weights(
    dtype: torch.dtype, grad: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None, *,
    factor: Tensor | None = None, chunk: Tensor | None = None, working: Tensor | None = None,
) -> None:  # fmt: skip
    """Add sum_n factor_n grad_n x_n^T to dweight (F, K), and the same without x to dbias (F,)."""
    (rows, outputs), inputs = grad.shape, x.shape[1]
    tile_n, tile_f, tile_k = 32, 64 if dtype == torch.float32 else LEAST_TOKENS, 64
    parts = max(1, min(MOST_PARTS, triton.cdiv(rows, PART_TOKENS)))
    weights = dweight.new_empty(parts, outputs, inputs)
    biases = None if dbias is None else dbias.new_empty(parts, outputs)
    linear_weights[(triton.cdiv(outputs, tile_f), triton.cdiv(inputs, tile_k), parts)](
        grad_ptr=grad,
        x_ptr=x,
        factor_ptr=factor,
        chunk_ptr=chunk,
        working_ptr=working,
        dweight_ptr=weights,
        dbias_ptr=biases,
        N=rows,
        share=triton.cdiv(triton.cdiv(rows, parts), tile_n) * tile_n,
        K=inputs,
        F=outputs,
        BLOCK_N=tile_n,
        BLOCK_F=tile_f,
        BLOCK_K=tile_k,
        HOW=product_of(dtype),
        **OPTIONS,
    )
    dweight.add_(weights.sum(0))
    if dbias is not None and biases is not None:
        dbias.add_(biases.sum(0))
