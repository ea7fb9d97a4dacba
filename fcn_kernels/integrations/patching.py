"""What the integrations share: the keys that a module owns in a state dict, and classes that stand before its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = ("module", "_orig_mod")  # of DataParallel and DistributedDataParallel, and of torch.compile


def own_part(checkpoint: Mapping[str, Any], holder: str) -> dict[str, Any]:
    """An aggregation module's own keys, without what wrappers and the module around it put before them.

    Args:
        checkpoint: a state dict, or a Lightning checkpoint that has one under "state_dict".
        holder: what a model calls the module that it holds; if there is such a key, the others are passed over.

    Raises:
        TypeError: what is under "state_dict" is no mapping.
        ValueError: a key is there twice.
    """
    state_dict = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f'expected a mapping under "state_dict", got {type(state_dict).__name__}')
    parts = {key: [part for part in key.split(".") if part not in _WRAPPERS] for key in state_dict}
    held = any(holder in path for path in parts.values())
    inner: dict[str, Any] = {}
    for key, path in parts.items():
        if held and holder not in path:
            continue
        name = ".".join(path[path.index(holder) + 1 :] if held else path)
        if name in inner:
            raise ValueError(f"expected one aggregation module, got two values of {name}, the second as {key}")
        inner[name] = state_dict[key]
    return inner


def check_keys(inner: Mapping[str, Any], names: Mapping[str, str], unknown: list[str], whose: str) -> None:
    """Raise ValueError unless the keys ``names`` are all there, with finite values, and there are no others."""
    missing = [key for key in names if key not in inner]
    if missing or unknown:
        raise ValueError(
            f"expected the state dict of {whose}'s aggregation module, got one with missing keys "
            f"{missing} and unknown keys {unknown}"
        )
    bad = [key for key in names if not inner[key].isfinite().all()]
    if bad:
        raise ValueError(f"expected finite parameters, got NaN or infinity in {bad}")


def check_shapes(state: Mapping[str, Tensor], head: nn.Module, sizes: str) -> None:
    """Raise ValueError, naming them all, if values have other shapes than a head's parameters."""
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own.shape)}"
        for name, own in head.state_dict().items()
        if state[name].shape != own.shape
    ]
    if wrong:
        raise ValueError(f"expected parameters for {sizes}, got {', '.join(wrong)}")


class Patched:
    """The base of what a patched module finds before its own class."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """As their class, which can be found by its name, and patched again on the way back."""
        made = super().__reduce_ex__(protocol)
        if isinstance(made, str):
            return made
        make, args, *rest = made
        make, *args = (original(self) if value is type(self) else value for value in (make, *args))
        return _rebuild, (make, tuple(args), type(self).__mro__[1]), *rest


def original(module: Any) -> Any:
    """A module's class as it was before it was patched."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, Patched))


@cache
def patched_class(ours: Any, theirs: Any) -> Any:
    """Their class with the methods of ours first."""
    return type(theirs.__name__, (ours, theirs), {"__module__": theirs.__module__, "__doc__": theirs.__doc__})


def replace(model: Model, marks: Sequence[str], wanted: str, check: Callable[[nn.Module], None], ours: Any) -> Model:
    """Put ours before the class of every module that has these attributes; in place, and returned.

    Nothing is replaced if ``check`` raises for one of them.

    Raises:
        ValueError: no module has them all; ``wanted`` says them in words.
    """
    found = [module for module in model.modules() if all(hasattr(module, name) for name in marks)]
    if not found:
        raise ValueError(f"expected a module with {wanted} in {type(model).__name__}, found none")
    for module in found:
        check(module)
    for module in found:
        module.__class__ = patched_class(ours, original(module))
    return model


def restore(model: Model, ours: type[Patched]) -> Model:
    """Give modules that were patched with ours their own class back; in place, and returned."""
    for module in model.modules():
        if isinstance(module, ours):
            module.__class__ = original(module)
    return model


def _rebuild(make: Callable[..., Any], args: tuple[Any, ...], ours: Any) -> Any:
    """A patched module from what pickle makes one of their class with."""
    module = make(*args)
    theirs: Any = type(module)
    module.__class__ = patched_class(ours, theirs)
    return module
