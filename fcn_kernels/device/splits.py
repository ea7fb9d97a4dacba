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
def barrier_phase(counter_ptr):
    """The phase of a set's barrier, for a program that has not come to it in this launch."""
    return tl.load(counter_ptr, volatile=True)


@triton.jit
def grid_barrier(counter_ptr, part, parts, phase):
    """Wait until all ``parts`` came here, all of them resident (a cooperative launch); returns the next phase.

    A phase is the counter's sign. Others add 1 and the first part what is missing to 2^31, so that the last to come
    turns the sign, and leaves the lower bits 0: the counter is never cleared, and serves one launch after another,
    whatever their parts. No sign turns while a program has still to come, so that none misses one.

    What the programs wrote before is seen by all after: the adds release, the last look acquires, and the barriers in
    the program extend both from one thread to all.
    """
    tl.debug_barrier()
    # what it returns is not asked for: to wait for that would take longer than a look
    tl.atomic_add(counter_ptr, tl.where(part == 0, (1 - parts) ^ -2147483648, 1), sem="release", scope="gpu")
    seen = phase
    while (seen ^ phase) >= 0:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return seen
