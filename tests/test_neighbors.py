"""context_statistics: against float64 vectors and the reference, bits, edges, bad rows, and PyTorch's own checks."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned
from test_alignment_reference import problem
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.test_neighbors import peak_resident
from fcn_kernels import DiscrepancyAlignment, compiler, context_statistics
from fcn_kernels.cpp import calls
from fcn_kernels.neighbors import torch_backend
from fcn_kernels.neighbors.context import Context
from fcn_kernels.neighbors.cpp import launch
from fcn_kernels.neighbors.cpp.launch import unavailable
from fcn_kernels.neighbors.problem import Arriving, Problem, Statistics
from reference import alignment

F64 = torch.float64
needs_compiler = pytest.mark.skipif(bool(unavailable(torch.float32)), reason="no C++ compiler")


def _there(name: str) -> str:
    if name == "cpp" and (reason := unavailable(torch.float32)):
        pytest.skip(reason)
    if name == "triton":
        pytest.importorskip("triton")
    return name


WAYS = ((2, slice(None)), (3, slice(0, 4)), (3, slice(1, 2)))
"""Of filtering: integers for any number of rows, streamed sums for a few."""


@pytest.fixture(params=["torch", "cpp", "cpp, by integers", "cpp, streamed", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small problems have no filter unless it is asked for."""
    name, _, filtered = request.param.partition(", ")
    if filtered:
        monkeypatch.setattr(launch, "FILTER", 2 if filtered == "by integers" else 3)
    return _there(name)


@pytest.fixture(params=["torch", "cpp"])
def double_backend(request: pytest.FixtureRequest) -> str:
    """One that takes float64."""
    return _there(request.param)


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def same_bits(one: Context, other: Context, part: Any = ...) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b[part]) for a, b in zip(one, other, strict=True))


def in_order(x: Tensor, bank: Tensor, backend: str) -> Tensor:
    """Indices (N, M) of all bank rows: nothing is left out, so nothing is decided by a threshold."""
    return context_statistics(x, bank, len(bank), backend=backend).indices


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "short", "cap"])
def test_vectors(name: str, double_backend: str) -> None:
    """Plain NumPy in float64, to 1e-12."""
    p = problem(name)
    k = None if p["k"] < 0 else int(p["k"])
    cap = None if p["cap"].isnan() else float(p["cap"])
    ids = {"ids": p["row_ids"], "bank_ids": p["bank_ids"]} if "row_ids" in p else {}
    got = context_statistics(p["x"], p["bank"], k, min_cosine=cap, backend=double_backend, **ids)
    whole = context_statistics(p["x"], p["bank"], None, min_cosine=-1, backend=double_backend, **ids)
    assert got.counts.equal(p["counts"])
    assert got.indices is None if k is None else got.indices.equal(p["indices"])
    for found, expected in ((got.mean, "mean"), (got.std, "std"), (whole.mean, "full_mean"), (whole.std, "full_std")):
        torch.testing.assert_close(found, p[expected], rtol=1e-12, atol=1e-12)


def test_gradients_of_the_vectors(double_backend: str) -> None:
    """Central differences of 1e-6, good to 1e-7."""
    p = problem("plain")
    x, bank = p["x"].requires_grad_(), p["bank"].requires_grad_()
    got = context_statistics(x, bank, int(p["k"]), backend=double_backend)
    (p["grad_weight_mean"] * got.mean + p["grad_weight_std"] * got.std).sum().backward()
    torch.testing.assert_close(x.grad, p["grad_x"], rtol=0, atol=1e-7)
    torch.testing.assert_close(bank.grad, p["grad_bank"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("options", [{"k": 3}, {"k": None, "min_cosine": -0.2}, {"k": 9, "min_cosine": 0.1}], ids=str)
def test_gradcheck(options: dict[str, Any], normalized: bool, double_backend: str) -> None:
    x, bank = (draw(n, 3, seed=n, dtype=F64).requires_grad_() for n in (4, 11))
    ids, bank_ids = torch.arange(4), torch.arange(11) // 3
    options |= {"normalized": normalized, "backend": double_backend}
    for given_ids in ({}, {"ids": ids, "bank_ids": bank_ids}):
        assert torch.autograd.gradcheck(lambda *t, o=given_ids: context_statistics(*t, **options, **o)[:2], (x, bank))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_gradient_that_is_not_wanted_changes_no_bit_of_the_other(wanted: tuple[bool, bool], backend: str) -> None:
    def gradients(asked: tuple[bool, bool]) -> list[Tensor | None]:
        tensors = [draw(n, 20, seed=n).requires_grad_(w) for n, w in zip((12, 40), asked, strict=True)]
        got = context_statistics(*tensors, 5, backend=backend)
        (got.mean.cumsum(0).sum() + got.std.sum()).backward()
        return [t.grad for t in tensors]

    for one, both, want in zip(gradients(wanted), gradients((True, True)), wanted, strict=True):
        assert torch.equal(one, both) if want else one is None


ROWS = st.lists(st.integers(-3, 3), min_size=3, max_size=3)


@settings(max_examples=60)
@given(
    x=st.lists(ROWS, max_size=4),
    bank=st.lists(ROWS, max_size=12),
    k=st.one_of(st.none(), st.integers(1, 14)),
    cap=st.sampled_from([None, -1, -0.31, 0.23, 0.97]),
    with_ids=st.booleans(),
    spoiled=st.integers(0, 5),
)
def test_drawn_problems(x: Any, bank: Any, k: int | None, cap: Any, with_ids: bool, spoiled: int) -> None:
    """Small whole numbers: many ties, rows of zeros, and rows that are NaN or infinite. On every backend."""
    rows, others = (torch.tensor(t, dtype=F64).view(-1, 3) for t in (x, bank))
    for tensor, value in ((rows, torch.nan), (others, torch.inf)):
        tensor[spoiled : spoiled + 1, 1] = value
    ids = {"ids": torch.arange(len(rows)) % 2, "bank_ids": torch.arange(len(others)) % 3} if with_ids else {}
    if k is None and cap is None:
        cap = -1
    r = alignment.context(rows, others, k, -torch.inf if cap in (None, -1) else cap, **ids)
    for backend in ("torch",) if unavailable(F64) else ("torch", "cpp"):
        got = context_statistics(rows, others, k, min_cosine=cap, backend=backend, **ids)
        assert got.counts.equal(r.counts)
        torch.testing.assert_close(got.mean, r.mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(got.std, r.std, rtol=0, atol=1e-7)  # the root of what rounding leaves of 0
        if got.indices is not None:
            (u, _), (v, _) = alignment._unit(rows), alignment._unit(others)
            width = min(k or 0, len(others))
            for one in (got.indices[:, :width], r.indices[:, :width]):
                assert (one >= 0).sum(1).equal(r.counts)
            there = r.indices[:, :width] >= 0
            scores = [(u @ v.T).gather(1, i[:, :width].clamp(min=0)) * there for i in (got.indices, r.indices)]
            torch.testing.assert_close(*scores, rtol=0, atol=1e-14)
            assert all(len(set(row) - {-1}) == int(n) for row, n in zip(got.indices.tolist(), r.counts, strict=True))


@pytest.mark.parametrize("dim", [1, 5, 100, 512, 1000])
def test_any_number_of_columns(dim: int, backend: str) -> None:
    x, bank = draw(9, dim), draw(300, dim, seed=1)
    ids, bank_ids = torch.arange(9), torch.arange(300) % 20
    got = context_statistics(x, bank, 20, ids=ids, bank_ids=bank_ids, backend=backend)
    r = alignment.context(x.double(), bank.double(), 20, -torch.inf, ids, bank_ids)
    torch.testing.assert_close(got.mean.double(), r.mean, rtol=0, atol=2e-7)
    torch.testing.assert_close(got.std.double(), r.std, rtol=0, atol=2e-7)
    if dim >= 100:  # gaps are wider than rounding
        assert got.indices.equal(r.indices[:, :20])
    single = context_statistics(x[4], bank, 20, ids=ids[4], bank_ids=bank_ids, backend=backend)
    assert single.mean.shape == ()
    assert same_bits(single, Context(*(t[4] for t in got)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [7, None])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, k: int | None, backend: str) -> None:
    x, bank = draw(5, 37, dtype=dtype), draw(90, 37, seed=1, dtype=dtype)
    expected = context_statistics(x.float(), bank.float(), k, min_cosine=-0.1, backend=backend)
    for one, other in ((x, bank), (x.float(), bank), (x, bank.float())):
        got = context_statistics(one, other, k, min_cosine=-0.1, backend=backend)
        if backend == "triton":  # whose blocks of columns differ by dtype
            assert same_bits(got._replace(mean=expected.mean, std=expected.std), expected)
            torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=1e-6)
        else:
            assert same_bits(got, expected)
    if backend != "triton":
        assert context_statistics(x.double(), bank, k, min_cosine=-0.1, backend=backend).mean.dtype == F64
    half, single = (
        [t.detach().clone().requires_grad_() for t in (x.to(kind), bank.to(kind))] for kind in (dtype, torch.float32)
    )
    for tensors in (half, single):
        context_statistics(*tensors, k, min_cosine=-0.1, backend=backend).mean.cumsum(0).sum().backward()
    for a, b in zip(half, single, strict=True):
        torch.testing.assert_close(a.grad, b.grad.to(dtype))


# --- exactly, whatever else ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 40])
def test_ties_and_near_ties_are_decided_exactly(k: int, backend: str) -> None:
    """Copies, and rows that differ by less than a matrix product's rounding, in many tiles."""
    base = draw(12, 96, seed=1)
    bank = torch.cat([base * (1 + 1e-7 * draw(12, 96, seed=s)) if s % 3 else base for s in range(40)])
    x = draw(8 if backend == "triton" else 20, 96) + base[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "TILE_BANK", 50)
        patch.setattr(torch_backend, "TILE_ROWS", 7)
        found = context_statistics(x, bank, k, backend=backend)
    assert found.indices.equal(in_order(x, bank, backend)[:, :k])
    copies = bank[found.indices]  # of equal rows, the lower index comes first
    equal = (copies[:, 1:] == copies[:, :-1]).all(-1)
    assert (found.indices.diff(dim=1)[equal] > 0).all()
    if k > 1:
        assert equal.any()


@pytest.mark.parametrize("k", [3, 50])
def test_a_bank_of_one_row_over_and_over_gives_the_first_of_them(k: int, backend: str) -> None:
    bank = draw(1, 24).expand(400, 24)
    got = context_statistics(draw(3, 24, seed=1), bank, k, backend=backend)
    assert got.indices.equal(torch.arange(k).expand(3, k))
    assert (got.std < 1e-7).all()


@needs_compiler
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("k", [1, 30])
@pytest.mark.parametrize(
    ("filtered", "unit", "n", "dim", "copies", "apart", "away"),
    [(2, 32000, 40, 72, 12, 1e-5, 0.3), (3, None, 4, 203, 60, 1e-7, 0.01)],
    ids=["by integers", "streamed"],
)
def test_the_filter_loses_nothing_within_its_error(
    filtered: int, unit: int | None, n: int, dim: int, copies: int, apart: float, away: float, k: int, normalized: bool,
    monkeypatch: pytest.MonkeyPatch, threads: Any,
) -> None:  # fmt: skip
    """The k-th and its rivals are closer than the faster scores can tell, whose own k best are others."""
    centers = F.normalize(draw(n, dim), dim=1)
    near = centers.repeat(copies, 1) + apart * draw(n * copies, dim, seed=1)
    bank = torch.cat([draw(700, dim, seed=2), near, near[:40], draw(700, dim, seed=3)])
    bank = F.normalize(bank, dim=1) if normalized else bank * torch.linspace(0.1, 9, len(bank))[:, None]
    x = F.normalize(centers + away * draw(n, dim, seed=4), dim=1)
    monkeypatch.setattr(launch, "FILTER", 0)
    expected = context_statistics(x, bank, k, normalized=normalized, backend="cpp")
    faster = [F.normalize(t, dim=1) for t in (x, bank)]
    if unit:
        faster = [(unit * t).round() for t in faster]
    by_faster = (faster[0] @ faster[1].T).topk(k).indices
    assert any(set(a) != set(b) for a, b in zip(by_faster.tolist(), expected.indices.tolist(), strict=True))
    monkeypatch.setattr(launch, "FILTER", filtered)
    for count, part in ((1, slice(None)), (3, slice(None)), (2, slice(1, 2))):
        threads(count)
        assert same_bits(context_statistics(x[part], bank, k, normalized=normalized, backend="cpp"), expected, part)


@needs_compiler
@pytest.mark.parametrize("spoil", ["alike", "rows that are not unit", "a bank that is not unit", "extreme", "all own"])
def test_the_filter_gives_way_where_it_cannot_help(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, bank, normalized, ids = draw(50, 64), draw(1500, 64, seed=1), "unit" in spoil, {}
    if spoil == "alike":
        bank = bank[:2].repeat(750, 1)
    if normalized:
        x, bank = F.normalize(x, dim=1), F.normalize(bank, dim=1)
        (x if "rows" in spoil else bank)[40:42] *= 3
    if spoil == "extreme":
        bank[::3] *= 1e30
        bank[1::3] *= 1e-30
        bank[700:710] = torch.inf
    if spoil == "all own":
        ids = {"ids": torch.zeros(50).long(), "bank_ids": torch.zeros(1500).long()}
    monkeypatch.setattr(launch, "FILTER", 0)
    expected = context_statistics(x, bank, 20, normalized=normalized, backend="cpp", **ids)
    for filtered, part in WAYS:
        monkeypatch.setattr(launch, "FILTER", filtered)
        some = {**ids, "ids": ids["ids"][part]} if ids else {}
        found = context_statistics(x[part], bank, 20, normalized=normalized, backend="cpp", **some)
        assert same_bits(found, expected, part)


@needs_compiler
@pytest.mark.parametrize("k", [1, 7, 50, 61])
def test_rows_beside_one_another_in_the_filter_keep_to_their_own_room(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one column half of the bank is alike, so that every row's room is full again and again."""
    x, bank = draw(30, 1), draw(2000, 1, seed=1)
    monkeypatch.setattr(launch, "FILTER", 0)
    expected = context_statistics(x, bank, k, backend="cpp")
    for filtered, part in WAYS:
        monkeypatch.setattr(launch, "FILTER", filtered)
        assert same_bits(context_statistics(x[part], bank, k, backend="cpp"), expected, part)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [48, 101])
def test_where_the_filter_pays_it_is_used_and_changes_nothing(
    dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, bank = draw(30, dim, dtype=dtype), draw(3000, dim, seed=1, dtype=dtype)
    for part in (slice(0, 30), slice(3, 7), slice(9, 10)):
        ids = {"ids": torch.arange(30)[part], "bank_ids": torch.arange(3000) % 60}
        with monkeypatch.context() as patch:
            plain = context_statistics(x[part], bank, 20, min_cosine=0.1, **ids, backend="cpp")
            patch.setattr(launch, "FILTER", 0)
            assert same_bits(context_statistics(x[part], bank, 20, min_cosine=0.1, **ids, backend="cpp"), plain)


def test_a_bank_in_rising_order(backend: str) -> None:
    """The worst for a threshold: every bank row is better than those before it."""
    angle = torch.linspace(3, 0.01, 900, dtype=F64)
    bank = torch.stack([angle.cos(), angle.sin()], 1).float()
    got = context_statistics(torch.tensor([[2.0, 0.0]]), bank, 25, backend=backend)
    assert got.indices[0].tolist() == list(range(899, 874, -1))


@pytest.mark.parametrize("options", [{"k": 30}, {"k": None, "min_cosine": 0.1}, {"k": 30, "min_cosine": 0.2}], ids=str)
def test_a_row_gives_the_same_bits_in_any_batch_tiling_and_number_of_threads(
    options: dict[str, Any], threads: Any, backend: str
) -> None:
    n, m = (10, 130) if backend == "triton" else (300, 700)  # the interpreter is slow
    x, bank = draw(n, 33), draw(m, 33, seed=1)
    ids = {"ids": torch.arange(n) // 4, "bank_ids": torch.arange(m) // 7}
    threads(1)
    whole = context_statistics(x, bank, **options, **ids, backend=backend)
    threads(3)
    assert same_bits(context_statistics(x, bank, **options, **ids, backend=backend), whole)
    for part in (slice(0, 1), slice(5, 9), slice(n - 3, n)):
        some = {"ids": ids["ids"][part], "bank_ids": ids["bank_ids"]}
        assert same_bits(context_statistics(x[part], bank, **options, **some, backend=backend), whole, part)
    if options["k"] and backend != "triton":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_backend, "TILE_BANK", 64)
            patch.setattr(torch_backend, "TILE_ROWS", 10)
            assert same_bits(context_statistics(x, bank, **options, **ids, backend=backend), whole)


@needs_compiler
@pytest.mark.parametrize("options", [{"k": 5}, {"k": 3000}, {"k": None, "min_cosine": 0.6}], ids=str)
@pytest.mark.parametrize("rows", [1, 30, 300])
def test_threads_that_share_the_bank_change_nothing(rows: int, options: dict[str, Any], threads: Any) -> None:
    """Few rows: each thread takes a part of the bank, of which there are three here."""
    x, bank = draw(rows, 6), draw(9000, 6, seed=1).round(decimals=1)  # with ties
    threads(1)
    alone = context_statistics(x, bank, **options, backend="cpp")
    for count in (2, 3, 8):
        threads(count)
        assert same_bits(context_statistics(x, bank, **options, backend="cpp"), alone)
    torch.testing.assert_close(alone.mean, context_statistics(x, bank, **options, backend="torch").mean)


@needs_compiler
def test_gradients_are_the_same_on_any_number_of_threads_and_as_on_the_torch_backend(threads: Any) -> None:
    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = draw(100, 37).requires_grad_(), draw(300, 37, seed=1).requires_grad_()
        got = context_statistics(*leaves, 20, backend=backend)
        return torch.autograd.grad((got.mean * got.std).cumsum(0).sum(), leaves)

    threads(1)
    alone = gradients("cpp")
    threads(3)
    for one, other, plain in zip(gradients("cpp"), alone, gradients("torch"), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_without_a_warning(dtype: torch.dtype) -> None:
    _compile(dtype, "native")


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_compiles_for_processors_that_are_not_here(processor: str) -> None:
    """Vectors of 16 and 32 bytes."""
    _compile(torch.float32, processor)


def _compile(dtype: torch.dtype, processor: str) -> None:
    flags = [*compiler._FLAGS, "-fopenmp", f"-march={processor}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    defined = [f"-D{d}" for d in calls.ROWS[dtype]]
    subprocess.run([*compiler._compiler(), *flags, *defined, str(launch._SOURCE)], check=True)


@pytest.mark.parametrize("selected", [4096, 0], ids=["kernel", "topk"])
@pytest.mark.parametrize("k", [3, 30])
def test_triton_searches_again_where_there_was_no_room(k: int, selected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows alike, half of them copies: more reach the bound than there is room for, and again."""
    pytest.importorskip("triton")
    from fcn_kernels.neighbors.kernels import launch as triton_launch

    bank = draw(300, 16, seed=1)
    bank[100:250] = bank[:1]
    x = torch.cat([bank[:1] + 0.1 * draw(3, 16, seed=2), draw(3, 16, seed=3)])
    fulls = []
    run = triton_launch._select

    def select(*arguments: Any, **buffers: Any) -> None:
        run(*arguments, **buffers)
        fulls.append(arguments[4].tolist())

    monkeypatch.setattr(triton_launch, "_select", select)
    monkeypatch.setattr(triton_launch, "MOST_SELECTED", selected)
    monkeypatch.setattr(triton_launch, "EXPECTED", 0)
    found = context_statistics(x, bank, k, backend="triton")
    assert fulls[0][:3] == fulls[1][:3] == [1, 1, 1]
    monkeypatch.setattr(triton_launch, "EXPECTED", 1000)
    assert same_bits(context_statistics(x, bank, k, backend="triton"), found)
    assert fulls[2] == [0] * 6
    expected = [0, *range(100, 100 + k - 1)]
    assert found.indices[:3].tolist() == [expected] * 3


def test_triton_never_waits_for_the_device() -> None:
    """No operation whose result, or its size, the host would have to know."""
    pytest.importorskip("triton")
    from fcn_kernels.neighbors.kernels import launch as triton_launch

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    problem = Problem(draw(5, 16), draw(90, 16, seed=1), torch.arange(5), torch.arange(90) % 7, k=4)
    with Watch():
        found = triton_launch.forward(problem)
        triton_launch.backward(problem, Arriving(torch.ones(5), torch.ones(5)), found, (True, True))
    assert "sort" in seen
    assert not set(seen) & set(waiting)
    assert not any(name.startswith("unique") for name in seen)


def test_the_same_at_a_lower_precision_of_products(backend: str) -> None:
    n, m = (6, 130) if backend == "triton" else (40, 500)
    x, bank = draw(n, 64), draw(m, 64, seed=1)
    expected = context_statistics(x, bank, 20, backend=backend)
    torch.set_float32_matmul_precision("medium")
    try:
        assert same_bits(context_statistics(x, bank, 20, backend=backend), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_strides(backend: str) -> None:
    x, bank = draw(6, 10), draw(40, 10, seed=1)
    expected = context_statistics(x, bank, 5, backend=backend)
    wide, tall = torch.zeros(6, 20), torch.full((80, 10), torch.nan)
    wide[:, ::2], tall[::2] = x, bank
    for one, other in ((wide[:, ::2], tall[::2]), (x.T.contiguous().T, bank.T.contiguous().T)):
        assert same_bits(context_statistics(one, other, 5, backend=backend), expected)


@pytest.mark.parametrize("options", [{"k": 5}, {"k": None, "min_cosine": 0.1}], ids=str)
def test_what_memory_held_before_changes_nothing(options: dict[str, Any], backend: str) -> None:
    """Fewer bank rows of other identities than k for some rows, and a row and a bank row that are not usable."""
    x, bank = draw(5, 20), draw(40, 20, seed=1)
    x[1], bank[3] = 0, torch.nan
    ids = {"ids": torch.arange(5), "bank_ids": torch.arange(40) % 3}
    ids["bank_ids"][4:] = 0

    def run() -> tuple[Context, list[Tensor]]:
        leaves = x.clone().requires_grad_(), bank.clone().requires_grad_()
        got = context_statistics(*leaves, **options, **ids, backend=backend)
        (got.mean.sum() + got.std.sum()).backward()
        return Context(*(t if t is None else t.detach() for t in got)), [t.grad for t in leaves]

    expected, grads = run()
    with poisoned():
        got, theirs = run()
    assert same_bits(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, theirs, strict=True))
    assert expected.counts.min() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"k": 20}, {"k": None, "min_cosine": 0.1}], ids=str)
def test_triton_on_the_device(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Against the reference in float64, with gradients; on a GPU where there is one."""
    pytest.importorskip("triton")
    n, m = (30, 260) if device.type == "cuda" else (8, 130)
    x, bank = draw(n, 48, dtype=dtype), draw(m, 48, seed=1, dtype=dtype)
    ids, bank_ids = torch.arange(n), torch.arange(m) % 40
    leaves = x.to(device).requires_grad_(), bank.to(device).requires_grad_()
    given_ids = {"ids": ids.to(device), "bank_ids": bank_ids.to(device)}
    got = context_statistics(*leaves, **options, **given_ids, backend="triton")
    exact = x.double().requires_grad_(), bank.double().requires_grad_()
    r = alignment.context(*exact, options["k"], options.get("min_cosine", -torch.inf), ids, bank_ids)
    assert got.counts.cpu().equal(r.counts)
    assert got.indices is None or got.indices.cpu().equal(r.indices[:, :20])
    torch.testing.assert_close(got.mean.double().cpu(), r.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.std.double().cpu(), r.std, rtol=0, atol=1e-6)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2e-3}
    grads = (torch.autograd.grad((c.mean + c.std).sum(), t) for c, t in ((got, leaves), (r, exact)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, **tolerance)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_k_beyond_the_bank(backend: str) -> None:
    x, bank = draw(3, 8), draw(5, 8, seed=1)
    exact, more = (context_statistics(x, bank, k, backend=backend) for k in (5, 8))
    assert exact.counts.tolist() == more.counts.tolist() == [5, 5, 5]
    assert more.indices[:, :5].equal(exact.indices)
    assert (more.indices[:, 5:] == -1).all()
    assert more.mean.equal(exact.mean)


@pytest.mark.parametrize("k", [4, None])
def test_nothing_to_compare(k: int | None, backend: str) -> None:
    """No bank, no rows, no bank row of another identity, none within the cap."""
    ours = torch.full((3,), 2**63 - 1)
    x, bank = draw(3, 8).requires_grad_(), draw(6, 8, seed=1).requires_grad_()
    for rows, others, options in (
        (x, bank[:0], {}),
        (x[:0], bank, {}),
        (x[:0], bank[:0], {}),
        (x, bank, {"ids": ours, "bank_ids": ours.repeat(2)}),
        (x, -x, {"ids": ours, "bank_ids": ours - 1, "min_cosine": 1.0}),
    ):
        got = context_statistics(rows, others, k, backend=backend, **{"min_cosine": 0.5} | options)
        assert got.counts.tolist() == [0] * len(rows)
        assert (got.mean == 0).all()
        assert (got.std == 0).all()
        assert got.indices is None or (got.indices == -1).all()
        for grad in torch.autograd.grad((got.mean + got.std).sum(), (x, bank), allow_unused=True):
            assert grad is None or (grad == 0).all()


def test_identities_near_the_ends_of_int64_are_told_apart(backend: str) -> None:
    """In float64 they are all one."""
    ids = torch.tensor([2**63 - 1, 2**63 - 2, -(2**63)])
    got = context_statistics(draw(3, 8), draw(3, 8, seed=1), 3, ids=ids, bank_ids=ids, backend=backend)
    assert [sorted(row) for row in got.indices.tolist()] == [[-1, 1, 2], [-1, 0, 2], [-1, 0, 1]]


@pytest.mark.parametrize("options", [{"k": 6}, {"k": None, "min_cosine": -1}], ids=str)
def test_rows_that_are_not_usable_change_nothing_and_get_no_gradient(options: dict[str, Any], backend: str) -> None:
    x, bank = draw(9, 16), draw(50, 16, seed=1)
    good, kept = torch.arange(9) % 3 != 1, torch.arange(50) % 7 != 3

    def run(rows: Tensor, others: Tensor) -> tuple[Context, tuple[Tensor, ...]]:
        leaves = rows.requires_grad_(), others.requires_grad_()
        got = context_statistics(*leaves, **options, backend=backend)
        return got, torch.autograd.grad((got.mean.sin() + 2 * got.std).sum(), leaves)

    expected, grads = run(x[good], bank[kept])
    spoiled, other = x.clone(), bank.clone()
    spoiled[1, 2], spoiled[4], spoiled[7, 15] = torch.nan, 0, -torch.inf
    other[3] = 0
    other[10, 5], other[17, 0], other[24] = torch.nan, torch.inf, -torch.inf
    other[31], other[38, 1], other[45, :2] = 0, torch.nan, torch.inf
    got, theirs = run(spoiled, other)
    assert (got.counts[~good] == 0).all()
    assert (got.mean[~good] == 0).all()
    if options["k"]:
        places = kept.nonzero()[:, 0]
        expected = expected._replace(indices=places[expected.indices])
        assert same_bits(Context(*(t if t is None else t[good] for t in got)), expected)
    torch.testing.assert_close(got.mean[good], expected.mean, rtol=0, atol=1e-7)
    for grad, there, mine in zip(theirs, (good, kept), grads, strict=True):
        assert (grad[~there] == 0).all()
        torch.testing.assert_close(grad[there], mine, rtol=1e-4, atol=1e-6)


def test_extreme_norms(backend: str) -> None:
    """Squares leave float32, cosines do not."""
    x, bank = draw(4, 12), draw(30, 12, seed=1)
    plain = context_statistics(x, bank, 5, backend=backend)
    sizes, others = torch.tensor([1e-30, 1e30, 1.0, 1e18]), torch.tensor([1e25, 1e-25, 3.0]).repeat(10)
    got = context_statistics(x * sizes[:, None], bank * others[:, None], 5, backend=backend)
    assert got.indices.equal(plain.indices)
    torch.testing.assert_close(got.mean, plain.mean)


def test_memory_is_far_below_the_matrix_of_scores(double_backend: str) -> None:
    """The whole matrix has 96 MB."""
    x, bank = draw(600, 8), draw(40_000, 8, seed=1)
    context_statistics(x[:10], bank, 10, backend=double_backend)
    assert peak_resident(lambda: context_statistics(x, bank, 10, backend=double_backend)) < 48 << 20


# --- bad calls -------------------------------------------------------------------------------------------------------

X, BANK, IDS = draw(3, 4), draw(7, 4, seed=1), torch.arange(7)
WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "a list": (TypeError, "x to be a Tensor, got list", lambda: context_statistics([1.0], BANK)),
    "integers": (TypeError, "bank of dtype float32.*int64", lambda: context_statistics(X, BANK.long())),
    "rank": (ValueError, r"bank of shape \(M, C\), got \(4,\)", lambda: context_statistics(X, BANK[0])),
    "no columns": (ValueError, "at least one column", lambda: context_statistics(X[:, :0], BANK)),
    "columns": (ValueError, "as many columns as x has, 4, got 3", lambda: context_statistics(X, BANK[:, :3])),
    "device": (ValueError, "bank on the device of x, cpu, got meta", lambda: context_statistics(X, BANK.to("meta"))),
    "k": (ValueError, "k to be an integer of at least 1, got 0", lambda: context_statistics(X, BANK, 0)),
    "neither": (ValueError, "got None for both", lambda: context_statistics(X, BANK, None)),
    "cap": (ValueError, r"\[-1, 1\] or None, got 1.5", lambda: context_statistics(X, BANK, min_cosine=1.5)),
    "cap a string": (TypeError, "of type str", lambda: context_statistics(X, BANK, min_cosine="1")),
    "one side": (ValueError, "got ids without bank_ids", lambda: context_statistics(X, BANK, ids=IDS[:3])),
    "other side": (ValueError, "got bank_ids without ids", lambda: context_statistics(X, BANK, bank_ids=IDS)),
    "ids": (
        ValueError,
        r"bank_ids of shape \(7,\)",
        lambda: context_statistics(X, BANK, ids=IDS[:3], bank_ids=IDS[:3]),
    ),
    "dtype of ids": (TypeError, "ids of dtype int32", lambda: context_statistics(X, BANK, ids=X[:, 0], bank_ids=IDS)),
    "flag": (TypeError, "strict to be a bool", lambda: context_statistics(X, BANK, strict=1)),
    "backend": (ValueError, "expected backend", lambda: context_statistics(X, BANK, backend="numpy")),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_calls_say_what_was_expected(name: str) -> None:
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_strict_names_the_row() -> None:
    assert context_statistics(X, BANK, 2, strict=True).counts.tolist() == [2, 2, 2]
    for name, at, rows in (("x", 2, X), ("bank", 5, BANK)):
        spoiled = rows.clone()
        spoiled[at, 1] = torch.nan
        with pytest.raises(ValueError, match=f"expected {name} of finite rows.*row {at} of norm nan"):
            context_statistics(*((spoiled, BANK) if name == "x" else (X, spoiled)), 2, strict=True)


# --- inside PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"k": 3}, {"min_cosine": 0.1}], ids=str)
def test_opcheck(options: dict[str, Any], backend: str) -> None:
    for gradient in (True, False):
        x, bank = X.clone().requires_grad_(gradient), BANK.clone().requires_grad_(gradient)
        p = Problem(x, bank, IDS[:3], IDS % 4, **options)
        torch.library.opcheck(torch.ops.fcn_kernels.context_statistics.default, (*p, backend))
    found = Statistics(*torch.ops.fcn_kernels.context_statistics.default(*p, backend))
    arriving = Arriving(torch.ones(3), torch.ones(3))
    args = (*p, *arriving, *found, True, False, backend)
    torch.library.opcheck(torch.ops.fcn_kernels.context_statistics_backward.default, args)


def test_compile_and_export_take_it_whole() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, bank: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            return context_statistics(x, bank, 3, ids=ids, bank_ids=IDS % 4)  # type: ignore[return-value]

    def gradient(run: Any) -> Tensor:
        x = X.clone().requires_grad_()
        got = run(x, BANK, IDS[:3])
        (got[0].cumsum(0).sum() + got[1].sum()).backward()
        return x.grad

    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(Module(), (X, BANK, IDS[:3])).module()
    for run in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(run(X, BANK, IDS[:3]), Module()(X, BANK, IDS[:3]), strict=True))
    assert torch.equal(gradient(compiled), gradient(Module()))


def test_flops_are_the_formula() -> None:
    x, bank = X.clone().requires_grad_(), BANK.clone().requires_grad_()
    with FlopCounterMode(display=False) as forward:
        mean = context_statistics(x, bank, 5).mean
    with FlopCounterMode(display=False) as backward:
        mean.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 7 * 4
    assert backward.get_total_flops() == 2 * 3 * 5 * 4 * 3


def test_what_there_is_no_derivative_of() -> None:
    x = X.clone().requires_grad_()
    grad = torch.autograd.grad(context_statistics(x, BANK, 3).mean.sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    assert not context_statistics(x, BANK, 3).counts.requires_grad
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* Use torch.func.vjp"):
        torch.func.jvp(lambda x: context_statistics(x, BANK, 3).std, (X,), (X,))
    align = DiscrepancyAlignment(BANK, k=3)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        align(forward_ad.make_dual(X, X), X)


@pytest.mark.parametrize("options", [{"k": 3}, {"k": None, "min_cosine": -0.5}])
def test_transforms_give_what_backward_and_one_call_after_another_give(options: dict[str, Any], backend: str) -> None:
    def loss(x: Tensor, bank: Tensor) -> Tensor:
        context = context_statistics(x, bank, backend=backend, **options)
        return context.mean.cumsum(0).sum() + context.std.square().sum()

    x, bank = X.clone().requires_grad_(), BANK.clone().requires_grad_()
    expected = torch.autograd.grad(loss(x, bank), (x, bank))
    assert same_bits(torch.func.grad(loss, (0, 1))(X, BANK), expected)
    sets = torch.stack([X, X.flip(0)])
    each = torch.func.vmap(lambda x: context_statistics(x, BANK, backend=backend, **options).mean)(sets)
    assert same_bits(each, [context_statistics(x, BANK, backend=backend, **options).mean for x in sets])
    assert same_bits(
        torch.func.vmap(torch.func.grad(loss), (0, None))(sets, BANK), [torch.func.grad(loss)(x, BANK) for x in sets]
    )


def test_autocast_changes_nothing(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = context_statistics(X, BANK, 3, backend=backend)
    assert same_bits(mixed, context_statistics(X, BANK, 3, backend=backend))
