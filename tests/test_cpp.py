"""What is the C++ backend's own: its columns, threads and bounds, and how it is compiled."""

from __future__ import annotations

import functools
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Outcome, assert_as_accurate_as_eager, assert_equal_in_float64, outcome, select_on, weights_for
from problems import Case, pack, random_case, spoil

from fcn_kernels import compiler, coreset_select
from fcn_kernels.cli.info import DTYPES
from fcn_kernels.cpp import calls
from fcn_kernels.selection import torch_backend
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Problem, Selected

F64 = torch.float64
needs_compiler = pytest.mark.skipif(bool(cpp.unavailable(torch.float32)), reason="no C++ compiler")


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sampled(case: Case, backend: str = "cpp") -> Outcome:
    return outcome(select_on(backend), case, weights_for(case), generator=torch.Generator().manual_seed(3))


# --- columns --------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 71, 130])
def test_any_number_of_columns(dim: int) -> None:
    """Whole and part registers of them, in every type of row."""
    assert_equal_in_float64(random_case(2, 9, dim, 4, dtype=F64, seed=dim))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_as_accurate_as_eager(random_case(2, 9, dim, 3, dtype=dtype, seed=dim), "cpp")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [2, 3, 8, 15, 16, 17, 33, 64, 71, 130, 512])
def test_copies_of_the_first_pick_are_0_apart_from_it(dtype: torch.dtype, dim: int) -> None:
    """Their norms and products come of one pass, the pick's own product of another."""
    generator = torch.Generator().manual_seed(dim)
    row = torch.randn(1, dim, generator=generator).mul(3).to(dtype)
    x = torch.cat([row, torch.randn(3, dim, generator=generator).to(dtype), row.expand(4, dim)])
    found = coreset_select(x, 1, torch.tensor([2.0, *[1.0] * 7]), backend="cpp", return_min_distances=True)
    assert found.indices[0] == 0
    assert not found.min_distances[[0, 4, 5, 6, 7]].any()
    assert found.min_distances[1:4].all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    case = random_case(3, 20, 21, 4, dtype=dtype)
    exact = Case(
        case.features.float(),
        case.k,
        case.quality.float(),
        case.gamma.float(),
        {"noise": case.options["noise"].float()},
    )
    weights = weights_for(case)
    half, single = outcome(select_on("cpp"), case, weights), outcome(select_on("cpp"), exact, weights)
    assert torch.equal(half.coreset.indices, single.coreset.indices)
    assert torch.equal(half.features, single.features.to(dtype))


# --- threads and bounds change nothing --------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("quality", ["random", "norms"])
@pytest.mark.parametrize("shape", [(1, 1500, 64), (3, 700, 96), (40, 30, 64), (2, 5, 8)])
def test_the_same_bits_on_any_number_of_threads(threads: Any, shape: tuple[int, int, int], quality: str) -> None:
    """One large set in blocks, a few, and whole sets a thread."""
    case = random_case(*shape, 5, noise=None, quality=quality, sample=True)
    case = spoil(case, share=0.1)
    threads(1)
    alone = sampled(case)
    for count in (2, 3, 7):
        threads(count)
        assert sampled(case).same_bits(alone)


@needs_compiler
def test_the_same_bits_from_several_python_threads_at_once(threads: Any) -> None:
    """Each call has helpers of its own, more than there are cores: some come when the loop is over."""
    threads(3)
    cases = [random_case(1, 1500 + 200 * seed, 64, 6, noise=None, seed=seed) for seed in range(4)]
    alone = [sampled(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            at_once = pool.map(sampled, cases)
            assert all(a.same_bits(b) for a, b in zip(at_once, alone, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [256, 100])
def test_a_gradient_that_is_stored_past_the_caches(dtype: torch.dtype, dim: int, threads: Any) -> None:
    """One over a megabyte is, if its rows are aligned; a few of its sets alone are not, and have the same bits."""
    threads(2)
    many, few = 600, 3
    case = random_case(many, 12, dim, 4, dtype=dtype)
    noise = case.options["noise"]
    part = replace(
        case, features=case.features[:few], quality=case.quality[:few], options={"noise": noise[:, :few].contiguous()}
    )
    weights = weights_for(case)
    whole = outcome(select_on("cpp"), case, weights)
    alone = outcome(select_on("cpp"), part, weights[:few])
    assert whole.features.numel() * whole.features.itemsize > 1 << 20
    assert torch.equal(whole.features[:few], alone.features)
    expected = outcome(select_on("torch"), case, weights).features
    torch.testing.assert_close(whole.features, expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5, 16, 20, 33, 1000])
@pytest.mark.parametrize("tau", [0.01, 0.5, 30.0])
def test_softmaxes_are_exact_to_float32(rows: int, tau: float) -> None:
    """Of the qualities, as the first pick's is; from 1 down to where float32 ends, and 0 for rows that cannot be
    picked."""
    draw = torch.Generator().manual_seed(rows)
    quality = torch.rand(2, rows, generator=draw) * 2 + 0.1
    mask = torch.rand(2 * rows, generator=draw) > 0.1
    mask[[0, rows]] = True
    p = Problem(torch.randn(2, rows, 2, generator=draw), quality, tau=torch.tensor(tau), mask=mask)
    softmax = cpp.forward(p, keep=True).kept[0].view(2, rows)
    exact = quality.double().masked_fill(~mask.view(2, rows), -torch.inf).div(p.tau.double()).softmax(-1)
    exponents = quality.amax() / tau * 2**-23  # what their rounding does to them
    torch.testing.assert_close(softmax.double(), exact, rtol=float(3e-7 + exponents), atol=2e-45)
    assert (softmax.view(-1)[~mask] == 0).all()


@needs_compiler
def test_a_large_gradient_lies_on_large_pages(threads: Any) -> None:
    """And is that of its sets alone, which are small."""
    threads(2)
    features = torch.randn(65, 256, 512, requires_grad=True)  # 34 MB
    quality = torch.rand(65, 256) + 0.5
    grad = torch.randn(65, 3, 512)

    def gradient(rows: torch.Tensor, at: slice) -> torch.Tensor:
        picked = coreset_select(rows, 3, quality[at], 0.5, backend="cpp").features
        return torch.autograd.grad(picked, rows, grad[at])[0]

    whole = gradient(features, slice(None))
    for at in (slice(0, 2), slice(63, 65)):
        assert torch.equal(whole[at], gradient(features.detach()[at].clone().requires_grad_(), at))
    if (flags := mapping_flags(whole.data_ptr() + (whole.numel() * 4) // 2)) is not None:
        assert "hg" in flags


def mapping_flags(address: int) -> list[str] | None:
    """What was advised of the memory at an address; None where the system does not say, or has no large pages."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not Path("/proc/self/smaps").exists():
        return None
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(found[1], 16) <= address < int(found[2], 16)
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


@needs_compiler
def test_a_large_set_among_small_ones(threads: Any) -> None:
    """It is shared by the threads, the small ones are not; the same as one after another, and as the torch backend."""
    lengths = torch.tensor([3, 0, 1300, 7, 1, 5])
    case = pack(random_case(6, 1300, 64, 4, noise=None, sample=True), lengths)
    threads(3)
    shared = sampled(case)
    threads(1)
    assert sampled(case).same_bits(shared)
    reference = sampled(case, "torch")
    assert torch.equal(shared.coreset.indices, reference.coreset.indices)
    torch.testing.assert_close(shared.features, reference.features, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("k", [2, 3, 9, 70])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise": 0.3},
        {"duplicates": True, "distinct": True},
        {"duplicates": True, "quality": "flat", "gamma": 0.0},
        {"gamma": 2.0, "distance_scale": 0.5},
        {"unit": True},
        {"metric": "sqeuclidean"},
        {"metric": "sqeuclidean", "duplicates": True, "distinct": True, "noise": 0.3},
    ],
)
def test_inference_compares_few_rows_and_picks_the_same(options: dict[str, Any], k: int, threads: Any) -> None:
    """A call that will have a gradient compares every row with every pick; one that will not, few of them."""
    threads(2)
    for seed in range(3):
        case = random_case(1, 900, 80, k, seed=seed, **{"noise": None, **options})
        every = coreset_select(
            case.features.requires_grad_(), k, case.quality, case.gamma, backend="cpp", **case.options
        )
        with torch.no_grad():
            few = coreset_select(case.features, k, case.quality, case.gamma, backend="cpp", **case.options)
        assert all(torch.equal(a, b) for a, b in zip(few, every, strict=True))


@needs_compiler
@pytest.mark.parametrize("where", ["line", "shell", "clusters", "one place"])
def test_many_points_wherever_they_lie(where: str) -> None:
    """Picks by buckets are those of all comparisons, with equal points and rows left out among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3, generator=generator)
    if where == "line":
        x[:, 1:] = 1e6
    elif where == "shell":
        x = torch.nn.functional.normalize(x, dim=-1) * 1e-3
    elif where == "clusters":
        x = x * 1e-3 + torch.randint(0, 4, (5000, 1), generator=generator) * 1e3
    else:
        x[:] = x[0]
    x[::7], x[3::50] = x[0], torch.nan
    known = torch.rand(5000, generator=generator).where(torch.rand(5000, generator=generator) > 0.1, -torch.inf)
    for options in ({}, {"distinct": True}, {"min_distances": known * 1e-5}, {"mask": known > 0.5}):
        options = {"metric": "sqeuclidean", "return_nearest": True, "backend": "cpp", **options}
        every = coreset_select(x.clone().requires_grad_(), 60, **options)
        few = coreset_select(x, 60, **options)
        assert all(torch.equal(a, b) for a, b in zip(few, every, strict=True))


@needs_compiler
@pytest.mark.parametrize("dim", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"distinct": True, "duplicates": True}, {"noise": 0.3}], ids=str)
def test_points_are_compared_side_by_side(dim: int, options: dict[str, Any], threads: Any) -> None:
    """In whole and part registers, in blocks: the picks, gaps and gradients of longer rows."""
    case = random_case(2, 9001, dim, 7, dtype=F64, **{"noise": None, "metric": "sqeuclidean", **options})
    wide = replace(case, features=torch.nn.functional.pad(case.features, (0, 9 - dim)))
    weights = weights_for(case)
    threads(3)
    got = outcome(select_on("cpp"), case, weights)
    threads(1)
    assert outcome(select_on("cpp"), case, weights).same_bits(got)
    want = outcome(select_on("cpp"), wide, torch.nn.functional.pad(weights, (0, 9 - dim)))
    assert torch.equal(got.coreset.indices, want.coreset.indices)
    torch.testing.assert_close(got.coreset.distances, want.coreset.distances)
    torch.testing.assert_close(got.features, want.features[..., :dim], rtol=1e-4, atol=1e-4)
    options = {**case.options, "return_nearest": True, "backend": "cpp"}
    every = coreset_select(case.features.requires_grad_(), 7, case.quality, case.gamma, **options)
    with torch.no_grad():  # then only points near a pick meet it
        few = coreset_select(case.features, 7, case.quality, case.gamma, **options)
    assert all(torch.equal(a, b) for a, b in zip(few, every, strict=True))
    assert torch.equal(few.indices, got.coreset.indices)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"start": 3}, {"distinct": True, "tau": 0.5}, {"quality": "norms"}], ids=str)
def test_drawn_noise_is_that_of_the_torch_backend(options: dict[str, Any]) -> None:
    """For more steps than one draw serves."""
    case = random_case(3, 30, 12, 11, noise=None, sample=True, **options)
    ours, theirs = sampled(case), sampled(case, "torch")
    assert torch.equal(ours.coreset.indices, theirs.coreset.indices)
    plain = outcome(select_on("cpp"), case.with_options(sample=False), weights_for(case))
    assert not torch.equal(ours.coreset.indices, plain.coreset.indices)
    for name, grad in ours.gradients().items():
        torch.testing.assert_close(grad, theirs.gradients()[name], rtol=1e-4, atol=1e-5)


@needs_compiler
def test_many_unusable_rows_do_not_slow_the_first_pick() -> None:
    """The search for the first pick looks at one row; if that cannot be picked, at all of them at once."""
    features = torch.full((1, 50_000, 4), torch.nan)
    features[0, 77] = 1
    coreset = coreset_select(features, 2, torch.rand(1, 50_000) + 0.5, backend="cpp")
    assert coreset.indices.tolist() == [[77, -1]]
    assert coreset.counts.tolist() == [1]


@needs_compiler
@pytest.mark.parametrize("changes", [{"lengths": [99, -5]}, {"cu_seqlens": [-7, 5, 99]}, {"start": [99, -5]}], ids=str)
def test_values_that_a_compiled_call_does_not_check_stay_inside(changes: dict[str, list[int]]) -> None:
    case = random_case(2, 7, 5, 3)
    (name, values), *_ = changes.items()
    features = case.features.flatten(0, 1) if name == "cu_seqlens" else case.features
    problem = Problem(features, case.quality.flatten(), case.gamma, k=3, **{name: torch.tensor(values)})
    out = Selected(*torch.ops.fcn_kernels.select.default(*problem, True, "cpp"))
    assert (out.indices < 14).all()
    assert (out.counts <= 3).all()
    gradients = torch.ops.fcn_kernels.select_backward.default(*problem, torch.ones(2, 3, 5), *out.saved, "cpp")
    assert gradients[0].shape == features.shape


# --- compiling --------------------------------------------------------------------------------------------------------


def forget(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on as in a process that has compiled nothing, on a machine where nothing was compiled."""
    patch.setenv("XDG_CACHE_HOME", str(folder))
    for module, name in ((compiler, "load"), (cpp, "unavailable"), (cpp, "_function")):
        patch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """In a process that has compiled nothing."""
    forget(monkeypatch, tmp_path)
    return monkeypatch


def picks(**options: Any) -> list[list[int]]:
    case = random_case(2, 9, 5, 3)
    with torch.no_grad():
        return coreset_select(case.features, 3, case.quality, case.gamma, **case.options, **options).indices.tolist()


def refused(message: str) -> None:
    """The call that names C++ raises, the one that does not runs on PyTorch's operations."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        forward = torch_backend.forward
        patch.setattr(torch_backend, "forward", lambda *args: ran.append(1) or forward(*args))
        assert picks() == picks(backend="torch")
    assert len(ran) == 2
    with pytest.raises(RuntimeError, match=f"(?s)backend=.cpp. is unavailable.*{message}"):
        picks(backend="cpp")


def test_without_a_compiler(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.delenv("CXX", raising=False)
    fresh.setenv("PATH", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused("no C\\+\\+ compiler")


def test_with_a_compiler_that_fails(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    fresh.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match=r"slower PyTorch operations(.|\n)*no such thing") as warned:
        refused("no such thing")
    assert len(warned) == 1


def test_with_a_compiler_that_is_not_there(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.warns(UserWarning, match="slower PyTorch operations.*nothing"):
        refused("nothing")


def test_switched_off(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("FCN_KERNELS_CPP", "0")
    refused("FCN_KERNELS_CPP=0")


@needs_compiler
def test_compiles_once_for_a_machine(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert picks(backend="cpp") == picks(backend="torch")
    (library,) = (tmp_path / "fcn_kernels").iterdir()
    made = library.stat().st_mtime_ns
    code = "import torch, fcn_kernels; fcn_kernels.coreset_select(torch.randn(5, 4), 2, backend='cpp')"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert [p.stat().st_mtime_ns for p in (tmp_path / "fcn_kernels").iterdir()] == [made]


@needs_compiler
@pytest.mark.parametrize("found", ["none", "clang++"])
def test_without_gcc_s_openmp_the_same_bits(
    found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: Any
) -> None:
    """Clang's would be another than PyTorch's, of which its threads would ask for their numbers."""
    if found != "none" and not shutil.which(found):
        pytest.skip(f"no {found}")
    case = spoil(random_case(1, 1500, 64, 5, noise=None, sample=True), share=0.1)
    threads(2)
    with_openmp = sampled(case)
    forget(monkeypatch, tmp_path)
    if found == "none":
        monkeypatch.setattr(compiler, "_openmp", lambda _, of=compiler._openmp: of("clang version 14.0.6"))
        for _ in range(3):
            assert sampled(case).same_bits(with_openmp)
    else:
        monkeypatch.setenv("CXX", found)  # which rounds otherwise
        first = sampled(case)
        assert torch.equal(first.coreset.indices, with_openmp.coreset.indices)
        for _ in range(100):
            assert sampled(case).same_bits(first)


def test_only_gcc_has_openmp() -> None:
    others = (
        "Debian clang version 14.0.6",
        "Intel(R) oneAPI DPC++/C++ Compiler 2023.1.0",
        "Apple clang version 15.0.0",
    )
    for version in others:
        assert not any("omp" in flag or "openmp" in flag for flag in compiler._openmp(version))
    gcc = "g++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.\n"
    assert compiler._openmp(gcc)[0] == "-fopenmp"


@needs_compiler
@pytest.mark.parametrize("name", DTYPES)
def test_compiles_without_a_warning(name: str, tmp_path: Path) -> None:
    defined = [f"-D{d}" for d in calls.ROWS[DTYPES[name]]]
    command = [
        *compiler._compiler(),
        *compiler._FLAGS,
        "-fopenmp",
        "-march=native",
        "-Wall",
        "-Wextra",
        "-Werror",
        *defined,
    ]
    subprocess.run([*command, str(cpp._SOURCE), "-o", str(tmp_path / "library.so")], check=True)
