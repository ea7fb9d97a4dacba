"""What arguments have to be, of all operations. An error says what was expected and what came."""

import math
import numbers
import operator
from typing import Any

import torch
from torch import Generator, Tensor

from fcn_kernels.backends import is_plain_call, is_recorded, is_under_vmap
from fcn_kernels.sets import accumulator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REAL = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
MOST_PICKS = 2**31 - 1
ONES = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
LIMITS = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}
"""The least normal and the largest number of the dtypes in which rows are summed."""


def may_look(tensor: Tensor, strict: bool = False) -> bool:
    """Whether the values of a tensor may be looked at: they are on the host, one tensor's, and no compiler records the
    call."""
    return strict or (tensor.is_cpu and not is_recorded() and not is_under_vmap())


def check_features(features: Any, cu_seqlens: Any) -> None:
    """Rows (B, N, C), (N, C), or (T, C) with offsets (B + 1,)."""
    if not isinstance(features, Tensor):
        raise TypeError(f"expected features to be a Tensor, got {type(features).__name__}")
    if features.dtype not in DTYPES:
        raise TypeError(f"expected features of dtype float32, bfloat16, float16 or float64, got {features.dtype}")
    _check_layout("features", features)
    if cu_seqlens is not None:
        if features.ndim != 2:
            raise ValueError(f"expected packed features (T, C) with cu_seqlens, got shape {tuple(features.shape)}")
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"expected cu_seqlens to be a Tensor of shape (B + 1,), got {type(cu_seqlens).__name__}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"expected cu_seqlens to be a Tensor of shape (B + 1,), got {tuple(cu_seqlens.shape)}")
        check_tensor("cu_seqlens", cu_seqlens, features, tuple(cu_seqlens.shape), INTEGERS)
    elif features.ndim not in (2, 3):
        raise ValueError(f"expected features of shape (B, N, C) or (N, C), got {tuple(features.shape)}")
    if features.shape[-1] == 0:
        raise ValueError(f"expected features with at least one column, got shape {tuple(features.shape)}")


def check_tensor(
    name: str, value: Any, features: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """A tensor of this shape and of one of these dtypes, on the features' device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"expected {name} of dtype {names}, got {value.dtype}")
    _check_layout(name, value)
    if tuple(value.shape) != shape:  # torch.Size of symbols would fix them
        raise ValueError(
            f"expected {name} of shape {tuple(shape)} for features {tuple(features.shape)}, got {tuple(value.shape)}"
        )
    if value.device != features.device:
        raise ValueError(f"expected {name} on the features' device {features.device}, got {value.device}")


def _check_layout(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        raise TypeError(f"expected {name} to be a dense tensor, got one of layout {value.layout}")


def check_flags(**flags: Any) -> None:
    """Each is a bool."""
    for name, value in flags.items():
        if value is not True and value is not False:
            raise TypeError(f"expected {name} to be a bool, got {value!r} of type {type(value).__name__}")


def at_most_one(**arguments: Any) -> None:
    """All but one are None."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        *names, last = arguments
        raise ValueError(f"expected at most one of {', '.join(names)} and {last}, got {' and '.join(given)}")


def check_generator(generator: Any) -> None:
    """A Generator or None."""
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"expected generator to be a torch.Generator, got {type(generator).__name__}")


def at_least_one(name: str, value: Any) -> Any:
    """An int, from NumPy's integers too; or a symbol, which stays one."""
    wanted = f"expected {name} to be an integer of at least 1"
    number = _integer(value)
    if number is None:
        raise TypeError(f"{wanted}, got {value!r} of type {type(value).__name__}")
    if isinstance(number, torch.SymInt):
        return number
    if number < 1:
        raise ValueError(f"{wanted}, got {number}")
    if number > MOST_PICKS:
        raise ValueError(f"{wanted} and at most 2^31 - 1, got {number}")
    return number


def _integer(value: Any) -> Any:
    """An int, from NumPy's integers and tensors of one, or a symbol; None for what is none."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        # an int that a compiler follows would be bound to one value by `index`
        return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    except TypeError:
        return None


METRICS = ("cosine", "sqeuclidean")


def check_metric(metric: Any, normalized: bool) -> None:
    """The name of a metric, and one that knows of unit rows if they are said to be."""
    if metric not in METRICS:
        raise ValueError(f'expected metric "cosine" or "sqeuclidean", got {metric!r}')
    if metric != "cosine" and normalized:
        raise ValueError('expected normalized with metric "cosine" alone: squared distances need no norms')


def picks_per_set(k: Any, sets: int, device: torch.device) -> tuple[Any, Tensor | None]:
    """The most that a set may pick, and the picks of each set (B,), None if that is the same for all."""
    # a tuple: each call would make the union
    if not isinstance(k, (Tensor, list, tuple)) or (isinstance(k, Tensor) and k.ndim == 0):
        return at_least_one("k", k), None
    if isinstance(k, Tensor):
        if k.dtype not in INTEGERS:
            raise TypeError(f"expected k of dtype int32 or int64, got {k.dtype}")
        if tuple(k.shape) != (sets,):
            raise ValueError(f"expected k of shape ({sets},), a number for each set, got {tuple(k.shape)}")
        each = k.tolist()
    else:
        each = [_integer(number) for number in k]
        if any(number is None for number in each):
            raise TypeError(f"expected k of integers, one for each set, got {k!r}")
        if len(each) != sets:
            raise ValueError(f"expected k of {sets} numbers, one for each set, got {len(each)}")
    for b, number in enumerate(each):
        if not 0 <= number <= MOST_PICKS:
            raise ValueError(f"expected k of each set from 0 to 2^31 - 1, got {number} for set {b}")
    return max(each, default=1), torch.tensor(each, dtype=torch.int64, device=device)


def row_quality(quality: Any, features: Tensor, shape: tuple[int, ...], metric: str) -> Tensor | None:
    """Quality of the dtype in which rows are summed: as given, else 1 for squared distances, None for cosines."""
    dtype = accumulator(features.dtype)
    if quality is None:
        return features.new_ones(shape, dtype=dtype) if metric == "sqeuclidean" else None
    check_tensor("quality", quality, features, shape, DTYPES)
    return quality if quality.dtype == dtype else quality.to(dtype)  # type: ignore[no-any-return]


def known_distances(values: Any, features: Tensor, shape: tuple[int, ...], look: bool) -> Tensor:
    """Distances (R,) of the dtype in which rows are summed, at least 0, or -inf for rows never to be picked."""
    check_tensor("min_distances", values, features, shape, DTYPES)
    sound: Tensor = (values >= 0) | (values == -math.inf)
    if not look:
        values = torch.where(sound, values, -math.inf)
    elif not sound.all():
        at = tuple((~sound).nonzero()[0].tolist())
        wanted = "expected min_distances of at least 0, or -inf for rows never to be picked"
        raise ValueError(f"{wanted}, got {float(values[at])} at {at}")
    return values.detach().to(accumulator(features.dtype)).reshape(-1)  # type: ignore[no-any-return]


def anchor_rows(anchors: Any, features: Tensor, sets: int) -> tuple[Tensor, Tensor | None]:
    """Anchors (A, C), (B, A, C), or of a jagged nested tensor (T, C) with their offsets (B + 1,)."""
    offsets = None
    if isinstance(anchors, Tensor) and anchors.is_nested:
        if anchors.layout != torch.jagged or anchors.ndim != 3 or anchors.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError("expected nested anchors (B, A of each set, C) of layout torch.jagged without gaps")
        anchors, offsets = anchors.values(), anchors.offsets()
        if offsets.shape[0] != sets + 1:
            raise ValueError(f"expected nested anchors of {sets} sets, got {offsets.shape[0] - 1}")
    if not isinstance(anchors, Tensor):
        raise TypeError(f"expected anchors to be a Tensor, got {type(anchors).__name__}")
    if anchors.dtype not in DTYPES:
        raise TypeError(f"expected anchors of dtype float32, bfloat16, float16 or float64, got {anchors.dtype}")
    _check_layout("anchors", anchors)
    columns = features.shape[-1]
    fitting = anchors.ndim in (2, 3) and anchors.shape[-1] == columns
    if not fitting or (anchors.ndim == 3 and anchors.shape[0] != sets):
        raise ValueError(
            f"expected anchors of shape (A, {columns}), or ({sets}, A, {columns}), got {tuple(anchors.shape)}"
        )
    if anchors.device != features.device:
        raise ValueError(f"expected anchors on the features' device {features.device}, got {anchors.device}")
    return anchors.detach(), offsets


def scale(name: str, value: Any, dtype: torch.dtype) -> Any:
    """A number above 0 that is a normal one in the dtype in which rows are summed."""
    wanted = "finite and above 0"
    _check_real(name, value, wanted)
    if not 0 < value < math.inf:
        raise ValueError(f"expected {name} to be {wanted}, got {value!r}")
    least, largest = LIMITS[dtype]
    if not least <= value <= largest:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"expected {name} to be a normal number in {kind}, {least:g} to {largest:g}, got {value!r}")
    return value


def temperature(tau: Any, features: Tensor) -> Tensor:
    """tau as a 0-d tensor of the dtype in which rows are summed."""
    dtype = accumulator(features.dtype)
    if is_plain_call() and isinstance(tau, float) and tau == 1:  # compilers would build for this value
        return ONES[dtype]
    if not isinstance(tau, Tensor):
        return _scalar(scale("tau", tau, dtype), dtype)
    _check_scalar("tau", tau, features)
    if may_look(tau):
        scale("tau", tau.item(), dtype)
    return tau.detach().to(dtype)


def exponent(gamma: Any, features: Tensor) -> Tensor:
    """gamma as a 0-d tensor."""
    dtype = accumulator(features.dtype)
    if isinstance(gamma, Tensor):
        _check_scalar("gamma", gamma, features)
        if may_look(gamma):
            _check_finite("gamma", gamma.item(), dtype)
        return gamma
    wanted = "a finite number or a 0-d tensor"
    _check_real("gamma", gamma, wanted)
    if not -math.inf < gamma < math.inf:
        raise ValueError(f"expected gamma to be {wanted}, got {gamma!r}")
    _check_finite("gamma", gamma, dtype)
    return _scalar(gamma, dtype)


def _scalar(value: Any, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():  # the value itself would be compiled anew each time that an annealed tau changes
        return torch.ones((), dtype=dtype, device="cpu").mul(value)
    number: Any = value if isinstance(value, (float, torch.SymInt, torch.SymFloat)) else float(value)
    return torch.scalar_tensor(number, dtype=dtype, device="cpu")  # a third of torch.tensor's time


def _check_scalar(name: str, value: Tensor, features: Tensor) -> None:
    if value.ndim != 0:
        raise ValueError(f"expected {name} to be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"expected {name} to be a floating-point tensor, got {value.dtype}")
    if not value.is_cpu and value.device != features.device:
        raise ValueError(f"expected {name} on {features.device} or the CPU, got {value.device}")


def _check_real(name: str, value: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, REAL):
        raise TypeError(f"expected {name} to be {wanted}, got {value!r} of type {type(value).__name__}")


def _check_finite(name: str, value: Any, dtype: torch.dtype) -> None:
    _, largest = LIMITS[dtype]
    if not -largest <= value <= largest:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"expected {name} to be finite in {kind}, up to {largest:g}, got {value!r}")


def given_noise(noise: Any, features: Tensor, shape: tuple[int, ...], look: bool) -> Tensor:
    """Noise (K, R) of the dtype in which rows are summed, without values that would decide a pick by accident."""
    check_tensor("noise", noise, features, shape, DTYPES)
    below: Tensor = noise < math.inf  # NaN is not
    if not look:
        noise = torch.where(below, noise, -math.inf)
    elif not below.all():
        at = tuple((~below).nonzero()[0].tolist())
        raise ValueError(f"expected noise that is neither NaN nor infinite, got {float(noise[at])} at {at}")
    return noise.detach().to(accumulator(features.dtype)).flatten(1)  # type: ignore[no-any-return]


def row_mask(mask: Any, features: Tensor, shape: tuple[int, ...], look: bool) -> Tensor:
    """A mask (R,) of bool, from bool or from integers that are 0 or 1."""
    check_tensor("mask", mask, features, shape, MASKS)
    if mask.dtype != torch.bool:
        if look and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"expected mask of bool, or of integers 0 and 1, got values {mask.unique().tolist()[:5]}")
        mask = mask != 0
    return mask.reshape(-1)  # type: ignore[no-any-return]


def set_lengths(lengths: Any, features: Tensor, single: bool, look: bool) -> Tensor:
    """Lengths (B,) of padded sets (B, N, C)."""
    if isinstance(lengths, Tensor) and single and lengths.ndim == 0:
        lengths = lengths[None]
    check_tensor("lengths", lengths, features, (features.shape[0],), INTEGERS)
    if look:
        outside = ((lengths < 0) | (lengths > features.shape[1])).nonzero()
        if len(outside):
            b = int(outside[0])
            raise ValueError(f"expected lengths in [0, {features.shape[1]}], got {int(lengths[b])} for set {b}")
    return lengths  # type: ignore[no-any-return]


def check_offsets(cu_seqlens: Tensor, rows: int) -> None:
    """Offsets that rise from 0 to T."""
    ends = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if ends != (0, rows):
        raise ValueError(f"expected cu_seqlens to run from 0 to T = {rows}, got {ends[0]} to {ends[1]}")
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if len(falls):
        b = int(falls[0])
        raise ValueError(
            f"expected cu_seqlens not to decrease, got {int(cu_seqlens[b])} then {int(cu_seqlens[b + 1])} at set {b}"
        )


def first_picks(
    start: Any, features: Tensor, sets: int, lengths: Tensor | None, cu_seqlens: Tensor | None, single: bool, look: bool
) -> Tensor:
    """Given first picks (B,): rows of their sets. For a set without rows any value will do."""
    if isinstance(start, bool) or not isinstance(start, int | Tensor | torch.SymInt | numbers.Integral):
        raise TypeError(f"expected start to be an int or a Tensor of integers, got {type(start).__name__}")
    if not isinstance(start, Tensor):
        start = start if isinstance(start, torch.SymInt) else int(start)
        known, rows = not is_recorded(), features.shape[-2]  # a bound on symbols would bind them
        if known and rows == 0:
            start = 0
        elif start < 0 or (known and start >= rows):
            raise ValueError(f"expected start in [0, {rows}), got {start}")
        start = torch.full((sets,), start, device=features.device)
    elif single and start.ndim == 0:
        start = start[None]
    check_tensor("start", start, features, (sets,), INTEGERS)
    if look and sets:
        if lengths is None:
            lengths = torch.full_like(start, features.shape[1]) if cu_seqlens is None else cu_seqlens.diff()
        outside = (((start < 0) | (start >= lengths)) & (lengths > 0)).nonzero()
        if len(outside):
            b = int(outside[0])
            raise ValueError(f"expected start of set {b} in [0, {int(lengths[b])}), got {int(start[b])}")
    return start  # type: ignore[no-any-return]
