"""Faults of clustering, alignment and their heads that were found by attack, each as a test that failed before."""

import copy
import math

import numpy as np
import pytest
import torch
from test_cluster_aggregate import make_head, rows, run, same_state
from test_clustering import chunks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fcn_kernels import ClusterAggregate, ClusterStream, ContextNet, DiscrepancyAlignment, cluster_sums
from fcn_kernels.clustering import op
from fcn_kernels.evaluation.identification import search
from fcn_kernels.heads.adaface import AdaFace
from fcn_kernels.heads.style import StyleFeatures
from fcn_kernels.training.cluster import cluster_losses
from fcn_kernels.training.draw import Recipe, draw, group

WRONG = {  # offsets or lengths that lead out of 11 rows, and what is left of them
    "long": ({"lengths": [4, 1, 0, 600]}, {}),
    "negative": ({"lengths": [-4, 1, 0, 6]}, {"lengths": [0, 1, 0, 6]}),
    "far": ({"offsets": [-5, 4, 5, 5, 2**40]}, {}),
    "falling": ({"offsets": [0, 4, 2**40, 5, 11]}, {"lengths": [4, 1, 0, 0], "offsets": [0, 4, 11, 11, 11]}),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_chunks_stay_inside_the_tensors_whatever_offsets_and_lengths_say(backend, name):
    given, meant = ({n: torch.tensor(v) for n, v in values.items()} for values in WRONG[name])

    def results(**replaced):
        p = chunks(dtype=torch.float32)._replace(**replaced)
        p = p._replace(features=p.features.clone().requires_grad_(), styles=p.styles.clone().requires_grad_())
        out = op.cluster_chunks(p, backend)
        loss = out.sums.square().sum() + out.key_sums.cumsum(-1).sum()
        return *out[:5], *torch.autograd.grad(loss, (p.features, p.styles))

    if name == "falling":  # where sets overlap, only that nothing is read beyond the rows is promised
        assert results(**given)[4].sum() <= 2 * 11
        return
    assert all(torch.equal(a, b) for a, b in zip(results(**given), results(**meant), strict=True))


def test_compiled_calls_stay_inside_the_tensors_whatever_lengths_say():
    head, (x, styles) = make_head(style_channels=0), rows(2, 5)
    wrong, meant = torch.tensor([5, 10**6]), torch.tensor([5, 5])

    def fused(lengths, **options):
        return head(x, styles, lengths=lengths, **options).means

    def sums(lengths):
        return cluster_sums(x, head.centers[:, :1].expand(-1, 24), lengths=lengths).sums

    for call in (fused, lambda lengths: fused(lengths, chunk=2), sums):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, wrong), run(call, meant))
    for wrong in ([0, 3, 10**6], [-7, 3, 10]):
        packed = torch.compile(
            lambda offsets: head(x[0], styles[0], cu_seqlens=offsets, chunk=2), fullgraph=True, backend="aot_eager"
        )
        assert run(packed, torch.tensor(wrong)).counts.tolist() == [3, 2]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_first_batch_of_norms_that_are_not_finite_starts_no_statistics(norm):
    head, points = AdaFace(2, 2), F.normalize(torch.randn(2, 2))
    head(points, torch.tensor([norm, 12.0]), torch.tensor([0, 1]))
    assert head.norm_statistics.isnan().all()
    head(points, torch.tensor([8.0, 12.0]), torch.tensor([0, 1]))
    assert head.norm_statistics.tolist() == pytest.approx([10, 8**0.5])
    head.norm_statistics.fill_(math.inf)  # as a checkpoint may have them
    head(points, torch.tensor([8.0, 12.0]), torch.tensor([0, 1]))
    assert head.norm_statistics.tolist() == pytest.approx([10, 8**0.5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_of_a_half_precision_default_keep_statistics_in_float32(dtype):
    torch.set_default_dtype(dtype)
    try:
        head, classifier = ClusterAggregate(24, style_channels=6), AdaFace(4, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.centers.dtype == classifier.weight.dtype == dtype
    torch.testing.assert_close((head.centers @ head.centers.mT).float(), torch.eye(4), rtol=0, atol=0.02)
    buffers = [t for t in (*head.buffers(), classifier.norm_statistics) if t.is_floating_point()]
    assert {t.dtype for t in buffers} == {torch.float32}
    norms = 1000 * (1 + torch.arange(20) / 1000)  # too near one another for bfloat16
    head(norms[:, None] * torch.eye(24)[:20], torch.rand(20, 6, 2))
    torch.testing.assert_close(head.norm_code.norm.running_mean, 0.1 * norms.mean(0, keepdim=True))


def test_strict_and_chunks_know_of_rows_that_overflow_where_they_are_taken():
    head, (x, styles) = make_head(), rows(1, 6)
    wide = styles.double()
    wide[0, 2, 3] = 1e300
    statistics = torch.rand(1, 6, 6, 2)
    large = statistics.clone()
    large[0, 2] = 1e38
    huge = copy.deepcopy(head)
    with torch.no_grad():
        huge.style.linear.weight.fill_(1e3)
    quality = torch.full((1, 6), 5.0, dtype=torch.float64)
    far = quality.clone()
    far[0, 2] = 1e300
    keep = [0, 1, 3, 4, 5]
    for model, given, good in (
        (head, (wide, None), (styles, None)),
        (huge, (large, None), (statistics, None)),
        (head, (styles, far), (styles, quality)),
    ):
        with pytest.raises(ValueError, match="row 2 of set 0 cannot take part"):
            model(x, *given, strict=True)
        left = [None if t is None else t[:, keep].to(x.dtype) for t in good]
        assert same_state(run(model.update, x, *given, chunk=2), run(model.update, x[:, keep], *left, chunk=2))
        if model is head:
            streams = [ClusterStream(head, 2) for _ in range(2)]
            streams[0].push(x[0], *(None if t is None else t[0] for t in given))
            streams[1].push(x[0, keep], *(None if t is None else t[0] for t in left))
            assert same_state(streams[0].state(), streams[1].state())


def test_the_head_with_its_style_input_under_transforms_and_tracers():
    head, x, statistics = make_head(), rows(3, 2, 5)[0], torch.rand(3, 2, 5, 6, 2)

    def loss(x, statistics):
        return head(x, statistics, chunk=2, weights=True).descriptor.cumsum(-1).sum()

    inputs = [t[0].clone().requires_grad_() for t in (x, statistics)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.func.grad(loss, (0, 1))(x[0], statistics[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    each = torch.func.vmap(lambda *given: head(*given, chunk=2).descriptor)(x, statistics)
    torch.testing.assert_close(each, torch.stack([head(x[b], statistics[b], chunk=2).descriptor for b in range(3)]))
    traced = make_fx(loss)(x[0], statistics[0])
    torch.testing.assert_close(traced(x[1], statistics[1]), loss(x[1], statistics[1]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x[0], statistics[0])]
        assert head(*fake, chunk=2, weights=True).weights.shape == (2, 5)
        assert head.train()(*fake, chunk=2).descriptor.shape == (2, 24)


def test_aligned_scores_under_vmap():
    x = rows(3, 4)[0]
    align = DiscrepancyAlignment(rows(30, seed=5)[0], k=3)
    torch.testing.assert_close(torch.func.vmap(align)(x, x.flip(1)), torch.stack([align(t, t.flip(0)) for t in x]))


def test_the_default_device_is_not_where_rows_are():
    bank, x = rows(60)[0], rows(8, seed=3)[0]
    features, centers = rows(3, 2, 4)[0], rows(3, seed=7)[0]
    head, align = make_head(style_dim=0, drop_path=0.0).train(), DiscrepancyAlignment(bank, k=3)

    def found():
        torch.manual_seed(0)
        losses = cluster_losses(copy.deepcopy(head), features, None, centers)
        return *losses, align.distil(bank, steps=2)(x, x)

    wanted = found()
    with torch.device("meta"):
        got = found()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_network_is_fitted_in_inference_mode():
    with torch.inference_mode():
        bank, x = rows(60)[0], rows(8, seed=3)[0]
        align = DiscrepancyAlignment(bank, k=3)
        assert align.distil(bank, steps=2)(x, x).isfinite().all()
    net = ContextNet(24)
    with torch.inference_mode():
        net.fit(bank, align.context(bank), steps=2)
    net(x).mean.sum().backward()
    assert net.layers[0].weight.grad.abs().max() > 0


def test_a_layer_that_a_run_passes_by_gives_nothing():
    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 2, 3), torch.nn.Conv2d(3, 2, 3)

        def forward(self, images, both):
            return self.first(images) + (self.second(images) if both else 0)

    backbone, images = Backbone(), torch.rand(2, 3, 8, 8)
    with StyleFeatures(backbone, ["first", "second"]) as style:
        backbone(images, True)
        assert style.features.shape == (2, 4, 2)
        backbone(images, False)
        with pytest.raises(ValueError, match=r"nothing from \['second'\]"):
            print(style.features)


def test_scores_that_are_not_finite_have_no_rank():
    gallery = torch.eye(3)
    probes = gallery.clone()
    probes[1] = torch.nan
    with pytest.raises(ValueError, match="expected finite scores, got 3 that are not"):
        search(gallery, np.arange(3), probes, np.arange(3))


def test_keys_without_columns_are_refused():
    with pytest.raises(ValueError, match=r"keys with at least one column, got shape \(2, 5, 0\)"):
        cluster_sums(torch.randn(2, 5, 3), torch.randn(4, 0), keys=torch.randn(2, 5, 0))


@pytest.mark.parametrize("name", ["blocks.0.qkv", "confidence.fc2"])
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_a_parameter_that_does_not_lie_row_by_row_is_seen_to_change(name, layout):
    head, (x, styles) = make_head().requires_grad_(False), rows(2, 5)
    layer = head.get_submodule(name)
    weight = layer.weight.T.contiguous().T if layout == "transposed" else torch.stack([layer.weight] * 2, -1)[..., 0]
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    head(x, styles)
    layer.weight.data.mul_(3)  # which PyTorch counts no change of
    assert torch.equal(head(x, styles).descriptor, copy.deepcopy(head)(x, styles).descriptor)


def test_an_identity_without_rows_is_not_drawn_from_the_next():
    people = group(torch.eye(4), torch.ones(4), torch.tensor([0, 0, 2, 2]), 3)
    assert draw(people, torch.tensor([0, 2]), Recipe()).labels.tolist() == [0, 2]
    with pytest.raises(ValueError, match="got none of identity 1"):
        draw(people, torch.tensor([0, 1]), Recipe())


def test_one_probe_alone_ties_with_another_subject_of_the_same_template():
    torch.manual_seed(0)
    ranks = []
    for count, columns in ((501, 64), (33, 64), (1003, 512)):
        half = count // 2
        gallery = F.normalize(torch.randn(count, columns), dim=1)
        gallery[half : 2 * half] = gallery[:half]
        for own in range(0, half, 50):
            ranks += search(gallery, np.arange(count), gallery[own : own + 1], np.array([own])).ranks.tolist()
    assert set(ranks) == {2}


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize("size", [1e13, 1e18, 1e30, 1e36])
def test_gradients_of_long_rows_keep_their_part_along_the_rows(size, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    p = chunks((3, 2), depth=1)._replace(quality=None)

    def gradient(p, size, backend):
        x = (p.features.abs() * size).requires_grad_()
        out = op.cluster_chunks(p._replace(features=x), backend)
        return torch.autograd.grad(out.sums.cumsum(-1).sum(), x)[0]

    single = type(p)(*(t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in p))
    exact = gradient(p._replace(edges=single.edges.double()), size, "torch")
    assert (gradient(single, size, backend) - exact).abs().max() <= 2e-6 * exact.abs().max()
