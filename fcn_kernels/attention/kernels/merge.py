# mypy: ignore-errors
"""What the parts of each set gave, put together. Shapes in comments: p parts, c columns of a block."""

import triton
import triton.language as tl


@triton.jit
def load_lse(lse_ptr, begin, parts, H, BLOCK_P: tl.constexpr):
    """Of a block of parts, [p], and which of these there are."""
    part = begin + tl.arange(0, BLOCK_P)
    there = part < parts
    return tl.load(lse_ptr + part * H, mask=there, other=float("-inf")), part, there


@triton.jit(do_not_specialize=["H", "parts"])
def merge_parts(
    out_ptr, weight_sum_ptr, lse_ptr, whole_out_ptr, whole_weight_sum_ptr, whole_lse_ptr, C, H, parts,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From out [B, parts, H, C], weight_sum and lse [B, parts, H] those of whole sets: a program has a block of columns
    of a query. A part's share is exp(lse), and 0 of a part without rows."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = (row // H) * parts * H + row % H  # of the first part
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    top = float("-inf")
    for begin in range(0, parts, BLOCK_P):  # @tops
        lse, _part, _there = load_lse(lse_ptr + first, begin, parts, H, BLOCK_P)
        top = tl.maximum(top, tl.max(lse, axis=0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total, weight_sum = 0.0, 0.0
    out = tl.zeros((BLOCK_C,), tl.float32)
    for begin in range(0, parts, BLOCK_P):  # @parts
        lse, part, there = load_lse(lse_ptr + first, begin, parts, H, BLOCK_P)
        share = tl.exp(lse - shift)  # [p]
        total += tl.sum(share, axis=0)
        weight_sum += tl.sum(share * tl.load(weight_sum_ptr + first + part * H, mask=there, other=0.0), axis=0)
        where = (first + part.to(tl.int64) * H)[:, None] * C + cols[None, :]  # [p, c]
        of_parts = tl.load(out_ptr + where, mask=there[:, None] & (cols < C)[None, :], other=0.0)
        out += tl.sum(share[:, None] * of_parts, axis=0)
    total = tl.where(total > 0, total, 1.0)  # 0 where no row takes part
    tl.store(whole_out_ptr + row * C + cols, out / total, mask=cols < C)
    if block == 0:
        tl.store(whole_weight_sum_ptr + row, weight_sum / total)
        tl.store(whole_lse_ptr + row, top + tl.log(total))
