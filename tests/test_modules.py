"""The head against the plain reference: outputs, gradients, layouts, training; and the selection as a module."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fcn_kernels import CoresetAggregator, CoresetSelect, coreset_select
from reference.head import ReferenceHead


def _rows(sets, rows, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(sets, rows, dim, generator=generator, dtype=dtype), dim=-1)
    return features, torch.rand(sets, rows, generator=generator, dtype=dtype) * 20 + 5


def _gumbel(*shape, dtype=torch.float64, seed=1):
    return -torch.empty(shape, dtype=dtype).exponential_(generator=torch.Generator().manual_seed(seed)).log()


def _heads(dim, k, num_heads, dtype=torch.float64):
    """The reference and ours with the same parameters, none of them at a value that would hide its gradient."""
    torch.manual_seed(0)
    reference = ReferenceHead(dim, k, num_heads, dropout=0.0).to(dtype)
    for name, parameter in reference.named_parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    ours = CoresetAggregator(dim, k, num_heads, dropout=0.0).to(dtype)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def _results(head, features, quality, noise):
    """Outputs and the gradients of the inputs and of every parameter, by name."""
    inputs = {"features": features.clone().requires_grad_(), "quality": quality.clone().requires_grad_()}
    descriptor, norm = head(*inputs.values(), noise=noise)[:2]
    weights = torch.linspace(-1, 1, descriptor.numel(), dtype=descriptor.dtype).view_as(descriptor)
    inputs |= dict(head.named_parameters())
    loss = (descriptor * weights).sum() + norm.square().sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return {"descriptor": descriptor, "norm": norm} | dict(zip(inputs, grads, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("sets", "rows", "dim", "k", "num_heads"), [(2, 7, 64, 3, 8), (1, 40, 32, 5, 4), (3, 2, 32, 3, 4), (3, 1, 16, 3, 2)]
)
def test_parity_with_the_reference(training, sets, rows, dim, k, num_heads):
    heads = _heads(dim, k, num_heads)
    features, quality = _rows(sets, rows, dim)
    noise = _gumbel(k, sets, rows) if training else None
    expected, got = (_results(head.train(training), features, quality, noise) for head in heads)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1)
        assert (got[name] - value).abs().max() <= 1e-9 * scale, name


def test_float32_descriptors_match_the_projected_form():
    reference, ours = _heads(512, 3, 8, torch.float32)
    features, quality = _rows(2, 300, 512, torch.float32)
    with torch.no_grad():
        expected, got = (head.eval()(features, quality)[0] for head in (reference, ours))
    assert (expected - got).abs().max() <= 1e-5


def test_same_picks_and_descriptors_with_and_without_gradients():
    head = CoresetAggregator(64).eval()
    features, quality = _rows(3, 50, 64, torch.float32)
    graded = head(features, quality)
    with torch.no_grad():
        plain = head(features, quality)
    assert torch.equal(graded.coreset.indices, plain.coreset.indices)
    assert (graded.coreset.features - plain.coreset.features).abs().max() <= 1e-5
    assert (graded.descriptor - plain.descriptor).abs().max() <= 1e-5


def test_order_of_the_set_does_not_matter():
    head = CoresetAggregator(128).eval()
    features, quality = _rows(4, 60, 128, torch.float32)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        straight, shuffled = head(features, quality), head(features[:, order], quality[:, order])
    assert (straight.descriptor - shuffled.descriptor).abs().max() <= 1e-5
    assert torch.equal(straight.coreset.indices, order[shuffled.coreset.indices])


@pytest.mark.parametrize("training", [True, False])
def test_padding_packing_and_splitting_change_nothing(training):
    head = CoresetAggregator(64, dropout=0.0).train(training)
    lengths = torch.tensor([9, 1, 0, 30, 2])
    features, quality = _rows(5, 30, 64, torch.float32)
    noise = _gumbel(3, 5, 30, dtype=torch.float32)
    inside = torch.arange(30) < lengths[:, None]
    features[~inside] = torch.nan  # padding must not be looked at
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    padded = head(features, quality, noise=noise, lengths=lengths)
    packed = head(features[inside], quality[inside], noise=noise[:, inside], cu_seqlens=cu_seqlens)
    alone = [
        head(features[b : b + 1, :n], quality[b : b + 1, :n], noise=noise[:, b : b + 1, :n]).descriptor
        for b, n in enumerate(lengths.tolist())
    ]
    assert padded.coreset.counts.tolist() == [3, 1, 0, 3, 2]
    assert (padded.descriptor - packed.descriptor).abs().max() <= 1e-5
    assert (padded.descriptor - torch.cat(alone)).abs().max() <= 1e-5
    assert padded.descriptor[2].abs().max() == 0
    assert padded.norm[2] == 0
    assert torch.allclose(padded.descriptor.norm(dim=-1), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))


def test_gradients_do_not_depend_on_padding():
    head = CoresetAggregator(32, num_heads=4, dropout=0.0).double()
    features, quality = _rows(2, 8, 32)
    lengths, noise = torch.tensor([8, 5]), _gumbel(3, 2, 8)
    inside = torch.arange(8) < lengths[:, None]
    padded, packed = features.clone().requires_grad_(), features[inside].requires_grad_()
    head(padded, quality, noise=noise, lengths=lengths).descriptor.sum().backward()
    by_padding = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    cu_seqlens = torch.tensor([0, 8, 13], dtype=torch.int32)
    head(packed, quality[inside], noise=noise[:, inside], cu_seqlens=cu_seqlens).descriptor.sum().backward()
    assert padded.grad[~inside].abs().max() == 0
    assert torch.allclose(padded.grad[inside], packed.grad, rtol=0, atol=1e-12)
    for name, parameter in head.named_parameters():
        assert torch.allclose(by_padding[name], parameter.grad, rtol=0, atol=1e-10), name


def test_bad_rows_are_as_if_they_were_not_there():
    head = CoresetAggregator(32, num_heads=4).eval()
    features, quality = _rows(1, 10, 32, torch.float32)
    with torch.no_grad():
        expected = head(features[:, :6], quality[:, :6])
        features[0, 6, 3], features[0, 7] = torch.nan, 0
        quality[0, 8], quality[0, 9] = torch.inf, -1
        got = head(features, quality)
    assert (expected.descriptor - got.descriptor).abs().max() <= 1e-6


def test_training_agrees_with_the_reference():
    """Forty steps over the same batches and noise, from the same start.

    In float64, where rounding is too small to change a pick; a step's rounding of 1e-14 may grow a million times.
    """
    reference, ours = _heads(32, 3, 4)
    target = F.normalize(torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), dim=-1)
    losses = {}
    for head in (reference, ours):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
        head.train()
        history = []
        for step in range(40):
            features, quality = _rows(6, 12, 32, seed=step % 4)
            features = F.normalize(features + target[:, None], dim=-1)
            descriptor = head(features, quality, noise=_gumbel(3, 6, 12, seed=step % 4))[0]
            loss = (1 - (descriptor * target).sum(-1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses[head] = history
    assert sum(losses[ours][-4:]) < 0.8 * sum(losses[ours][:4])
    assert losses[ours] == pytest.approx(losses[reference], abs=1e-8)
    for (name, expected), got in zip(reference.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-8), name


def test_sampling_and_dropout_follow_the_mode_and_the_seed():
    head = CoresetAggregator(32, num_heads=4)
    features, quality = _rows(4, 20, 32, torch.float32)
    quality = quality / 20

    def run(seed):
        torch.manual_seed(seed)
        return head(features, quality).descriptor

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    head.eval()
    assert torch.equal(run(0), run(1))


def test_half_precision_and_autocast():
    head = CoresetAggregator(64).eval()
    features, quality = _rows(2, 30, 64, torch.float32)
    expected = head(features, quality).descriptor
    rounded = head(features.bfloat16(), quality).descriptor
    assert rounded.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast = head(features, quality).descriptor
    half = copy.deepcopy(head).bfloat16()(features.bfloat16(), quality.bfloat16()).descriptor
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: unit vectors rounded a few times on the way stay within a few parts in a hundred
    for got in (rounded, cast, half):
        assert F.cosine_similarity(expected, got.float()).min() > 0.999


def test_select_module_is_the_function():
    features, quality = _rows(2, 12, 16, torch.float32)
    module = CoresetSelect(3, 0.25, distance_scale=0.5)
    torch.manual_seed(0)
    sampled = module(features, quality)
    torch.manual_seed(0)
    assert torch.equal(
        sampled.indices,
        coreset_select(features, 3, quality, 0.25, sample=True, distance_scale=0.5).indices,
    )
    sampled.features.square().sum().backward()
    assert module.gamma.grad is not None
    expected = coreset_select(features, 3, quality, 0.25, distance_scale=0.5, lengths=torch.tensor([12, 2]))
    got = module.eval()(features, quality, lengths=torch.tensor([12, 2]))
    assert torch.equal(got.indices, expected.indices)
    assert list(module.state_dict()) == ["gamma"]
    assert "k=3" in repr(module)


def test_bad_input_is_named():
    head = CoresetAggregator(32, num_heads=4)
    features, quality = _rows(2, 6, 32, torch.float32)
    with pytest.raises(ValueError, match=r"\(B, N, 32\).*\(2, 6, 16\)"):
        head(features[..., :16], quality)
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 5\)"):
        head(features, quality[:, :5])
    with pytest.raises(ValueError, match=r"\(T, 32\) with cu_seqlens"):
        head(features, quality, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="even and divisible by num_heads = 8, got 36"):
        CoresetAggregator(36)
