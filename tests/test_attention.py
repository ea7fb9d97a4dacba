"""Set attention on the torch backend: against a plain softmax, its gradient, the op inside PyTorch, its dropout."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fcn_kernels.attention import torch_backend as attention_blocks
from fcn_kernels.attention.encoding import Waves, sinusoid, sinusoid_backward
from fcn_kernels.attention.inputs import Inputs
from fcn_kernels.attention.op import set_attention
from fcn_kernels.sets import RowSets


def _inputs(lengths, dim=16, queries=5, dtype=torch.float64, seed=0):
    """Packed sets: queries, features, norms, encoding weight; and where the sets are."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    features = F.normalize(torch.randn(rows, dim, generator=generator, dtype=dtype), dim=-1)
    tensors = (
        torch.randn(len(lengths), queries, dim, generator=generator, dtype=dtype) / 2,
        features,
        torch.rand(rows, generator=generator, dtype=dtype) * 5 + 1,
        torch.randn(dim, generator=generator, dtype=dtype),
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return tensors, RowSets.packed(offsets, features.device)


def _plain(queries, features, quality, weight, sets, keep=None, dropout=0.0):
    """Softmax attention with keys x + enc(q), set by set; `keep` (B, H, n) is the dropout mask."""
    outs, sums = [], []
    dim = features.shape[1]
    for b, (first, n) in enumerate(zip(sets.offsets.tolist(), sets.lengths.tolist(), strict=False)):
        norms = quality[first : first + n]
        rows = norms[:, None] * features[first : first + n]
        angle = norms[:, None] * (2 * torch.pi * 10000 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)).to(
            norms
        )
        wave = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
        share = torch.softmax(queries[b] @ (rows + F.layer_norm(wave, (dim,), weight)).T, -1)
        if keep is not None:
            share = share * keep[b, :, :n] / (1 - dropout)
        outs.append(share @ rows)
        sums.append(share.sum(-1))
    return torch.stack(outs), torch.stack(sums)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block_rows", [4, 64])
def test_outputs_and_gradients_match_a_plain_softmax(monkeypatch, block_rows, dropout):
    tensors, sets = _inputs([5, 1, 9, 30, 5])
    monkeypatch.setattr(attention_blocks, "BLOCK_BYTES", block_rows * 16 * 8)
    tensors = tuple(t.requires_grad_() for t in tensors)
    seed, keep = torch.tensor(2**61 + 7), None
    if dropout:
        p = Inputs(*tensors, *sets, seed, dropout, 1e-5)
        keep = attention_blocks.keep_mask(p, torch.arange(5), torch.arange(30))
    expected = _plain(*tensors, sets, keep, dropout)
    got = set_attention(*tensors, sets, dropout=dropout, seed=seed)
    arriving = [torch.randn_like(t) for t in expected]
    for ours, theirs in zip(
        (*got, *torch.autograd.grad(got, tensors, arriving)),
        (*expected, *torch.autograd.grad(expected, tensors, arriving)),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max().clamp(min=1)


def test_gradcheck():
    tensors, sets = _inputs([3, 4], dim=6, queries=2)
    tensors = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(lambda *t: set_attention(*t, sets, dropout=0.2, seed=torch.tensor(3)), tensors)


def test_padded_sets_are_as_packed_ones():
    (queries, features, quality, weight), packed = _inputs([5, 2, 0, 7])
    inside = torch.arange(7) < packed.lengths[:, None]
    rows, norms = features.new_full((4, 7, 16), torch.nan), quality.new_ones(4, 7)
    rows[inside], norms[inside] = features, quality
    padded = RowSets.padded(4, 7, packed.lengths, rows.device)
    inputs = [rows.flatten(0, 1).requires_grad_(), features.requires_grad_()]
    out, weight_sum = set_attention(queries, inputs[0], norms.flatten(), weight, padded)
    expected, _ = set_attention(queries, inputs[1], quality, weight, packed)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    assert weight_sum[:, 0].tolist() == pytest.approx([1, 1, 0, 1])
    assert out[2].abs().max() == 0
    out.square().sum().backward()
    expected.square().sum().backward()
    grad = inputs[0].grad.view(4, 7, 16)
    assert torch.allclose(grad[inside], inputs[1].grad, rtol=0, atol=1e-12)
    assert grad[~inside].abs().max() == 0


def test_rows_that_cannot_be_picked_take_no_part():
    (queries, features, quality, weight), sets = _inputs([8])
    good = torch.tensor([0, 2, 5, 7])
    expected, _ = set_attention(queries, features[good], quality[good], weight, RowSets.padded(1, 4, None, good.device))
    features[1, 3], features[3] = torch.inf, 0
    quality[4], quality[6] = torch.nan, 0
    features.requires_grad_(), quality.requires_grad_()
    out, _ = set_attention(queries, features, quality, weight, sets)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    out.sum().backward()
    bad = torch.tensor([1, 3, 4, 6])
    assert features.grad[bad].abs().max() == 0
    assert quality.grad[bad].abs().max() == 0
    assert features.grad.isfinite().all()


def test_float32_loses_no_more_than_eager():
    tensors, sets = _inputs([300], dim=128, queries=24)
    single = tuple(t.float() for t in tensors)
    exact, eager = _plain(*tensors, sets)[0], _plain(*single, sets)[0]
    ours = set_attention(*single, sets)[0]
    # twice eager's loss, plus one rounding of the largest value
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + exact.abs().max() * 2**-24


def test_dropout_keeps_its_share_and_does_not_depend_on_the_batch():
    tensors, sets = _inputs([400, 300], queries=6)
    p = Inputs(*tensors, *sets, torch.tensor(5), 0.25, 1e-5)
    keep = attention_blocks.keep_mask(p, torch.arange(2), torch.arange(400))
    # 4,800 draws: four standard deviations
    assert keep.float().mean().item() == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / keep.numel()) ** 0.5)
    again = attention_blocks.keep_mask(p, torch.tensor([1]), torch.arange(100, 200))
    assert torch.equal(again[0], keep[1, :, 100:200])


@pytest.mark.parametrize("seed", [None, 9])
def test_opcheck(seed):
    tensors, sets = _inputs([5, 3], dtype=torch.float32)
    tensors = tuple(t.requires_grad_() for t in tensors)
    seed = None if seed is None else torch.tensor(seed)
    torch.library.opcheck(
        torch.ops.fcn_kernels.set_attention.default,
        Inputs(*tensors, *sets, seed, 0.1 if seed is not None else 0.0, 1e-5),
    )


def test_compiles_whole_and_repeats_its_bits():
    tensors, sets = _inputs([40, 17], dtype=torch.float32)
    compiled = torch.compile(lambda *t: set_attention(*t, sets)[0].square(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), set_attention(*tensors, sets)[0].square())


def test_sums_stay_float32_under_autocast():
    tensors, sets = _inputs([40], dtype=torch.float32)
    expected = set_attention(*tensors, sets)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(set_attention(*tensors, sets)[0], expected)


def test_second_derivative_and_bad_arguments_raise():
    tensors, sets = _inputs([4])
    tensors = tuple(t.requires_grad_() for t in tensors)
    grad = torch.autograd.grad(set_attention(*tensors, sets)[0].square().sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\), got 1"):
        set_attention(*tensors, sets, dropout=1.0)
    odd = tuple(t[..., :15] if t.ndim > 1 else t for t in tensors)
    with pytest.raises(ValueError, match="even number of columns"):
        set_attention(*odd[:3], tensors[3][:15], sets)


def test_flops_are_two_thin_products_forward_and_five_backward():
    tensors, sets = _inputs([30, 20], queries=6)
    tensors = tuple(t.requires_grad_() for t in tensors)
    with FlopCounterMode(display=False) as forward:
        out, _ = set_attention(*tensors, sets)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    product = 2 * 50 * 16 * 6
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * product, 5 * product)


def test_nothing_of_the_features_size_is_kept_for_backward():
    tensors, sets = _inputs([500])
    tensors = tuple(t.requires_grad_() for t in tensors)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        set_attention(*tensors, sets)
    given = {t.data_ptr() for t in tensors}
    assert max(t.numel() for t in kept if t.data_ptr() not in given) == tensors[0].numel()


def test_sinusoid_and_its_derivative():
    norms = torch.rand(7, dtype=torch.float64) * 30
    table = Waves.of(12, torch.float64, norms.device)
    norms.requires_grad_()
    wave = sinusoid(norms, table)
    pair = torch.arange(6, dtype=torch.float64)
    angle = 2 * torch.pi * norms[:, None] / 10000 ** (2 * pair / 12)
    assert torch.allclose(wave[:, 0::2], angle.sin(), rtol=0, atol=1e-12)
    assert torch.allclose(wave[:, 1::2], angle.cos(), rtol=0, atol=1e-12)
    grad = torch.randn_like(wave)
    expected = torch.autograd.grad((angle.sin() * grad[:, 0::2] + angle.cos() * grad[:, 1::2]).sum(), norms)[0]
    assert torch.allclose(sinusoid_backward(grad, wave.detach(), table), expected, rtol=0, atol=1e-11)
