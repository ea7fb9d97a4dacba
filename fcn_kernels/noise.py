"""Counter-based Gumbel noise: a value depends on (seed, set, step, row) alone, so every backend draws the same.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the 64-bit seed,
with the counter (row within the set, step // 4, set, stream); the four words it gives serve four steps.
``fcn_kernels.kernels.noise`` is the same in Triton.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
STEPS_PER_DRAW = 4


def philox(seed: int, row: Tensor, block: int, sets: Tensor, stream: int = 0) -> Tensor:
    """Four random 32-bit words for each counter, (4, G, N) int64 in [0, 2^32), from ``sets`` (G,), ``row`` (N,)."""
    groups, rows = sets.numel(), row.numel()
    # Counter words (0, 2) are the ones multiplied, (1, 3) the ones xored in; torch has no unsigned 32-bit
    # arithmetic, and int64 products wrap to the right bits, so only `even` has to be cut back to 32 bits.
    even = torch.empty(2, groups, rows, dtype=torch.int64, device=row.device)
    even[0] = row
    even[1] = sets[:, None]
    odd = torch.empty_like(even)
    odd[0], odd[1] = block, stream
    multipliers = torch.tensor(_MULTIPLIERS, device=row.device)[:, None, None]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    keys = torch.tensor(
        [[(k + r * s) & _MASK for k, s in zip(key, _KEY_STEPS, strict=True)] for r in range(10)],
        device=row.device,
    )[:, :, None, None]
    for r in range(10):
        product = even * multipliers
        low = product.flip(0)
        even = (product >> 32).flip(0).bitwise_xor_(odd).bitwise_xor_(keys[r]).bitwise_and_(_MASK)
        odd = low
    odd = odd & _MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel values, -log(-log(1 - v)) with v = (word + 1/2) / 2^32, float32.

    Large values come from small v, where float32 is finest: the tail reaches 22.9 and does not collapse into
    ties on sets of millions of rows, as -log(-log u) with a 24-bit u near 1 would.
    """
    v = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(v.neg_()).neg_().log_().neg_()


def gumbel_noise(seed: int, sets: Tensor, rows: int, block: int) -> Tensor:
    """Noise of steps 4 * block ... 4 * block + 3, (4, G, rows) float32, for the sets numbered ``sets`` (G,)."""
    row = torch.arange(rows, device=sets.device)
    return gumbel(philox(seed, row, block, sets))
