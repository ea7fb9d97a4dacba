"""What NumPy leaves in pickles, read without NumPy's own functions, which were not made for files of strangers.

Arrays in a .pt file and object arrays in .npy and .npz are pickles. The names that NumPy writes into them stand here
for classes that only keep what they are given, so that nothing of a file is called and nothing is laid out as it says.
"""

from __future__ import annotations

import pickle
from typing import IO, Any

from fcn_kernels.extras import require


class PickledDtype:
    """Stands for numpy.dtype: a name such as "f4", and a byte order."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class PickledArray:
    """Stands for numpy.ndarray: a shape, a dtype, and bytes, or a list of objects."""

    shape: tuple[int, ...]
    dtype: PickledDtype
    data: bytes | list[Any]
    fortran: bool

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self) -> Any:
        """The array: of numbers, or of strings where it held objects. Raises ValueError for any other."""
        np = require("numpy", "tool")
        order = "F" if self.fortran else "C"
        if isinstance(self.data, list):
            if not all(isinstance(value, str) for value in self.data):
                raise ValueError("holds Python objects other than strings, which are not loaded")
            return np.array(self.data, str).reshape(self.shape, order=order)
        if not isinstance(self.data, bytes):
            raise ValueError("holds an array of neither bytes nor objects")
        dtype = np.dtype(self.dtype.name).newbyteorder(self.dtype.order)
        return np.frombuffer(bytearray(self.data), dtype).reshape(self.shape, order=order)


def reconstruct(*_: Any) -> PickledArray:
    """Stands for NumPy's function of that name, which makes the array that is filled afterwards."""
    return PickledArray()


STAND_INS: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": reconstruct,  # before NumPy 2
    "numpy._core.multiarray._reconstruct": reconstruct,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledDtype,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (known := STAND_INS.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known


def load_strings(file: IO[bytes]) -> Any:
    """The array of strings that an object array's pickle holds. Raises UnpicklingError if it names anything else."""
    pickled = _Reader(file).load()
    if not isinstance(pickled, PickledArray):
        raise pickle.UnpicklingError("no array")
    return pickled.array()
