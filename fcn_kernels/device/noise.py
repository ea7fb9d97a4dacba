"""The noise of ``fcn_kernels.noise``, bit for bit, on the device."""

import triton
import triton.language as tl


@triton.jit
def philox_word(seed, row, block, set_id, stream, which):
    """Word ``which`` (0 to 3) of Philox4x32-10 at counter (row, block, set, stream), uint32; row: [n] int32."""
    zero = tl.zeros_like(row)
    which += zero
    w0, w1, w2, w3 = tl.philox(seed, row, zero + block, zero + set_id, zero + stream)
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def gumbel(word):
    """-log(-log(1 - v)), v = (word + 1/2) / 2^32; see ``fcn_kernels.noise.gumbel`` for why from this side."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-8)
    # log1p by Kahan: log(u) v / (1 - u) corrects the rounding of u = 1 - v
    u = 1 - v
    exponential = tl.where(u == 1, v, -tl.log(u) * (v / tl.maximum(1 - u, 5.9604644775390625e-8)))
    return -tl.log(exponential)


@triton.jit
def gumbel_noise(seed, row, step, set_id):
    """Noise of one step, [n] float32, for rows [n] of one set."""
    return gumbel(philox_word(seed, row, step // 4, set_id, 0, step % 4))


@triton.jit
def seed_of(seed_ptr, seed_value):
    """The seed: by value, or where that is negative, read on the device.

    One kernel for both: a captured CUDA graph finds its seed on the device, and no kernel can be compiled meanwhile.
    """
    if seed_ptr is not None:
        seed_value = tl.load(seed_ptr, mask=seed_value < 0, other=seed_value)
    return seed_value
