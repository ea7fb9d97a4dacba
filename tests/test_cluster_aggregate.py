"""The head of Cluster and Aggregate: the authors' numbers, bits, layouts, bad rows, gradients, modes, errors."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from caface import Golden
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fcn_kernels import ClusterAggregate, ClusterState, ClusterStream, StyleInput
from fcn_kernels.clustering import torch_backend
from fcn_kernels.heads import cluster_aggregate
from fcn_kernels.heads.cluster_state import STYLE_BITS, SUM_BITS
from fcn_kernels.heads.style import StyleFeatures
from fcn_kernels.integrations.caface import convert_state_dict
from reference.cluster_aggregate import ReferenceClusterAggregate

F64 = torch.float64
CASES = ["n3", "n20", "n33_c64_m4_d3_conf1", "n5_m1_d2"]
SMALL = {"dim": 24, "clusters": 3, "style_dim": 8, "norm_dim": 8, "num_heads": 4, "style_channels": 6}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_head(**options):
    """With weights that matter, in eval()."""
    torch.manual_seed(0)
    head = ClusterAggregate(**(SMALL | options)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(
                torch.randn_like(parameter) / (parameter.numel() / max(1, *parameter.shape[:1], 1)) ** 0.5 / 2
            )
    head.norm_code.norm.running_mean.fill_(5)
    head.norm_code.norm.running_var.fill_(1.5)
    return head


def rows(*shape, seed=0, dtype=torch.float32):
    """Features of norms about 5, and styles."""
    return draw(*shape, 24, seed=seed, dtype=dtype), draw(*shape, 8, seed=seed + 1, dtype=dtype)


def run(call, *args, **options):
    with torch.no_grad():
        return call(*args, **options)


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a, b):
    return same(vars(a).values(), vars(b).values())


def golden_head(golden, exact):
    """Of a case; exact: without the grid, as in train(), with the statistics and blocks of eval()."""
    head = ClusterAggregate(**golden.options, drop_path=0.0).double()
    head.load_state_dict(convert_state_dict(golden.model.state_dict()))
    head.train(exact)
    head.style.eval()
    head.norm_code.eval()
    return head


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_are_the_authors(name, exact):
    golden = Golden(name)
    head, given = golden_head(golden, exact), golden.given
    for way in ("single", *(f"seq{i}" for i in range(len(golden.chunkings)))):
        sizes = [len(golden.features)] if way == "single" else golden.chunkings[int(way[3:])]
        state = None
        for x, styles in zip(golden.features.split(sizes), golden.styles.split(sizes), strict=True):
            state = run(head.update, x, styles, None, state)
        fused = run(head.finish, state)
        # chunks are rounded to half a step of the grid, and divided by masses of which some are small
        mass = given[f"{way}/mass"].min()
        step = 2.0**-1 * len(sizes) / mass
        tolerance = [1e-12 + (0 if exact else 4 * step * 2.0**-bits) for bits in (SUM_BITS, STYLE_BITS)]
        for found, expected, allowed in (
            (state.masses[0], "mass", tolerance[0]),
            (fused.means[0], "mu", tolerance[0]),
            (state.styles[0] / state.masses[0, :, None], "cluster_style", tolerance[1]),
            (fused.descriptor[0] * fused.norm, "aggregated", tolerance[1]),
        ):
            torch.testing.assert_close(found, given[f"{way}/{expected}"], rtol=0, atol=float(allowed))
    fused = run(head, golden.features, golden.styles, chunk=None, weights=True)
    confidence, share = given["single/confidence_weight"], given["single/attn"] / given["single/mass"][:, None]
    expected = (share * confidence.mean(-1, keepdim=True)).sum(0)
    for found, value in (  # of one shot, no digit is lost in eval() either
        (fused.descriptor * fused.norm, given["single/aggregated"]),
        (fused.means, given["single/mu"]),
        (fused.confidence, confidence),
        (fused.weights, expected),
    ):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-12)


def test_float64_sets_of_one_chunk_are_not_rounded_whatever_stands_beside_them():
    head = make_head().double()
    x, styles = rows(1, 40, dtype=F64)
    both = run(head, x.expand(2, -1, -1), styles.expand(2, -1, -1), lengths=torch.tensor([9, 40]), chunk=16)
    alone, one_shot = run(head, x[:, :9], styles[:, :9], chunk=16), run(head, x[0, :9], styles[0, :9], chunk=None)
    assert torch.equal(both.means[0], alone.means[0])
    assert torch.equal(alone.means[0], one_shot.means)
    rounded = run(head.finish, run(head.update, x[:, :9], styles[:, :9])).means[0]
    assert 0 < (one_shot.means - rounded).abs().max() < 1e-6
    cut = run(head.finish, run(head.update, x, styles, chunk=16))
    assert torch.equal(both.descriptor[1], cut.descriptor[0])


@pytest.mark.parametrize("name", ["n20", "n33_c64_m4_d3_conf1"])
@pytest.mark.parametrize("way", ["single", "seq"])
def test_gradients_are_the_authors(name, way):
    golden = Golden(name)
    head, given = golden_head(golden, True), golden.given
    features, styles = golden.features.requires_grad_(), golden.styles.requires_grad_()
    chunk = max(golden.chunkings[0]) if way == "seq" else None  # chunking 0 is how we cut, too
    fused = head(features, styles, chunk=chunk)
    (fused.descriptor * fused.norm * golden.loss_weight).sum().backward()
    for found, expected, allowed in (
        (features.grad, "features", 1e-12),
        (styles.grad[0], "styles_row0", 1e-12),
        (torch.stack([styles.grad.flatten(1).sum(-1), styles.grad.abs().sum((1, 2))]), "styles_rows", 1e-11),
        (golden.sums(golden.gradients_of(head)), "params", 1e-8),
    ):
        if f"grad_{way}/{expected}" in given:
            torch.testing.assert_close(found, given[f"grad_{way}/{expected}"], rtol=0, atol=allowed)


@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_it_is_the_reference_also_with_quality_and_without_styles(depth, channelwise):
    for style_dim in (8, 0):
        options = SMALL | {"depth": depth, "channelwise": channelwise, "style_dim": style_dim}
        head = make_head(**options).double()
        plain = ReferenceClusterAggregate(**options).double().eval()
        plain.load_state_dict(head.state_dict())
        x, styles = rows(11, dtype=F64)
        styles = styles if style_dim else None
        for sizes, chunk in (([11], None), ([4, 4, 3], 4)):
            expected = run(plain, x, styles, sizes).aggregate
            fused = run(head, x, styles, chunk=chunk)
            assert (fused.descriptor * fused.norm - expected).abs().max() <= 1e-6  # the grid
        r = x.norm(dim=-1)
        unit = run(head, x / r[:, None], styles, r[:, None])
        assert (unit.descriptor - run(head, x, styles).descriptor).abs().max() <= 1e-8


def test_orders_and_merges_give_the_same_bits():
    head = make_head()
    x, styles = rows(2, 60)
    states = [run(head.update, x[:, i : i + n], styles[:, i : i + n]) for i, n in ((0, 9), (9, 1), (10, 30), (40, 20))]
    expected = states[0] + states[1] + states[2] + states[3]
    for a, b, c, d in itertools.permutations(states):
        for merged in (a + b + c + d, (a + b) + (c + d), a + (b + (c + d))):
            assert same_state(merged, expected)
    carried = None
    for i, n in ((10, 30), (40, 20), (0, 9), (9, 1)):
        carried = run(head.update, x[:, i : i + n], styles[:, i : i + n], None, carried)
    assert same_state(carried, expected)
    even = [run(head.update, x[:, i : i + 12], styles[:, i : i + 12]) for i in range(0, 60, 12)]
    assert same_state(run(head.update, x, styles, chunk=12), even[3] + even[0] + even[4] + even[2] + even[1])
    assert same(run(head, x, styles, chunk=12), run(head.finish, run(head.update, x, styles, chunk=12)))


@pytest.mark.parametrize("chunk", [None, 5, 16])
@pytest.mark.parametrize("raw", [False, True])
def test_layouts_and_batches_give_the_same_bits(chunk, raw):
    lengths = torch.tensor([20, 1, 0, 37, 5, 16])
    head, (x, styles) = make_head(), rows(6, 37)
    if raw:
        styles = draw(6, 37, 6, 2, seed=3)
    inside = torch.arange(37) < lengths[:, None]
    x[~inside] = torch.nan
    scattered = torch.zeros(6, 74, dtype=torch.bool)  # rows of a set anywhere among others
    scattered[:, ::2] = inside
    wide, wide_styles = (t.repeat_interleave(2, 1) for t in (x, styles))
    options = {"chunk": chunk, "weights": True}
    padded = run(head, x, styles, lengths=lengths, **options)
    masked = run(head, x, styles, mask=inside, **options)
    spread = run(head, wide, wide_styles, mask=scattered.int(), **options)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = run(head, x[inside], styles[inside], cu_seqlens=offsets, **options)
    assert same(padded, masked)
    assert same(padded[:5], packed[:5])
    assert same(padded[:5], spread[:5])
    assert torch.equal(padded.weights[inside], packed.weights)
    assert torch.equal(padded.weights, spread.weights[:, ::2])
    assert padded.counts.tolist() == lengths.tolist()
    torch.testing.assert_close(padded.weights.sum(-1), (lengths > 0).float(), rtol=0, atol=1e-5)
    for b, n in enumerate(lengths):
        alone = run(head, x[b, :n], styles[b, :n], **options)
        assert same(alone[:5], [t[b] for t in padded[:5]]), b
        assert torch.equal(alone.weights, padded.weights[b, :n])


def test_threads_do_not_change_a_set_of_a_batch():
    """Of 24 channels, which no vector of 16 fits."""
    head, state = make_head(), run(make_head().update, *rows(6, 9))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([run(head.finish, state), *(run(head.finish, state[b]) for b in range(6))])
    finally:
        torch.set_num_threads(threads)
    for whole, *each in found:
        assert same(whole[:5], found[0][0][:5])
        assert all(same([t[b] for t in whole[:5]], [t[0] for t in one[:5]]) for b, one in enumerate(each))


def test_pieces_differ_by_one_row_at_most_longer_first():
    head, (x, styles) = make_head(), rows(23)
    pieces = zip(x.split([6, 6, 6, 5]), styles.split([6, 6, 6, 5]), strict=True)
    expected = [run(head.update, *piece) for piece in pieces]
    assert same_state(run(head.update, x, styles, chunk=7), expected[0] + expected[1] + expected[2] + expected[3])


def test_streams_depend_on_the_rows_not_on_the_portions():
    head, (x, styles) = make_head(), rows(43)
    x[7], styles[30, 2] = torch.nan, torch.inf
    good = torch.ones(43, dtype=torch.bool).index_fill_(0, torch.tensor([7, 30]), False)
    quality = draw(43, seed=9).abs() + 4
    streams = []
    for portions in ([43], [1] * 43, [0, 3, 20, 8, 12]):
        stream = ClusterStream(head, chunk=8)
        for each in zip(*(t.split(portions) for t in (x, styles, quality)), strict=True):
            stream.push(*each)
            stream.fused()  # leaves the tail open
        streams.append(stream)
    first = streams[0].fused()
    assert first.descriptor.shape == (24,)
    assert streams[0].pending == 1
    assert first.counts == 41
    for other in streams[1:]:
        assert same(first, other.fused())
    x, styles, quality = x[good], styles[good], quality[good]
    whole = run(head.update, x[:40], styles[:40], quality[:40], chunk=8)
    assert same_state(streams[0].state(), run(head.update, x[40:], styles[40:], quality[40:], whole))
    with pytest.raises(ValueError, match="expected quality of shape"):
        streams[0].push(x, styles)
    with pytest.raises(ValueError, match="got none yet"):
        ClusterStream(head).fused()
    with pytest.raises(ValueError, match="features of shape"):
        streams[0].push(x[None], styles[None], quality[None])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_bad_rows_are_as_if_they_were_not_there(chunk, raw):
    head, (x, styles) = make_head(), rows(3, 9)
    if raw:
        styles = draw(3, 9, 6, 2, seed=3)
    bad_x, bad_styles = x.clone(), styles.clone()
    bad_x[0, 3, 1], bad_x[2], bad_styles[1, 0].flatten()[2] = torch.nan, torch.inf, -torch.inf
    bad_styles[1, 8] = torch.nan
    good = torch.ones(3, 9, dtype=torch.bool)
    good[0, 3] = good[1, 0] = good[1, 8] = False
    good[2] = False
    found = []
    for given, options in (((bad_x, bad_styles), {}), ((x, styles), {"mask": good})):
        leaves = [t.clone().requires_grad_() for t in given]
        head.zero_grad()
        fused = head(*leaves, chunk=chunk, weights=True, **options)
        (fused.descriptor.cumsum(-1).sum() + fused.norm.sum()).backward()
        found.append([*fused, *(t.grad for t in leaves), *(p.grad for p in head.parameters() if p.grad is not None)])
    assert same(*found)
    assert found[0][4].tolist() == [8, 7, 0]
    assert found[0][0][2].abs().max() == 0
    assert all(t.isfinite().all() for t in found[0])
    with pytest.raises(ValueError, match="row 3 of set 0 cannot take part"):
        head(bad_x, bad_styles, strict=True)


def test_empty_sets_chunks_and_batches():
    head = make_head()
    for x, styles in (rows(2, 0), rows(0, 7), rows(0)):
        for chunk in (None, 4):
            fused = run(head, x, styles, chunk=chunk, weights=True)
            assert fused.descriptor.shape == (*x.shape[:-2], 24)
            assert fused.weights.shape == x.shape[:-1]
            assert (fused.descriptor == 0).all()
            assert (fused.norm == 0).all()
    x, styles = rows(1, 6)
    state = run(head.update, x, styles)
    assert same_state(run(head.update, *rows(1, 0), None, state), state)
    packed = run(head, *rows(0), cu_seqlens=torch.tensor([0, 0, 0]), chunk=4)
    assert packed.counts.tolist() == [0, 0]


@pytest.mark.parametrize("clusters", [1, 3, 4])
def test_gradcheck(clusters):
    head = make_head(clusters=clusters, drop_path=0.0, dim=5, depth=1).double()
    head.train()
    head.norm_code.eval()
    x, z = draw(2, 4, 5, dtype=F64).requires_grad_(), draw(2, 4, 6, 2, seed=1, dtype=F64).requires_grad_()
    parameters = list(head.parameters())

    def fused(x, z, *_):
        head.style.norm.reset_running_stats()
        return head(x, z, chunk=1)[:2]  # no center has a mass above 1, through which there is no gradient

    assert torch.autograd.gradcheck(fused, (x, z, *parameters), fast_mode=True)


def test_one_chunk_gives_masses_no_gradient_of_their_own():
    """sum over m of w_m is the number of rows, and means of one chunk are independent of w' and of the code."""
    head = make_head().double().train()
    head.requires_grad_(False)
    x, styles = rows(1, 9, dtype=F64)
    quality = x.norm(dim=-1).requires_grad_()
    state = head.update(x / quality.detach()[..., None], styles, quality)
    state.masses.sum().backward()
    assert quality.grad.abs().max() <= 1e-14


def test_frozen_rows_get_no_gradient_computed(monkeypatch):
    head, wanted = make_head(), []
    backward = torch_backend.chunks_backward
    monkeypatch.setattr(torch_backend, "chunks_backward", lambda *a: wanted.append(a[-1]) or backward(*a))
    head(*rows(2, 5)).norm.sum().backward()
    assert wanted == [False]
    assert head.centers.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_loses_no_more_than_the_reference_does_in_float32(dtype):
    head, (x, styles) = make_head(depth=2, dim=24), rows(300)
    plain = ReferenceClusterAggregate(**SMALL).eval()
    plain.load_state_dict(head.state_dict())
    exact = copy.deepcopy(plain).double()
    head = head.to(dtype)
    if dtype != torch.float32:  # rows and weights are what they are in half precision, and the rest is float32
        x, styles = x.to(dtype), styles.to(dtype)
        for module in (plain, exact):
            module.load_state_dict(head.state_dict())
            module.norm_code.load_state_dict(exact.norm_code.state_dict() | {"scale": head.norm_code.scale.float()})
        assert head.norm_code.norm.running_mean.dtype == head.norm_code.table.dtype == torch.float32
    expected = run(exact, x.double(), styles.double()).aggregate
    eager = run(plain, x.float(), styles.float()).aggregate
    fused = run(head, x, styles)
    assert fused.descriptor.dtype == dtype
    aggregate = (fused.confidence * fused.means).sum(0)
    assert aggregate.dtype == torch.float32
    # means are on a grid of 2^-30
    assert (aggregate - expected).abs().max() <= 2 * (eager - expected).abs().max() + 2.0**-24
    with torch.autocast("cpu", torch.bfloat16):
        assert same(run(head, x, styles), fused)


def test_train_takes_the_statistics_of_the_rows_that_take_part():
    head = make_head(drop_path=0.0).double()
    plain = ReferenceClusterAggregate(**SMALL).double()
    plain.load_state_dict(head.state_dict())
    head.train()
    x, z = 4 * draw(2, 7, 24, dtype=F64), draw(2, 7, 6, 2, seed=2, dtype=F64)
    lengths = torch.tensor([7, 4])
    x[0, 2] = torch.nan
    taking = (torch.arange(7) < lengths[:, None]) & x.isfinite().all(-1)
    styles = plain.style(z[taking])
    plain.norm_code(x[taking].norm(dim=-1))  # both norms have seen the rows that take part
    state = head.update(x, z, lengths=lengths)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(head.get_buffer(name), value, rtol=0, atol=1e-12)
    close = head.style(z, taking)[taking]
    torch.testing.assert_close(close, styles, rtol=0, atol=1e-12)
    assert state.sums.requires_grad
    assert make_head().train().update(*rows(1, 5)).sums.dtype == torch.float32
    with pytest.raises(ValueError, match="more than one row in train"):
        head(x[:, :1], z[:, :1], lengths=torch.tensor([1, 0]))
    before = copy.deepcopy(head.state_dict())
    head(x[:, :0], z[:, :0])
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_stochastic_depth_drops_blocks_of_chunks():
    head = make_head(drop_path=0.5, depth=3).train()
    head.norm_code.eval()
    x, styles = (t.expand(2000, -1, -1) for t in rows(1, 3))
    residual = head._residual(3, 2000, torch.float32)
    assert residual.shape == (3, 2, 2000)
    assert (residual[0] == 1).all()
    for block, rate in ((1, 0.25), (2, 0.5)):
        values = residual[block].unique()
        assert values.tolist() == pytest.approx([0, 1 / (1 - rate)])
        assert (residual[block] == 0).float().mean(-1).tolist() == pytest.approx([rate, rate], abs=0.05)
    torch.manual_seed(0)
    drawn = run(head.update, x, styles)
    assert len(drawn.sums.flatten(1).unique(dim=0)) == 16  # kept or dropped: two of each of two blocks
    torch.manual_seed(0)
    assert same_state(run(head.update, x, styles), drawn)
    head.eval()
    assert len(run(head.update, x, styles).sums.flatten(1).unique(dim=0)) == 1


def test_states_are_moved_picked_saved_and_checked():
    head, (x, styles) = make_head(), rows(4, 9)
    state = run(head.update, x, styles)
    assert {t.dtype for t in vars(state).values()} == {F64, torch.int64}
    assert not state.sums.requires_grad
    assert len(state) == 4
    for sets in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, False, True])):
        assert same_state(state[sets], run(head.update, x[sets], styles[sets]))
    assert same_state(state[-1], state[3:])
    for number in (np.int64(2), np.array([0, 4, 1]).argmax(), torch.tensor(2)):
        assert same_state(state[number], state[int(number) : int(number) + 1])
    for number in (4, np.int64(-5), torch.tensor(4)):
        with pytest.raises(IndexError):
            state[number]
    assert state.to("meta").sums.device.type == "meta"
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert same_state(torch.load(file, weights_only=True), state)
    assert same_state(ClusterState(**vars(state)), state)
    for error, message, change in (
        (ValueError, r"sums of shape \(4, 3, C\)", {"sums": state.sums[:2]}),
        (ValueError, r"counts of shape \(4,\)", {"counts": state.counts[:1]}),
        (TypeError, "of float64", {"styles": state.styles.float()}),
        (TypeError, "counts of int64", {"counts": state.counts.int()}),
        (TypeError, "masses to be a Tensor", {"masses": None}),
    ):
        with pytest.raises(error, match=message):
            ClusterState(**(vars(state) | change))
    with pytest.raises(ValueError, match="same shapes, dtypes"):
        state + state[:2]
    with pytest.raises(ValueError, match=r"M, C, d = \(3, 24, 16\), got \(4, 24, 16\)"):
        head.finish(make_head(clusters=4).eval().update(x, styles))
    training = make_head().train().update(x, styles)
    with pytest.raises(ValueError, match="without a graph"):
        head.update(x, styles, None, training)
    with pytest.raises(ValueError, match=r"state of 4 sets in torch.float64, as eval\(\) makes it .*torch.float32"):
        head.update(x, styles, None, training.detach())
    with pytest.raises(TypeError, match="to be a ClusterState"):
        head.finish(tuple(vars(state).values()))


def test_a_state_that_does_not_fit_changes_nothing():
    head, (x, styles) = make_head().train(), rows(4, 9)
    theirs = make_head().eval().update(x, styles).detach()
    before = copy.deepcopy(head.state_dict())
    for message, state in (
        (r"state of 4 sets in torch.float32, as train\(\) makes it of these rows, got 4 sets in torch.float64", theirs),
        ("state of 4 sets in .*, got 2 sets", ClusterState(**{n: t[:2] for n, t in vars(theirs).items()})),
    ):
        with pytest.raises(ValueError, match=message):
            head.update(x, styles, None, state)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_bad_calls_say_what_was_expected():
    head, (x, styles) = make_head(), rows(2, 5)
    for error, message, call in (
        (ValueError, "features of 24 columns, got 23", lambda: head(x[..., :23], styles)),
        (ValueError, r"styles of shape \(2, 5, 8\)", lambda: head(x, styles[:, :4])),
        (ValueError, r"styles of shape \(2, 5, 6, 2\)", lambda: head(x, styles[..., None])),
        (TypeError, r"styles of shape \(2, 5, 8\), got NoneType", lambda: head(x)),
        (ValueError, r"styles of shape \(2, 5, 8\)", lambda: make_head(style_channels=0)(x, draw(2, 5, 6, 2))),
        (ValueError, r"quality of shape \(2, 5\)", lambda: head(x, styles, x[..., 0, None].mT)),
        (ValueError, "at most one of", lambda: head(x, styles, lengths=torch.tensor([1, 2]), mask=x[..., 0] > 0)),
        (ValueError, "chunk to be an integer of at least 1, got 0", lambda: head(x, styles, chunk=0)),
        (TypeError, "float64 head for float64 features", lambda: head(x.double(), styles)),
        (TypeError, "weights to be a bool", lambda: head(x, styles, weights=1)),
        (ValueError, "no styles, for a head of style_dim = 0", lambda: make_head(style_dim=0)(x, styles)),
        (ValueError, "norm_dim even", lambda: ClusterAggregate(norm_dim=7)),
        (ValueError, "num_heads to divide style_dim", lambda: ClusterAggregate(num_heads=3)),
        (ValueError, "depth to be an integer of at least 0, got -1", lambda: ClusterAggregate(depth=-1)),
        (ValueError, r"drop_path in \[0, 1\)", lambda: ClusterAggregate(drop_path=1.0)),
        (TypeError, "depth to be an integer", lambda: ClusterAggregate(depth=2.0)),
        (TypeError, "channelwise to be a bool", lambda: ClusterAggregate(channelwise=1)),
        (ValueError, r"statistics of shape \(..., 6, 2\)", lambda: head.style(x)),
        (ValueError, "portion would have its own", lambda: ClusterStream(make_head().train()).push(x[0], styles[0])),
    ):
        with pytest.raises(error, match=message):
            call()


def test_compile_and_export_take_it_whole():
    head, (x, styles) = make_head(depth=1, drop_path=0.0), rows(3, 11)
    sets, n = torch.export.Dim("sets", min=2, max=100), torch.export.Dim("n", min=2, max=100)
    shapes = {"features": {0: sets, 1: n}, "styles": {0: sets, 1: n}, "chunk": None}
    exported = torch.export.export(head, (x, styles), {"chunk": 4}, dynamic_shapes=shapes).module()
    other = rows(5, 17, seed=7)
    for ours, theirs in zip(run(exported, *other, chunk=4)[:5], run(head, *other, chunk=4), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # whose sums without a graph are in C++
    found, lengths = [], torch.tensor([11, 0, 6])
    for call in (torch.compile(head, fullgraph=True, backend="aot_eager"), head):
        head.train().zero_grad()
        descriptor = call(x, styles, lengths=lengths, chunk=4).descriptor
        descriptor.cumsum(-1).sum().backward()
        found.append([descriptor, *(p.grad.clone() for p in head.parameters() if p.grad is not None)])
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-6 for a, b in zip(*found, strict=True))


def test_little_is_kept_for_the_backward_pass():
    """Of 4,000 rows at the published sizes at most 8 MB beside the inputs, also where styles are made."""
    head = ClusterAggregate()
    x, z = draw(1, 4000, 512), draw(1, 4000, 384, 2)
    inputs, kept = {x.untyped_storage().data_ptr(), z.untyped_storage().data_ptr()}, {}
    inputs |= {p.untyped_storage().data_ptr() for p in head.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused = head(x, z, chunk=None)
    assert 4e6 < sum(kept.values()) <= 8e6
    assert fused.descriptor.requires_grad


def test_flops_are_the_formula():
    head, (n, m, d, c) = make_head(), (13, 3, 16, 24)
    with FlopCounterMode(display=False) as counter:
        run(head.update, *rows(1, n))
    chunk = 2 * (12 * d * d + 2 * (n + m) * d) * (n + m) + n * m * (2 * d + c)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.fcn_kernels.cluster_chunks] == 2 * chunk


def test_style_input_is_the_plain_one_and_folds_its_normalization():
    torch.manual_seed(0)
    style = StyleInput(6, 8).double()
    z = draw(3, 5, 6, 2, dtype=F64).requires_grad_()
    plain = nn.Sequential(nn.PReLU(), nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    plain[0].load_state_dict(style.prelu.state_dict())
    plain[1].load_state_dict(style.linear.state_dict())
    for training in (True, True, False):
        style.train(training)
        plain.train(training)
        found, expected = style(z), plain((z * style.mix).sum(-1).flatten(0, 1)).view(3, 5, 8)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad((t * draw(3, 5, 8, dtype=F64)).sum(), (z, style.mix)) for t in (found, expected)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(style.norm.running_var, plain[2].running_var, rtol=0, atol=1e-12)
    assert style.norm.num_batches_tracked == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(style(z), found)


def test_style_features_come_from_a_backbone():
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 24),
    ).eval()
    images, head = torch.rand(4, 3, 16, 16), make_head(style_channels=24)
    with StyleFeatures(backbone, ["0", "1.0"]) as style:
        features = run(backbone, images)
    shallow, deep = run(backbone[0], images), run(backbone[1][0], run(backbone[0], images))
    expected = [torch.stack([m.mean((2, 3)), m.std((2, 3), unbiased=True)], -1) for m in (shallow, deep)]
    torch.testing.assert_close(style.features, torch.cat(expected, 1))
    assert not backbone[0]._forward_hooks
    assert run(head, features, style.features).descriptor.shape == (24,)
    with pytest.raises(ValueError, match="names of at least one submodule"):
        StyleFeatures(backbone, ["7"])
    with pytest.raises(ValueError, match=r"nothing from \['0'\]"):
        print(StyleFeatures(backbone, ["0"]).features)
    with StyleFeatures(backbone, ["3"]), pytest.raises(ValueError, match="expected a map"):
        backbone(images)


def test_the_head_is_the_same_on_triton(monkeypatch):
    """Chunks of two rows, some left over, one row bad; the kernels themselves are tested in test_clustering_kernels."""
    pytest.importorskip("triton")
    head, (x, styles) = make_head(depth=1), rows(2, 5)
    x[0, 1] = torch.nan
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(cluster_aggregate, "resolve_backend", lambda *_, name=backend: name)
        head.zero_grad()
        fused = head(x, styles, lengths=torch.tensor([5, 2]), chunk=2, weights=True)
        fused.descriptor.cumsum(-1).sum().backward()
        found.append([*fused, *(p.grad.clone() for p in head.parameters() if p.grad is not None)])
    for torches, tritons in zip(*found, strict=True):
        assert (torches - tritons).abs().max() <= 2e-5 * torches.abs().max().clamp(min=1)
