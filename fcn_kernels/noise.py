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
_ROUNDS = 10
STEPS_PER_DRAW = 4


def philox(seed: int, row: Tensor, block: int, sets: Tensor, stream: int = 0) -> Tensor:
    """Four random 32-bit words for each counter, (4, G, N) int64 in [0, 2^32), from ``sets`` (G,), ``row`` (N,)."""
    # Counter words (0, 2) are the ones multiplied, (1, 3) the ones xored in. A round takes each product to the other
    # pair's place: here it stays where it is, and the roles of the two halves swap instead, in all but `odd`.
    # torch has no unsigned 32-bit arithmetic, and int64 products wrap to the right bits: only `even` has to be cut.
    even = torch.empty(2, sets.numel(), row.numel(), dtype=torch.int64, device=row.device)
    even[0], even[1] = row, sets[:, None]
    odd = torch.empty_like(even)
    odd[0], odd[1] = stream, block
    keys = [((seed + r * _KEY_STEPS[0]) & _MASK, ((seed >> 32) + r * _KEY_STEPS[1]) & _MASK) for r in range(_ROUNDS)]
    keys[::2] = [pair[::-1] for pair in keys[::2]]
    constants = torch.tensor((_MULTIPLIERS, _MULTIPLIERS[::-1], (_MASK, _MASK), *keys), device=row.device)
    *multipliers, mask = constants[:3, :, None, None].unbind()
    for r, key in enumerate(constants[3:, :, None, None].unbind()):
        product = even * multipliers[r % 2]
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(mask)
        odd = product.roll(1, 0)
    odd &= mask
    return torch.stack((even[0], odd[1], even[1], odd[0]))


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel values, -log(-log(1 - v)) with v = (word + 1/2) / 2^32, float32.

    Large values come from small v, where float32 is finest: the tail reaches 22.9 and does not collapse into
    ties on sets of millions of rows, as -log(-log u) with a 24-bit u near 1 would.
    """
    minus_v = words.to(torch.float32).add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    return minus_v.log1p_().neg_().log_().neg_()


def gumbel_noise(seed: int, sets: Tensor, rows: int, block: int) -> Tensor:
    """Noise of steps 4 * block ... 4 * block + 3, (4, G, rows) float32, for the sets numbered ``sets`` (G,)."""
    row = torch.arange(rows, device=sets.device)
    return gumbel(philox(seed, row, block, sets))
