"""Operators' schemas, made of the NamedTuples that their calls are."""

from typing import Any, get_type_hints

from torch import Tensor

_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool", str: "str"}


def schema(fields: Any, prefix: str = "") -> str:
    """The fields of a NamedTuple as arguments or results: ``"Tensor rows, SymInt k"``."""
    return ", ".join(f"{_KINDS[kind]} {prefix}{name}" for name, kind in get_type_hints(fields).items())


def tensors(fields: Any) -> int:
    """How many of the fields are tensors, given or not. They come first."""
    return sum(kind in (Tensor, Tensor | None) for kind in get_type_hints(fields).values())
