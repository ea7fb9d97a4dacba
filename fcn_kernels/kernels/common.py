"""Device code that the forward and the backward pass share, in every tier.

Shapes in comments: n rows of a tile, c columns (C up to the next power of two).
"""

import triton
import triton.language as tl

from fcn_kernels.kernels.noise import gumbel_noise

# Tiers of a launch. In a ragged one each set decides by its own length whether it is resident or streamed.
RESIDENT_TIER = tl.constexpr(0)
STREAMING_TIER = tl.constexpr(1)
RAGGED = tl.constexpr(2)

# How a set is divided: one program has it whole, or its parts meet at a barrier on the device, or between launches.
WHOLE = tl.constexpr(0)
COOPERATIVE = tl.constexpr(1)
LAUNCHES = tl.constexpr(2)

# Rows that left the softmax under `distinct` carry this as their gap: below every gap, so that the running minimum
# keeps it, and below -2, the lowest that a gap with the tie bit can be.
TAKEN = tl.constexpr(-4.0)

# What changes from call to call. Triton would compile anew for those that are 1 or a multiple of 16, which helps what
# rows are addressed by, not these.
UNSPECIALIZED = ["seed_value", "parts", "turn", "N", "K", "R"]


@triton.jit
def scalar(pointer, value):
    """A number of the call: given by value, or read on the device, where the host need not wait for it."""
    if pointer is not None:
        value = tl.load(pointer)
    return value


@triton.jit
def seed_of(seed_ptr, seed_value):
    """The seed: by value, or where that is negative, read on the device.

    One kernel for both: a captured CUDA graph finds its seed on the device, and no kernel can be compiled meanwhile.
    """
    if seed_ptr is not None:
        seed_value = tl.load(seed_ptr, mask=seed_value < 0, other=seed_value)
    return seed_value


@triton.jit
def locate(set_id, lengths_ptr, cu_seqlens_ptr, stride_set, stride_row, N, R):
    """Where a set's rows are: (first among the R rows, how many, offset into the features).

    Clamped to the tensors whatever lengths and offsets say, as their values cannot be checked without waiting.
    """
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + set_id).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), R)
        last = tl.load(cu_seqlens_ptr + set_id + 1).to(tl.int64)
        count = tl.maximum(tl.minimum(last, R) - first, 0)
        offset = first * stride_row
    else:
        first = set_id.to(tl.int64) * N
        offset = set_id.to(tl.int64) * stride_set
        count = tl.zeros_like(first) + N
        if lengths_ptr is not None:
            count = tl.minimum(tl.maximum(tl.load(lengths_ptr + set_id).to(tl.int64), 0), count)
    return first, count.to(tl.int32), offset


@triton.jit
def divide(count, part, parts, BLOCK_N: tl.constexpr):
    """The rows [low, high) of a part: whole tiles, in order."""
    share = tl.cdiv(tl.cdiv(count, parts), BLOCK_N) * BLOCK_N
    low = tl.minimum(part * share, count)
    return low, tl.minimum(low + share, count)


@triton.jit
def load_rows(rows_ptr, rows, inside, stride_row, cols, C):
    """A tile of rows [n, c], as stored."""
    where = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    return tl.load(rows_ptr + where, mask=inside[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit
def load_row(rows_ptr, row, there, stride_row, cols, C):
    """One row [c], as stored."""
    return tl.load(rows_ptr + tl.cast(row, tl.int64) * stride_row + cols, mask=(cols < C) & there, other=0.0)


@triton.jit
def per_row(sums):
    """Sums over the columns of a tile, [n], one to a thread instead of every thread of a row's having them all.

    What is computed from them, noise above all, is then computed once, and in a few registers.
    """
    return tl.gather(sums, tl.arange(0, sums.shape[0]), 0)


@triton.jit
def products(tile, vector):
    """x_n . v [n] for a float32 tile [n, c] and a vector [c]."""
    return per_row(tl.sum(tile * vector[None, :], axis=1))


@triton.jit
def norm_of(tile):
    """|x_n| of a float32 tile [n, c]."""
    return tl.sqrt_rn(per_row(tl.sum(tile * tile, axis=1)))


@triton.jit
def power(quality, gamma):
    """quality^gamma for quality > 0."""
    return tl.exp2(gamma * tl.log2(quality))


@triton.jit
def perturb(logits, rows, inside, step, set_id, first, R, noise_ptr, seed, SEEDED: tl.constexpr):
    """Logits [n] with the step's Gumbel noise.

    ``seed`` is what `seed_of` takes. It is read here, each time: rows of 1,024 columns leave no registers to hold it.
    """
    if noise_ptr is not None:
        logits += tl.load(noise_ptr + step * R + first + rows, mask=inside, other=0.0)
    elif SEEDED:
        logits += gumbel_noise(seed_of(*seed), rows, step, set_id)
    return logits


@triton.jit
def grid_barrier(counter_ptr, arrivals):
    """Wait until ``arrivals`` programs came here, all of them resident (a cooperative launch).

    What the programs wrote before is seen by all after: the adds release and acquire, and the barriers in the
    program extend both from one thread to all.
    """
    tl.debug_barrier()
    seen = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while seen < arrivals:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
