"""One call of set attention, as the op, both backends and the head agree on it."""

from typing import NamedTuple

from torch import Tensor

DROPOUT_STREAM = 1  # of the counter-based noise; the selection draws from stream 0


class Inputs(NamedTuple):
    """The arguments of a call in the form that the backends take: float32, or float64 for float64 features.

    Rows that are not usable (see :func:`fcn_kernels.sets.usable`) take no part. A quality of 0 masks a row.
    """

    queries: Tensor  # (B, H, C)
    features: Tensor  # (T, C), of any floating dtype
    quality: Tensor  # (T,)
    encoding_weight: Tensor  # (C,)
    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (B,) int64
    seed: Tensor | None  # 0-d int64, on the features' device or the CPU; None: nothing is dropped
    dropout: float
    encoding_eps: float

    @property
    def threshold(self) -> int:
        """A weight is dropped if its random 32-bit word is below this."""
        return min(round(self.dropout * 2**32), 2**32 - 1)


class Outputs(NamedTuple):
    """What the forward pass gives."""

    out: Tensor  # (B, H, C)
    weight_sum: Tensor  # (B, H)
    lse: Tensor  # (B, H), log sum exp of the scores; -inf for a set with no row to attend to


class Arriving(NamedTuple):
    """What the backward pass takes beside the inputs."""

    lse: Tensor  # (B, H)
    out: Tensor  # (B, H, C), gradient
    weight_sum: Tensor  # (B, H), gradient
    delta: Tensor  # (B, H), sum_n p'(n) dp'(n), p' the weights after dropout


class Gradients(NamedTuple):
    """Of the inputs that have one."""

    queries: Tensor
    features: Tensor
    quality: Tensor
    encoding_weight: Tensor
