"""What a call takes and refuses, under PyTorch's compilers and transforms too."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fcn_kernels import ClusterAggregate, Coreset, CoresetAggregator, CoresetSelect, coreset_select
from fcn_kernels.attention.encoding import waves
from fcn_kernels.selection.cpp import launch as cpp

X = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
Q = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) + 0.1


def same(found: Coreset, wanted: Coreset) -> None:
    for name, a, b in zip(Coreset._fields, found, wanted, strict=True):
        assert torch.equal(a, b), name


# --- words --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "lengths": (TypeError, "expected lengths to be a Tensor, got int", {"lengths": 3}),
    "generator": (TypeError, r"expected generator to be a torch.Generator, got int", {"generator": 5, "sample": True}),
    "normalized": (TypeError, "expected normalized to be a bool, got 'yes' of type str", {"normalized": "yes"}),
    "strict": (TypeError, "expected strict to be a bool, got 'x' of type str", {"strict": "x"}),
    "sample": (TypeError, "expected sample to be a bool, got 1 of type int", {"sample": 1}),
    "distinct": (TypeError, "expected distinct to be a bool, got None of type NoneType", {"distinct": None}),
    "k too large": (ValueError, r"at most 2\^31 - 1, got 9223372036854775808", {"k": 2**63}),
    "k a NumPy float": (TypeError, "expected k to be an integer of at least 1", {"k": np.float32(2)}),
    "gamma out of float32": (
        ValueError,
        r"gamma to be finite in float32, up to 3.40282e\+38, got 1e\+300",
        {"gamma": 1e300},
    ),
    "gamma a tensor of NaN": (
        ValueError,
        "gamma to be finite in float32, .*, got nan",
        {"gamma": torch.tensor(math.nan)},
    ),
    "gamma a tensor out of range": (
        ValueError,
        "gamma to be finite in float32",
        {"gamma": torch.tensor(1e300, dtype=torch.float64)},
    ),
    "tau below float32": (ValueError, "tau to be a normal number in float32, 1.17549e-38 to", {"tau": 1e-40}),
    "tau a tensor below float32": (
        ValueError,
        "tau to be a normal number in float32",
        {"tau": torch.tensor(1e-40, dtype=torch.float64)},
    ),
    "tau a tensor's shape": (
        ValueError,
        r"a number or a 0-d tensor, got shape \(1,\)",
        {"tau": torch.ones(1)},
    ),
    "scale above float32": (ValueError, "distance_scale to be a normal number in float32", {"distance_scale": 1e300}),
    "scale below float32": (ValueError, "distance_scale to be a normal number in float32", {"distance_scale": 1e-50}),
    "noise of NaN": (
        ValueError,
        r"neither NaN nor infinite, got nan at \(1, 0, 3\)",
        {"noise": math.nan},
    ),
    "noise of inf": (
        ValueError,
        r"neither NaN nor infinite, got inf at \(1, 0, 3\)",
        {"noise": math.inf},
    ),
    "mask of 2": (ValueError, "mask of bool, or of integers 0 and 1, got values", {"mask": torch.full((2, 12), 2)}),
    "mask of floats": (TypeError, "mask of dtype bool, uint8", {"mask": torch.ones(2, 12)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_words(case: str) -> None:
    error, message, options = REFUSED[case]
    options = dict(options)
    if "noise" in options:
        noise = torch.zeros(2, 2, 12)
        noise[1, 0, 3] = options["noise"]
        options["noise"] = noise
    k = options.pop("k", 2)
    with pytest.raises(error, match=message):
        coreset_select(X, k, Q, **options)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_that_are_not_dense_are_refused_with_words(layout: str) -> None:
    def other(dense: Tensor) -> Tensor:
        found: Tensor = getattr(dense, layout)()
        return found

    with pytest.raises(TypeError, match="expected features to be a dense tensor, got one of layout torch"):
        coreset_select(other(X[0]), 2)
    with pytest.raises(TypeError, match="expected quality to be a dense tensor, got one of layout torch"):
        coreset_select(X, 2, other(Q))


def test_float64_rows_have_the_range_of_float64() -> None:
    options = {"gamma": 1e-300, "tau": 1e-300, "distance_scale": 1e-300}
    same(coreset_select(X.double(), 3, Q.double(), **options), coreset_select(X.double(), 3, Q.double(), **options))
    with pytest.raises(ValueError, match="in float64"):
        coreset_select(X.double(), 3, Q.double(), tau=5e-324)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["torch", "cpp", None])
def test_learned_numbers_are_read_without_a_warning(backend: str | None) -> None:
    torch.set_warn_always(True)  # else it comes once in a process
    try:
        gamma, tau = (torch.tensor(value, requires_grad=True) for value in (0.5, 2.0))
        rows = X.clone().requires_grad_()
        coreset_select(rows, 3, Q, gamma, tau=tau, backend=backend).features.sum().backward()
        assert gamma.grad is not None
        assert tau.grad is None
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_numpy_numbers_are_numbers(kind: Any) -> None:
    wanted = coreset_select(X, 3, Q, 0.5, tau=2.0, distance_scale=0.5, start=4)
    for integer in (np.int64, np.int32, np.uint8):
        found = coreset_select(X, integer(3), Q, kind(0.5), tau=kind(2), distance_scale=kind(0.5), start=integer(4))
        same(found, wanted)


def test_integer_masks_are_masks() -> None:
    keep = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    for dtype in (torch.uint8, torch.int32, torch.int64):
        same(coreset_select(X, 3, Q, mask=keep.to(dtype)), coreset_select(X, 3, Q, mask=keep))
        same(coreset_select(X[0], 3, Q[0], mask=keep[0].to(dtype)), coreset_select(X[0], 3, Q[0], mask=keep[0]))


def test_a_start_means_nothing_to_an_empty_set() -> None:
    offsets = torch.tensor([0, 5, 5, 12])
    found = coreset_select(X[0], 2, cu_seqlens=offsets, start=torch.tensor([1, 0, 3]))
    assert found.counts.tolist() == [2, 0, 2]
    assert found.indices[:, 0].tolist() == [1, -1, 3]
    assert coreset_select(X[0], 2, cu_seqlens=offsets, start=1).counts.tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match=r"start of set 2 in \[0, 7\), got 7"):
        coreset_select(X[0], 2, cu_seqlens=offsets, start=torch.tensor([1, 0, 7]))
    with pytest.raises(ValueError, match=r"start in \[0, 12\), got 1180591620717411303424"):
        coreset_select(X[0], 2, cu_seqlens=offsets, start=2**70)
    for start in (0, 5, torch.tensor([0, 5])):
        assert coreset_select(X[:, :0], 2, start=start).counts.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"k": 0}, ValueError),
        ({"k": 2.5}, TypeError),
        ({"k": 2, "backend": "cuda"}, ValueError),
        ({"k": 2, "gamma": math.nan}, ValueError),
        ({"k": 2, "tau": 0.0}, ValueError),
        ({"k": 2, "tau": torch.tensor(-1.0)}, ValueError),
        ({"k": 2, "tau": torch.ones(2)}, ValueError),
        ({"k": 2, "tau": torch.tensor(1)}, TypeError),
        ({"k": 2, "distance_scale": -1.0}, ValueError),
        ({"k": 2, "distinct": 1}, TypeError),
    ],
)
def test_a_module_is_refused_when_it_is_built(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        CoresetSelect(**arguments)


def test_a_module_can_be_strict() -> None:
    bad = X.clone()
    bad[1, 3] = math.nan
    with pytest.raises(ValueError, match="row 3 of set 1 cannot be picked"):
        CoresetSelect(2)(bad, strict=True)


# --- nested tensors, saving ---------------------------------------------------------------------------------------


def test_jagged_nested_tensors_are_packed_sets() -> None:
    rows = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 1, 7)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    quality = torch.nested.nested_tensor([r.norm(dim=1) for r in rows], layout=torch.jagged)
    packed = torch.cat(rows).requires_grad_()
    offsets = torch.tensor([0, 5, 6, 13])
    for q in (None, quality, quality.values()):
        found = coreset_select(nested, 3, q, 0.5)
        wanted = coreset_select(packed, 3, None if q is None else quality.values(), 0.5, cu_seqlens=offsets)
        same(found, wanted)
        (grad,) = torch.autograd.grad(found.features.square().sum(), nested)
        (right,) = torch.autograd.grad(wanted.features.square().sum(), packed)
        assert torch.equal(grad.values(), right)
    with pytest.raises(ValueError, match="no cu_seqlens with nested features"):
        coreset_select(nested, 3, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="quality to be nested as the features are"):
        coreset_select(nested, 3, torch.nested.nested_tensor([r[:1, 0] for r in rows], layout=torch.jagged))
    with pytest.raises(ValueError, match="quality of shape"):
        coreset_select(nested, 3, torch.ones(12))
    with pytest.raises(ValueError, match=r"layout torch\.jagged"):
        coreset_select(torch.nested.nested_tensor(rows), 3)


def test_a_saved_coreset_loads_with_weights_only() -> None:
    file = io.BytesIO()
    coreset = coreset_select(X, 3, Q)
    torch.save(coreset, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is Coreset
    same(loaded, coreset)


# --- memory -------------------------------------------------------------------------------------------------------

BACKENDS = ["torch", *([] if cpp.unavailable(torch.float32) else ["cpp"]), "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_of_negated_numbers(backend: str) -> None:
    """What the imaginary part of a conjugate is: a mark says that signs are to be changed."""

    def negated(values: Tensor) -> Tensor:
        found: Tensor = torch._neg_view(-values)  # type: ignore[attr-defined]
        assert found.is_neg()
        return found

    def step(view: Any) -> tuple[Any, ...]:
        x, q = X.clone().requires_grad_(), Q.clone().requires_grad_()
        options = {"tau": view(torch.tensor(0.7)), "start": view(torch.tensor([3, 4])), "min_distances": view(Q)}
        found = coreset_select(view(x), 3, view(q), view(torch.tensor(0.5)), backend=backend, **options)
        return *found, *torch.autograd.grad(found.features, (x, q), view(torch.ones_like(found.features)))

    for mine, theirs in zip(step(negated), step(torch.clone), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_device_is_not_where_rows_are(backend: str) -> None:
    offsets, anchors = torch.tensor([0, 5, 12]), X[0, :2].clone()

    def calls() -> list[Tensor]:
        x = X.clone().requires_grad_()
        torch.manual_seed(0)
        trained = coreset_select(x, 3, Q, 0.5, tau=0.7, sample=True, backend=backend)
        euclidean = {"metric": "sqeuclidean", "anchors": anchors, "return_nearest": True}
        started = coreset_select(X, [3, 2], Q, 0.5, start=1, distinct=True, backend=backend, **euclidean)
        packed = coreset_select(X[0], 3, cu_seqlens=offsets, strict=True, backend=backend)
        return [*trained, *started, *packed, *torch.autograd.grad(trained.features.square().sum(), x)]

    wanted = calls()
    with torch.device("meta"):
        found = calls()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_head_on_another_device_than_the_default() -> None:
    waves.cache_clear()
    head, x = CoresetAggregator(16, 3, num_heads=2).eval(), torch.nn.functional.normalize(torch.randn(2, 9, 16), dim=-1)
    with torch.device("meta"):
        found = head(x, Q[:, :9]).descriptor
        assert CoresetAggregator(16).gamma.is_meta
    assert torch.equal(found, head(x, Q[:, :9]).descriptor)


@pytest.mark.parametrize("training", [False, True])
def test_heads_on_the_meta_device_tell_shapes(training: bool) -> None:
    with torch.device("meta"):
        x, q = torch.randn(2, 9, 16), torch.rand(2, 9)
        heads = CoresetAggregator(16, 3, num_heads=2), ClusterAggregate(16, style_dim=0, norm_dim=16)
    for head in heads:
        descriptor = head.train(training)(x, quality=q).descriptor
        assert descriptor.is_meta
        assert descriptor.shape == (2, 16)


def options_of_values() -> dict[str, Any]:
    """Those whose values are looked at."""
    return {
        "gamma": torch.tensor(0.5),
        "tau": torch.tensor(0.7),
        "start": torch.tensor([1, 2]),
        "lengths": torch.tensor([3, 9]),
        "min_distances": torch.ones(2, 12),
        "noise": torch.zeros(3, 2, 12),
    }


def test_fake_tensors_have_no_values_to_look_at() -> None:
    with FakeTensorMode():
        fake, x = options_of_values(), torch.randn(2, 12, 5)
        mask = torch.ones(2, 12, dtype=torch.int64)
        packed = torch.tensor([0, 5, 12])
        found = coreset_select(x, 3, torch.rand(2, 12), **fake)
        assert coreset_select(x, 3, mask=mask).indices.shape == (2, 3)
        assert coreset_select(x[0], 3, cu_seqlens=packed, start=1).indices.shape == (2, 3)
    assert [tuple(t.shape) for t in found] == [(2, 3, 5), (2, 3), (2,), (2, 3)]


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx_records_a_call(tracing: str) -> None:
    def run(x: Tensor, q: Tensor, given: dict[str, Any]) -> Coreset:
        return coreset_select(x, 3, q, **given)

    recorded = make_fx(run, tracing_mode=tracing)(X, Q, options_of_values())
    other = options_of_values() | {"start": torch.tensor([2, 0]), "lengths": torch.tensor([12, 1])}
    same(recorded(-X, Q, other), run(-X, Q, other))


# --- numbers that change under compilers --------------------------------------------------------------------------


def compiled(function: Any, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """Down to the operators: a number may become a constant as late as there."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("name", ["tau", "gamma"])
def test_an_annealed_number_is_not_compiled_for_each_value(name: str) -> None:
    def step(x: Tensor, q: Tensor, value: Any) -> Tensor:
        return coreset_select(x, 3, q, **{"gamma": 0.5, name: value}).features

    for values in ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [torch.tensor(t) for t in (1.0, 0.9, 0.8, 0.7)]):
        run, counter = compiled(step)
        for value in values:
            x = X.clone().requires_grad_()
            again = X.clone().requires_grad_()
            run(x, Q, value).square().sum().backward()
            step(again, Q, float(value)).square().sum().backward()
            torch.testing.assert_close(x.grad, again.grad)
        assert counter.frame_count <= 2  # once as a constant, once as a number that changes


def test_a_k_that_follows_the_length_is_not_compiled_for_each_length() -> None:
    def step(x: Tensor) -> Tensor:
        return coreset_select(x, x.shape[1] // 4, start=x.shape[1] // 2).indices

    run, counter = compiled(step, dynamic=True)
    for n in (9, 12, 17, 24, 40):
        x = torch.randn(2, n, 5)
        assert torch.equal(run(x), step(x))
    assert counter.frame_count <= 2


def test_export_takes_a_k_and_a_start_that_follow_the_length() -> None:
    class Quarter(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            return coreset_select(x, n // 4, start=n // 2).indices

    exported = torch.export.export(
        Quarter(), (torch.randn(2, 16, 5),), dynamic_shapes=({1: torch.export.Dim("n", min=8, max=4096)},)
    ).module()
    for n in (8, 16, 33):
        x = torch.randn(2, n, 5)
        assert torch.equal(exported(x), Quarter()(x))


# --- transforms ---------------------------------------------------------------------------------------------------


def loss(x: Tensor, q: Tensor, gamma: Tensor) -> Tensor:
    return coreset_select(x, 3, q, gamma, tau=0.7).features.square().sum()


def test_reverse_mode_transforms_give_the_gradient() -> None:
    leaves = X.clone().requires_grad_(), Q.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    arguments = X, Q, torch.tensor(0.5)
    for found in (
        torch.func.grad(loss, argnums=(0, 1, 2))(*arguments),
        torch.func.vjp(loss, *arguments)[1](torch.tensor(1.0)),
        torch.func.jacrev(loss, argnums=(0, 1, 2))(*arguments),
    ):
        for grad, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(grad, right)


def test_forward_mode_raises_and_is_never_zero() -> None:
    tangents = torch.ones_like(X), torch.ones_like(Q), torch.tensor(1.0)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* Use torch.func.vjp"):
        torch.func.jvp(loss, (X, Q, torch.tensor(0.5)), tangents)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(loss)(X, Q, torch.tensor(0.5))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            coreset_select(dual, 3, Q)
        same(coreset_select(X, 3, Q), coreset_select(X, 3, Q))  # beside it a call without a tangent works


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_give_the_same_gradient(reentrant: bool) -> None:
    def step(x: Tensor) -> Tensor:
        return coreset_select(x, 3, Q, 0.5, sample=True).features

    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        x = X.clone().requires_grad_()
        features = torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant) if checkpointed else step(x)
        features.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
