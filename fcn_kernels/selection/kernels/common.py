"""What the forward and the backward pass share, in every tier."""

import triton
import triton.language as tl

from fcn_kernels.device.noise import gumbel_noise, seed_of

# Tiers of a launch. In a ragged one each set decides by its own length whether it is resident or streamed.
RESIDENT_TIER = tl.constexpr(0)
STREAMING_TIER = tl.constexpr(1)
RAGGED = tl.constexpr(2)

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
