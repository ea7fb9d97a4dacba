"""The operator inside PyTorch: opcheck, compile, export, autocast, vmap, second derivatives, FLOPs."""

import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fcn_kernels import CoresetSelect, coreset_select
from fcn_kernels.selection.cpp.launch import unavailable
from fcn_kernels.selection.problem import Problem, Selected


def _inputs(batch=2, rows=7, dim=5, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(batch * 100 + rows)
    features = torch.randn(batch, rows, dim, generator=generator, dtype=dtype)
    quality = torch.rand(batch, rows, generator=generator, dtype=dtype) + 0.5
    gamma = torch.tensor(0.7, dtype=dtype)
    return tuple(t.requires_grad_(grad) for t in (features, quality, gamma))


def _problem(features, quality, gamma, **changes):
    quality = None if quality is None else quality.flatten()
    return Problem(features, quality, gamma, torch.tensor(0.7), k=3, distance_scale=0.5, **changes)


CASES = {
    "sampled": lambda x, q, g: _problem(x, q, g, seed=torch.tensor(11)),
    "lengths": lambda x, q, g: _problem(x, q, g, lengths=torch.tensor([7, 2])),
    "norms, distinct": lambda x, q, g: _problem(x, None, g, distinct=True),
    "packed, start": lambda x, q, g: _problem(
        x.flatten(0, 1), q, g, cu_seqlens=torch.tensor([0, 5, 14]), start=torch.tensor([1, 2])
    ),
    "squared, with state": lambda x, q, g: _problem(
        x,
        q,
        g,
        metric="sqeuclidean",
        min_distances=torch.linspace(0.1, 2, 14),
        limits=torch.tensor([2, 3]),
        return_state=True,
    ),
}


def _moved(problem, device):
    return Problem(
        *(v.detach().to(device).requires_grad_(v.requires_grad) if torch.is_tensor(v) else v for v in problem)
    )


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request, monkeypatch, device):
    if request.param == "cpp" and (reason := unavailable(torch.float32)):
        pytest.skip(reason)
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("the tensors are on a GPU")
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param != "torch":
        # what is saved of padding is not written, nor read: opcheck, which compares it, should find the same there
        plain = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: plain(*args, **options).zero_())
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_opcheck_of_the_forward_operator(case, backend, device):
    problem = _moved(CASES[case](*_inputs()), device)
    torch.library.opcheck(torch.ops.fcn_kernels.select.default, (*problem, True, backend))


@pytest.mark.parametrize("case", CASES)
def test_opcheck_of_the_backward_operator(case, backend, device):
    problem = _moved(CASES[case](*_inputs(grad=False)), device)
    out = Selected(*torch.ops.fcn_kernels.select.default(*problem, True, backend))
    grad = torch.randn_like(out.features)
    torch.library.opcheck(torch.ops.fcn_kernels.select_backward.default, (*problem, grad, *out.saved, backend))


def _run(function, inputs):
    features, quality, gamma = (t.detach().clone().requires_grad_() for t in inputs)
    coreset = function(features, quality, gamma)
    coreset.features.square().sum().backward()
    return coreset.indices, coreset.features, features.grad, quality.grad, gamma.grad


def _pick(features, quality, gamma):
    return coreset_select(features, 3, quality, gamma, tau=0.7)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
        ),
    ],
)
def test_compiles_whole_with_dynamic_sizes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(_pick, fullgraph=True, dynamic=True, backend=backend)
    for batch, rows in ((2, 7), (3, 9), (5, 4)):
        inputs = _inputs(batch, rows)
        for ours, theirs in zip(_run(compiled, inputs), _run(_pick, inputs), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_sampling_compiles_and_draws_anew():
    torch._dynamo.reset()
    inputs = _inputs(4, 40, grad=False)
    compiled = torch.compile(
        lambda *a: coreset_select(a[0], 8, a[1], a[2], sample=True).indices, fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(1)
    first, second = compiled(*inputs), compiled(*inputs)
    torch.manual_seed(1)
    assert torch.equal(compiled(*inputs), first)
    assert not torch.equal(first, second)


def test_exports_with_dynamic_sizes():
    module = CoresetSelect(3).eval()
    features, quality, _ = _inputs(grad=False)
    batch, rows = torch.export.Dim("batch", min=2), torch.export.Dim("rows", min=2)
    program = torch.export.export(
        module, (features, quality), dynamic_shapes=({0: batch, 1: rows}, {0: batch, 1: rows})
    )
    other, other_quality, _ = _inputs(4, 11, grad=False)
    torch.testing.assert_close(program.module()(other, other_quality), module(other, other_quality))


def test_autocast_changes_nothing():
    inputs = _inputs(2, 50, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _run(_pick, inputs)
    for ours, theirs in zip(mixed, _run(_pick, inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_derivative_raises():
    features, quality, gamma = _inputs()
    picked = _pick(features, quality, gamma).features
    (first,) = torch.autograd.grad(picked.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_gradients_reach_only_what_asks_for_them():
    features, quality, gamma = _inputs()
    picked = coreset_select(features, 3, quality.detach(), gamma.detach())
    assert picked.features.requires_grad
    assert not picked.distances.requires_grad
    picked.features.sum().backward()
    assert quality.grad is None
    assert gamma.grad is None
    with torch.no_grad():
        assert not _pick(features, quality, gamma).features.requires_grad


@pytest.mark.parametrize("normalized", [False, True])
def test_flops_are_counted(normalized):
    batch, rows, dim, k = 2, 30, 16, 4
    features, quality, _ = _inputs(batch, rows, dim)
    product = 2 * batch * rows * dim  # a multiply-add is two
    with FlopCounterMode(display=False) as forward:
        picked = coreset_select(features, k, quality, normalized=normalized).features
    assert forward.get_total_flops() == product * (k - 1 + (not normalized))
    with FlopCounterMode(display=False) as backward:
        picked.sum().backward()
    assert backward.get_total_flops() == product * (3 * k - 2)


# --- who listens --------------------------------------------------------------------------------------------------


def test_the_operator_is_seen_by_those_who_listen() -> None:
    """A plain call is spared the dispatcher; a profiler, a mode and fake tensors still find the operator in it."""
    x = torch.randn(2, 9, 5, requires_grad=True)

    def step(rows: torch.Tensor) -> torch.Tensor:
        features = coreset_select(rows, 3).features
        features.sum().backward()
        return features

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(x)
    names = {event.key for event in profile.key_averages()}
    assert {"fcn_kernels::select", "fcn_kernels::select_backward"} <= names

    seen = []

    class Listener(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Listener():
        step(x)
    ops = torch.ops.fcn_kernels
    assert ops.select.default in seen
    assert ops.select_backward.default in seen

    plain = x.detach()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = mode.from_tensor(plain).requires_grad_()
        assert step(fake).shape == (2, 3, 5)
        assert fake.grad.shape == x.shape
    meta = coreset_select(torch.empty(2, 9, 5, device="meta"), 3)
    assert meta.features.shape == (2, 3, 5)
    assert meta.indices.device.type == "meta"
