"""Calls to test with: random ones, drawn by a seed or by hypothesis, and their layout in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """The arguments of a call."""

    features: Tensor
    k: int
    quality: Tensor | None = None
    gamma: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def cast(self, dtype: torch.dtype) -> Case:
        """The same call in another precision; nothing is lost on the way to a finer one."""
        given = {name: self.options.get(name) for name in ("noise", "min_distances")}
        case = self.with_options(**{name: value.to(dtype) for name, value in given.items() if value is not None})
        quality = None if self.quality is None else self.quality.to(dtype)
        return replace(case, features=self.features.to(dtype), quality=quality, gamma=self.gamma.to(dtype))

    def to(self, device: torch.device) -> Case:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        options = {name: move(value) for name, value in self.options.items()}
        return Case(move(self.features), self.k, move(self.quality), move(self.gamma), options)


def gumbel(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel samples, float64."""
    return -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log()


def random_case(
    sets: int,
    rows: int,
    dim: int,
    k: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gamma: float = 0.5,
    noise: float | None = 1.0,
    quality: str = "random",
    duplicates: bool = False,
    unit: bool = False,
    **options: Any,
) -> Case:
    """Padded sets, all numbers representable in ``dtype``.

    ``quality`` is "random", "flat" or "norms"; ``noise`` scales the given Gumbel noise, None picks the argmax;
    ``duplicates`` makes every second row the same as the one before it; ``unit`` gives rows of length 1 and says so.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sets, rows, dim, generator=generator, dtype=torch.float64)
    if unit:
        features = torch.nn.functional.normalize(features, dim=-1)
        options["normalized"] = True
    if duplicates:
        features[:, 1::2] = features[:, : rows // 2 * 2 : 2]
    values = torch.rand(sets, rows, generator=generator, dtype=torch.float64) + 0.3
    if quality == "flat":
        values = torch.ones_like(values)
    if noise is not None:
        options["noise"] = (noise * gumbel(k, sets, rows, generator=generator)).to(dtype)
    given = None if quality == "norms" else values.to(dtype)
    return Case(features.to(dtype), k, given, torch.tensor(gamma, dtype=dtype), options)


def spoil(case: Case, seed: int = 0, share: float = 0.4) -> Case:
    """Make some rows unpickable: not finite, all zero, or of a quality that is not finite or not positive."""
    generator = torch.Generator().manual_seed(seed)
    features = case.features.clone()
    quality = None if case.quality is None else case.quality.clone()
    rows = features.view(-1, features.shape[-1])
    for at in (torch.rand(rows.shape[0], generator=generator) < share).nonzero()[:, 0].tolist():
        kind = int(torch.randint(7, (), generator=generator))
        column = int(torch.randint(rows.shape[1], (), generator=generator))
        if kind < 3 or quality is None:
            rows[at, column] = (torch.nan, torch.inf, -torch.inf)[kind % 3]
        elif kind == 3:
            rows[at] = 0
        else:
            quality.view(-1)[at] = (torch.nan, torch.inf, -0.5)[kind % 3]
    return replace(case, features=features, quality=quality)


def earlier_distances(case: Case, generator: torch.Generator) -> Tensor:
    """Distances to earlier picks, and rows that are never to be picked. Infinite ones have no softmax to compare."""
    shape = case.features.shape[:2]
    values = 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(8, shape, generator=generator)
    values[kind == 0] = -torch.inf  # not 0: the listing rounds a copy's distance to a pick, and ties would be none
    return values.to(case.features.dtype)


def pack(case: Case, lengths: Tensor) -> Case:
    """The same sets, packed: the leading ``lengths`` (B,) rows of each."""
    inside = torch.arange(case.features.shape[1]) < lengths[:, None]
    options = {name: value for name, value in case.options.items() if name != "lengths"}
    if "noise" in options:
        options["noise"] = options["noise"][:, inside]
    options["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    if "min_distances" in options:
        options["min_distances"] = options["min_distances"][inside]
    quality = None if case.quality is None else case.quality[inside]
    return replace(case, features=case.features[inside], quality=quality, options=options)


def positions(case: Case) -> Iterator[tuple[int, Tensor]]:
    """For each set: where its first row stands among all rows, and where those stand that take part."""
    mask, lengths = case.options.get("mask"), case.options.get("lengths")
    if (cu_seqlens := case.options.get("cu_seqlens")) is not None:
        ends = cu_seqlens.tolist()
        for first, last in pairwise(ends):
            yield first, torch.arange(first, last)
        return
    sets, rows = case.features.shape[:2]
    for b in range(sets):
        inside = torch.arange(rows)
        if lengths is not None:
            inside = inside[: int(lengths[b])]
        if mask is not None:
            inside = inside[mask[b].cpu()]
        yield b * rows, b * rows + inside


LAYOUTS = ("padded", "lengths", "mask", "packed")


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, max_rows: int = 20, max_dim: int = 40, max_k: int = 6) -> Case:
    """Any call with given noise or none: every layout and option, unpickable and duplicate rows, short sets."""
    sets, rows = draw(st.integers(1, 3)), draw(st.integers(1, max_rows))
    k, seed = draw(st.integers(1, max_k)), draw(st.integers(0, 2**16))
    noise = draw(st.sampled_from((None, 0.1, 2.0)))
    case = random_case(
        sets,
        rows,
        draw(st.integers(1, max_dim)),
        k,
        seed=seed,
        dtype=dtype,
        gamma=draw(st.sampled_from((0.5, 0.0, -0.75, 1.5))),
        noise=noise,
        quality=draw(st.sampled_from(("random", "norms", "flat"))),
        duplicates=draw(st.booleans()),
        # half precision has no unit rows but a few: its rounding would make 1 - x.x a distance, or a negative one
        unit=draw(st.booleans()) if torch.finfo(dtype).eps < 1e-6 else False,
        tau=draw(st.sampled_from((1.0, 0.25))),
        distance_scale=draw(st.sampled_from((1.0, 0.5))),
        distinct=draw(st.booleans()),
    )
    if not case.options.get("normalized") and draw(st.booleans()):
        case = case.with_options(metric="sqeuclidean")
    generator = torch.Generator().manual_seed(seed + 1)
    if draw(st.booleans()):
        case = case.with_options(min_distances=earlier_distances(case, generator))
    if draw(st.booleans()):
        case = spoil(case, seed)
    lengths = torch.randint(0, rows + 1, (sets,), generator=generator)
    layout = draw(st.sampled_from(LAYOUTS))
    if draw(st.booleans()):
        ends = lengths if layout in ("lengths", "packed") else torch.full((sets,), rows)
        lengths = lengths.clamp(min=1)
        start = torch.randint(2**31, (sets,), generator=generator) % ends.clamp(min=1)
        case = case.with_options(start=start)
    if layout == "lengths":
        return case.with_options(lengths=lengths)
    if layout == "mask":
        return case.with_options(mask=torch.rand(sets, rows, generator=generator) < 0.7)
    return pack(case, lengths) if layout == "packed" else case


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed sets": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "wide rows": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "strided columns": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1),
}
"""Rows (B, N, C) in layouts that are not contiguous, of the same values but for "expanded", whose sets are equal."""
