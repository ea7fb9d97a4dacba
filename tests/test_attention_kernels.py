"""The Triton kernels of set attention: against float64, interpreted where there is no GPU."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from fcn_kernels.attention import torch_backend as attention_blocks
from fcn_kernels.attention.inputs import Arriving, Inputs
from fcn_kernels.attention.kernels import launch as attention_launch
from fcn_kernels.sets import RowSets

# Beside twice eager's loss: what float32 sums, and the cosine's 2e-7, may lose where eager happens to lose nothing.
SLACK = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Whatever a kernel does not write is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _call(lengths, dim, queries, dtype, device, *, dropout=0.0, seed=0):
    """A call, all numbers of which are representable in dtype, and the gradients that arrive."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    rows = sum(lengths)
    quality = torch.rand(rows, generator=generator) * 20 + 5
    sets = RowSets.packed(torch.tensor([0, *lengths]).cumsum(0), quality.device)
    p = Inputs(
        (draw(len(lengths), queries, dim) / 4).to(dtype).float(),
        F.normalize(draw(rows, dim), dim=-1).to(dtype),
        quality.to(dtype).float(),
        (draw(dim) / 2 + 1).to(dtype).float(),
        *sets,
        torch.tensor(2**60 + 12345) if dropout else None,
        dropout,
        1e-5,
    )
    arriving = draw(len(lengths), queries, dim).to(dtype).float(), draw(len(lengths), queries)
    return _to(p, device=device), tuple(t.to(device) for t in arriving)


def _to(p, *args, **kwargs):
    return Inputs(
        *(t.to(*args, **kwargs) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in p[:4]),
        *(t.to(kwargs["device"]) if "device" in kwargs and t is not None else t for t in p[4:7]),
        *p[7:],
    )


def _run(backend, p, arriving, *plan):
    """out, weight_sum and the four gradients."""
    out, weight_sum, lse = backend.forward(p, *plan)
    grad_out, grad_weight_sum = (t.to(p.queries.dtype) for t in arriving)
    delta = (grad_out * out).sum(-1) + grad_weight_sum * weight_sum
    return out, weight_sum, *backend.backward(p, Arriving(lse, grad_out, grad_weight_sum, delta), *plan)


def _eager(p, arriving):
    """A plain softmax in the features' own dtype throughout, by autograd."""
    dtype = p.features.dtype
    tensors = [t.to(dtype).detach().requires_grad_() for t in p[:4]]
    queries, features, quality, weight = tensors
    dim = features.shape[1]
    outs, sums = [], []
    for b in range(len(p.lengths)):
        first, last = int(p.offsets[b]), int(p.offsets[b + 1])
        norms = quality[first:last]
        rows = norms[:, None] * features[first:last]
        frequency = 2 * torch.pi * 10000 ** (-2 * torch.arange(dim // 2, dtype=torch.float64, device=rows.device) / dim)
        # angles in half precision would be off by whole turns: eager code has them in float32, and so the sinusoid
        angle = norms.to(torch.promote_types(dtype, torch.float32))[:, None] * frequency.to(
            torch.promote_types(dtype, torch.float32)
        )
        wave = torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(dtype)
        share = torch.softmax(queries[b] @ (rows + F.layer_norm(wave, (dim,), weight)).T, -1)
        if p.seed is not None:
            keep = attention_blocks.keep_mask(
                p, torch.tensor([b], device=rows.device), torch.arange(last - first, device=rows.device)
            )
            share = share * keep[0] / (1 - p.dropout)
        outs.append(share @ rows)
        sums.append(share.sum(-1))
    out, weight_sum = torch.stack(outs), torch.stack(sums)
    loss = (out * arriving[0].to(dtype)).sum() + (weight_sum * arriving[1].to(dtype)).sum()
    return out, weight_sum, *torch.autograd.grad(loss, tensors)


NAMES = ("out", "weight_sum", "queries", "features", "quality", "encoding_weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "dim", "queries", "dropout"),
    [
        ([20, 33], 64, 24, 0.0),  # a tile and a bit
        ([5, 1, 70], 20, 6, 0.3),  # columns that fill no block, several tiles, dropout
        ([40], 34, 40, 0.1),  # more queries than a block of 32
    ],
)
def test_error_is_within_twice_eagers(dtype, lengths, dim, queries, dropout, device):
    p, arriving = _call(lengths, dim, queries, dtype, device, dropout=dropout)
    exact = _run(attention_blocks, _to(p, dtype=torch.float64), arriving)
    eager, ours = _eager(p, arriving), _run(attention_launch, p, arriving)
    for name, truth, theirs, got in zip(NAMES, exact, eager, ours, strict=True):
        scale = truth.abs().max()
        assert got.isfinite().all(), name
        loss, allowed = (got - truth).abs().max(), 2 * (theirs - truth).abs().max() + SLACK[dtype] * scale
        assert loss <= allowed, f"{name}: {loss:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("processors", [1, 64])
def test_parts_of_a_set_are_put_together(processors, device):
    lengths = [100, 0, 3, 65]
    p, arriving = _call(lengths, 32, 24, torch.float32, device, dropout=0.2)
    plan = attention_launch.make_plan(4, 168, 24, torch.float32, processors)
    assert plan.parts == (1 if processors == 1 else 2)
    exact = _run(attention_blocks, _to(p, dtype=torch.float64), arriving)
    for truth, got in zip(exact, _run(attention_launch, p, arriving, plan), strict=True):
        assert (got - truth).abs().max() <= 2e-5 * truth.abs().max()


def test_padding_and_bad_rows_are_left_out_and_take_no_gradient(device):
    p, arriving = _call([12, 12, 12], 32, 24, torch.float32, device)
    lengths = torch.tensor([12, 5, 0], device=device)
    features, quality = p.features.clone(), p.quality.clone()
    features[1, 3], features[2], quality[3], quality[4], quality[5] = torch.nan, 0, torch.inf, -1, torch.nan
    features[17:24], features[24:] = torch.nan, torch.inf
    p = p._replace(features=features, quality=quality, lengths=lengths)
    expected = _run(attention_blocks, p, arriving)
    got = _run(attention_launch, p, arriving)
    for name, truth, value in zip(NAMES, expected, got, strict=True):
        assert value.isfinite().all(), name
        assert (value - truth).abs().max() <= 2e-5 * truth.abs().max(), name
    left_out = [*range(1, 6), *range(17, 36)]
    assert got[3][left_out].abs().max() == 0
    assert got[4][left_out].abs().max() == 0


def test_strided_rows_and_repeated_bits(device):
    p, arriving = _call([30, 9], 32, 24, torch.float32, device)
    wide = torch.full((39, 80), torch.nan, device=device)
    wide[:, 16:48] = p.features
    strided = p._replace(features=wide[:, 16:48])
    for first, second in zip(
        _run(attention_launch, p, arriving), _run(attention_launch, strided, arriving), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_repeats_give_the_same_bits(dtype, device):
    lengths = [30, 9, 0, 70]
    p, arriving = _call(lengths, 32, 24, dtype, device, dropout=0.2)
    first = _run(attention_launch, p, arriving)
    for _ in range(50 if device.type == "cuda" else 1):
        for one, other in zip(first, _run(attention_launch, p, arriving), strict=True):
            assert torch.equal(one, other)


def test_no_sets_and_no_rows(device):
    p, arriving = _call([0, 0], 16, 5, torch.float32, device)
    out, weight_sum, *grads = _run(attention_launch, p, arriving)
    assert out.abs().max() == weight_sum.abs().max() == grads[0].abs().max() == grads[3].abs().max() == 0
    p, arriving = _call([], 16, 5, torch.float32, device)
    assert _run(attention_launch, p, arriving)[0].shape == (0, 5, 16)
