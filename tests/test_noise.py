"""The noise: Philox's published answers, the same values on every backend, and Gumbel's moments."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fcn_kernels import coreset_select
from fcn_kernels.device.noise import gumbel_noise as device_noise
from fcn_kernels.noise import gumbel, gumbel_noise, philox
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Problem

# Known answers of Philox4x32-10 that its authors publish with Random123: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, output):
    row, block, sets, stream = counter
    words = philox(key[0] | key[1] << 32, torch.tensor([row]), block, torch.tensor([sets]), stream)
    assert words.flatten().tolist() == list(output)


def test_gumbel_has_the_moments_of_gumbel():
    rows = 400_000
    values = gumbel_noise(7, torch.tensor([3]), rows, 1).double()
    assert values.isfinite().all()
    # five standard errors of the mean (variance pi^2 / 6) and of the variance (kurtosis 5.4)
    count = values.numel()
    variance = math.pi**2 / 6
    assert abs(values.mean() - 0.5772156649) < 5 * math.sqrt(variance / count)
    assert abs(values.var() - variance) < 5 * variance * math.sqrt(4.4 / count)


def test_gumbel_is_finite_at_the_ends_of_the_words():
    ends = gumbel(torch.tensor([0, 1, 2**32 - 1]))
    assert ends.isfinite().all()
    # -log(-log(1 - v)) in float64 at v = 2^-33, 3 * 2^-33 and the largest float32 below 1
    expected = [-math.log(-math.log1p(-v)) for v in (2.0**-33, 3 * 2.0**-33, 1 - 2.0**-24)]
    torch.testing.assert_close(ends, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@triton.jit
def _draw(out_ptr, seed: "i64", step, set_id, BLOCK: tl.constexpr):  # noqa: F821
    rows = tl.arange(0, BLOCK)
    tl.store(out_ptr + rows, device_noise(seed, rows, step, set_id))


def test_device_noise_is_the_same(device):
    for seed, step, set_id in ((2**62 + 12345, 0, 0), (5, 7, 2), (99, 2, 20_000)):
        out = torch.full((256,), torch.nan, device=device)
        _draw[(1,)](out, seed, step, set_id, BLOCK=256)
        expected = gumbel_noise(seed, torch.tensor([set_id]), 256, step // 4)[step % 4, 0]
        # the words are equal; the logarithms are each library's own, good to a few ulp
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(bool(cpp.unavailable(torch.float32)), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cpp_noise_is_that_of_float64(dtype):
    """Of rows that are all alike, a step's softmax is that of its noise alone."""
    sets, rows, steps, seed = 2, 1003, 6, 2**62 + 12345
    row = torch.ones(sets, rows, 3, dtype=dtype)
    quality = torch.ones(sets * rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    problem = Problem(row, quality, seed=torch.tensor(seed), k=steps)
    softmax = cpp.forward(problem, keep=True).saved.softmax.double().view(steps, sets, rows)
    words = torch.cat([philox(seed, torch.arange(rows), block, torch.arange(sets)) for block in (0, 1)])[:steps]
    minus_v = words.float().add(0.5).mul(-(2.0**-32)).clamp(min=2.0**-24 - 1).double()
    noise = -(-minus_v.log1p()).log()
    found, expected = (t - t.amax(-1, keepdim=True) for t in (softmax.log(), noise))
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


def _sets(batch: int = 3, rows: int = 30):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, rows, 8, generator=generator), torch.rand(batch, rows, generator=generator) + 0.5


def _pick(features, quality, seed=5, **options):
    generator = torch.Generator().manual_seed(seed)
    return coreset_select(features, 5, quality, 0.5, sample=True, generator=generator, **options).indices


def test_manual_seed_repeats_and_seeds_differ():
    features, quality = _sets()
    torch.manual_seed(3)
    first = coreset_select(features, 5, quality, sample=True).indices
    other = coreset_select(features, 5, quality, sample=True).indices
    torch.manual_seed(3)
    assert torch.equal(coreset_select(features, 5, quality, sample=True).indices, first)
    assert not torch.equal(first, other)
    assert torch.equal(_pick(features, quality, 8), _pick(features, quality, 8))


def test_picks_do_not_depend_on_the_rest_of_the_batch_or_on_padding():
    features, quality = _sets()
    whole = _pick(features, quality)
    assert torch.equal(_pick(features[:1], quality[:1]), whole[:1])
    assert torch.equal(_pick(features[:2], quality[:2]), whole[:2])
    lengths = torch.tensor([30, 11, 1])
    padded = _pick(features, quality, lengths=lengths)
    assert torch.equal(padded[0], whole[0])
    inside = torch.arange(30) < lengths[:, None]
    offsets = torch.tensor([0, 30, 41, 42], dtype=torch.int32)
    assert torch.equal(_pick(features[inside], quality[inside], cu_seqlens=offsets), padded)


def test_sampled_picks_follow_the_softmax():
    torch.manual_seed(0)
    draws = 4000
    quality = torch.tensor([0.5, 1.0, 2.0, 0.1])
    features = torch.randn(4, 3)
    first = coreset_select(features.expand(draws, 4, 3), 1, quality.expand(draws, 4), sample=True).indices[:, 0]
    expected = torch.softmax(quality, 0) * draws
    counted = torch.bincount(first, minlength=4)
    chi_squared = float(((counted - expected) ** 2 / expected).sum())
    assert chi_squared < 21.1  # the 1e-4 quantile from above with 3 degrees of freedom
