"""The calls that the model predicts, by the names that its table has them under."""

from typing import NamedTuple

from benchmarks.workloads import IJBC_ROWS, IJBC_SETS

EVAL, SAMPLE, TRAINING, BACKWARD = "inference", "sampling", "training, forward", "backward"
NOT_PREDICTED = "not predicted"  # stands for the time of a call whose code has what the model does not know


class Call(NamedTuple):
    """Sets of rows of bfloat16; ``rows`` None: packed ones, of lengths as IJB-C's templates have."""

    name: str
    sets: int
    rows: int | None
    dim: int = 512
    k: int = 3

    @property
    def all_rows(self) -> int:
        """R."""
        return IJBC_ROWS if self.rows is None else self.sets * self.rows

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return 2 * self.all_rows * self.dim


CALLS = (
    Call("256 sets of 20", 256, 20),
    Call("64 sets of 256", 64, 256),
    Call("8,000 rows", 1, 8_000),
    Call("100,000 rows", 1, 100_000),
    Call("1,000,000 rows", 1, 1_000_000),
    Call("IJB-C, packed", IJBC_SETS, None),
    Call("200,000 rows of 1,536, K = 2,000", 1, 200_000, 1536, 2000),
)
