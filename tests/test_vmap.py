"""torch.func.vmap over the selection: a dimension more is sets more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from fcn_kernels import coreset_select
from fcn_kernels.selection.cpp.launch import unavailable

V, B, N, C, K = 2, 2, 6, 4, 3


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and (reason := unavailable(torch.float32)):
        pytest.skip(reason)
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "features": torch.randn(V, B, N, C, generator=generator),
        "quality": torch.rand(V, B, N, generator=generator) + 0.5,
        "gamma": torch.rand(V, generator=generator),
        "noise": torch.randn(V, K, B, N, generator=generator),
        "mask": torch.rand(V, B, N, generator=generator) < 0.8,
        "start": torch.randint(N, (V, B), generator=generator),
        "lengths": torch.randint(1, N + 1, (V, B), generator=generator),
    }


@pytest.fixture
def without_fallback() -> Iterator[None]:
    """PyTorch's own loop, which warns of itself, is an error."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def call(backend: str, names: tuple[str, ...], fixed: dict[str, Any]) -> Callable[..., Any]:
    return lambda *tensors: coreset_select(k=K, backend=backend, **dict(zip(names, tensors, strict=True)), **fixed)


CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # given; of these, one for all calls
    "rows": (("features",), ()),
    "quality": (("features", "quality"), ()),
    "one gamma": (("features", "quality", "gamma"), ("gamma",)),
    "a gamma each": (("features", "quality", "gamma"), ()),
    "the same rows": (("features", "quality", "mask"), ("features",)),
    "noise": (("features", "quality", "noise"), ()),
    "the same noise": (("features", "noise"), ("noise",)),
    "masked, started": (("features", "mask", "start"), ()),
    "lengths": (("features", "quality", "lengths"), ()),
}


def cases() -> list[tuple[str, str]]:
    """In the interpreter, one that is folded and one that is not."""
    plain = [(backend, case) for backend in ("torch", "cpp") for case in CASES]
    return [*plain, ("triton", "noise"), ("triton", "a gamma each")]


@pytest.mark.parametrize(("backend", "case"), cases(), indirect=["backend"])
def test_vmap_gives_what_one_call_after_another_gives(case: str, backend: str) -> None:
    names, shared = CASES[case]
    given = inputs()
    arguments = [given[name][0] if name in shared else given[name] for name in names]
    in_dims = tuple(None if name in shared else 0 for name in names)
    run = call(backend, names, {})
    found = vmap(run, in_dims)(*arguments)
    for i in range(V):
        wanted = run(*(a if d is None else a[i] for a, d in zip(arguments, in_dims, strict=True)))
        assert all(torch.equal(f[i], w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("backend", "shared"),
    [("torch", True), ("torch", False), ("cpp", True), ("cpp", False), ("triton", True)],
    indirect=["backend"],
)
def test_gradients_through_vmap_and_under_it(shared: bool, backend: str) -> None:
    given = inputs()
    features, quality, noise = given["features"], given["quality"], given["noise"]
    gamma = given["gamma"][0] if shared else given["gamma"]
    weight = torch.linspace(-1, 1, B * K * C).view(B, K, C)

    def loss(x: Tensor, q: Tensor, g: Tensor, e: Tensor) -> Tensor:
        return (coreset_select(x, K, q, g, noise=e, backend=backend).features * weight).sum()

    dims = (0, 0, None if shared else 0, 0)
    every = vmap(grad(loss, (0, 1, 2)), dims)(features, quality, gamma, noise)
    through = grad(lambda *a: vmap(loss, dims)(*a).sum(), (0, 1, 2))(features, quality, gamma, noise)
    for i in range(V):
        wanted = grad(loss, (0, 1, 2))(features[i], quality[i], gamma if shared else gamma[i], noise[i])
        for a, b in zip(wanted, every, strict=True):
            assert torch.allclose(a, b[i], atol=1e-6)
        for a, b in zip(wanted[:2], through[:2], strict=True):
            assert torch.allclose(a, b[i], atol=1e-6)
    total = every[2].sum() if shared else every[2]
    assert torch.allclose(through[2], total, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpp"], indirect=True)
def test_anchors_of_all_calls_and_of_each(backend: str, without_fallback: None) -> None:
    rows = inputs()["features"]
    for anchors, dim in ((rows[0, 0, :2], None), (rows[:, 0, :2], 0), (rows[:, :, :2], 0)):
        found = vmap(lambda x, a: coreset_select(x, K, anchors=a, backend=backend), (0, dim))(rows, anchors)
        for i in range(V):
            wanted = coreset_select(rows[i], K, anchors=anchors if dim is None else anchors[i], backend=backend)
            assert all(torch.equal(f[i], w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["torch", "cpp"], indirect=True)
def test_other_dimensions_packed_sets_and_noise_of_a_seed(backend: str) -> None:
    given = inputs()
    features, quality = given["features"].movedim(0, 2), given["quality"].movedim(0, 1)
    found = vmap(lambda x, q: coreset_select(x, K, q, backend=backend), (2, 1), 1)(features, quality)
    wanted = coreset_select(given["features"][1], K, given["quality"][1], backend=backend)
    assert all(torch.equal(f.movedim(1, 0)[1], w) for f, w in zip(found, wanted, strict=True))

    offsets = torch.tensor([0, 3, 3, B * N])
    packed = given["features"].flatten(1, 2)
    rows = vmap(lambda x: coreset_select(x, K, cu_seqlens=offsets, backend=backend).indices)(packed)
    assert torch.equal(rows[1], coreset_select(packed[1], K, cu_seqlens=offsets, backend=backend).indices)

    def draw(x: Tensor) -> Tensor:
        return coreset_select(x, K, sample=True, backend=backend).indices

    same = given["features"][:1].expand(40, B, N, C)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(same)
    torch.manual_seed(3)
    once = vmap(draw, randomness="same")(same)
    torch.manual_seed(3)
    assert torch.equal(once, draw(same[0]).expand_as(once))
    assert len(vmap(draw, randomness="different")(same).unique(dim=0)) > 10
