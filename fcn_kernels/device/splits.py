"""Device code for sets that several programs share: their parts, and where these meet."""

import triton
import triton.language as tl

# How a set is divided: one program has it whole, or its parts meet at a barrier on the device, or between launches.
WHOLE = tl.constexpr(0)
COOPERATIVE = tl.constexpr(1)
LAUNCHES = tl.constexpr(2)


@triton.jit
def divide(count, part, parts, BLOCK_N: tl.constexpr):
    """The rows [low, high) of a part: whole tiles, in order."""
    share = tl.cdiv(tl.cdiv(count, parts), BLOCK_N) * BLOCK_N
    low = tl.minimum(part * share, count)
    return low, tl.minimum(low + share, count)


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
