"""Counter-based Gumbel noise: a value depends on (seed, set, step, row) alone, so every backend draws the same.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the 64-bit seed,
with the counter (row within the set, step // 4, set, stream); the four words it gives serve four steps.
``fcn_kernels.device.noise`` is the same in Triton, and ``cpp/noise.h`` has it in C++.
"""

import torch
from torch import Generator, Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
STEPS_PER_DRAW = 4


def philox(seed: int, row: Tensor, block: int, sets: Tensor, stream: int = 0) -> Tensor:
    """Four random 32-bit words for each counter, (4, G, N) int64 in [0, 2^32), from ``sets`` (G,), and ``row`` (N,) or
    (G, N)."""
    # Counter words 0 and 2, which are multiplied, and 1 and 3. There is no unsigned 32-bit arithmetic; int64 products
    # wrap to the right bits, so what is multiplied has to be cut to 32, and the rest at the end. The first two rounds
    # are of a row or a set alone.
    c0, c2 = torch.atleast_2d(row), sets[:, None]
    c1, c3 = torch.tensor((block, stream), device="cpu")  # single numbers, which go with any device's
    for r in range(_ROUNDS):
        keys = (seed + r * _KEY_STEPS[0]) & _MASK, ((seed >> 32) + r * _KEY_STEPS[1]) & _MASK
        p0, p2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p2 >> 32 ^ c1 ^ keys[0]) & _MASK, p2, (p0 >> 32 ^ c3 ^ keys[1]) & _MASK, p0
    return torch.stack((c0, c1 & _MASK, c2, c3 & _MASK))


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel values, -log(-log(1 - v)) with v = (word + 1/2) / 2^32, float32.

    Large values come from small v, where float32 is finest: the tail reaches 22.9 and does not collapse into
    ties on sets of millions of rows, as -log(-log u) with a 24-bit u near 1 would.
    """
    minus_v = words.to(torch.float32).add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    return minus_v.log1p_().neg_().log_().neg_()


def gumbel_noise(seed: int, sets: Tensor, rows: int, block: int, first: Tensor | int = 0) -> Tensor:
    """Noise of steps 4 * block ... 4 * block + 3, (4, G, rows) float32, for the sets numbered ``sets`` (G,).

    The rows are those from ``first`` on, a number or one for each set (G, 1).
    """
    row = torch.arange(rows, device=sets.device) + first
    return gumbel(philox(seed, row, block, sets))


def draw_seed(features: Tensor, generator: Generator | None) -> Tensor:
    """A 0-d int64 seed; from the default CPU generator unless it has to be drawn within a recorded computation."""
    recorded = torch.compiler.is_compiling() or (features.is_cuda and torch.cuda.is_current_stream_capturing())
    device: torch.device | str = features.device if recorded else "cpu"
    if generator is not None:
        device = generator.device
    return torch.randint(2**63 - 1, (), device=device, generator=generator)
