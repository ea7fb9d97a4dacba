"""The head and its attention where things are missing, poisoned or at the ends of a dtype."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fcn_kernels import CoresetAggregator, coreset_select
from fcn_kernels.attention import op as attention_op
from fcn_kernels.attention import torch_backend
from fcn_kernels.attention.inputs import Arriving, Inputs
from fcn_kernels.attention.kernels import launch
from fcn_kernels.attention.op import set_attention
from fcn_kernels.heads import facecoresetnet
from fcn_kernels.heads.adaface import AdaFace
from fcn_kernels.sets import RowSets
from reference.head import ReferenceHead

DIM, K = 16, 3
POISON = (torch.nan, torch.inf, -torch.inf)


def _rows(*shape, seed=0, dtype=torch.float32, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)
    return features.to(dtype), torch.rand(*shape, generator=generator) * 20 + 5


def _gumbel(*shape, seed=1):
    return -torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed)).log()


def _head(**options):
    torch.manual_seed(0)
    head = CoresetAggregator(DIM, K, num_heads=4, **options)
    for name, parameter in head.named_parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return head


def _results(head, features, quality, *, norm_weight=1.0, **options):
    """Descriptor, norm, picks; gradients of features and quality; those of every parameter."""
    head.zero_grad()
    features, quality = features.clone().requires_grad_(), quality.clone().requires_grad_()
    torch.manual_seed(7)
    output = head(features, quality, **options)
    (output.descriptor.float().cumsum(-1).sum() + norm_weight * output.norm.sum()).backward()
    outputs = [output.descriptor, output.norm, output.coreset.features, output.coreset.indices]
    parameters = [parameter.grad for parameter in head.parameters()]
    assert all(grad is not None for grad in parameters)
    return [t.detach() for t in outputs], [features.grad, quality.grad], parameters


def _same(first, second):
    for some, others in zip(first, second, strict=True):
        for one, other in zip(some, others, strict=True):
            assert torch.equal(one, other)


# A row left out


BAD = {
    "quality nan": (None, torch.nan),
    "quality inf": (None, torch.inf),
    "quality 0": (None, 0.0),
    "quality below 0": (None, -3.0),
    "features nan": (torch.nan, None),
    "features inf": (torch.inf, None),
    "features 0": (0.0, None),
    "both": (torch.nan, torch.inf),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_has_a_zero_gradient_and_changes_no_other_bit(bad, training):
    features, quality = _rows(3, 9)
    noise = _gumbel(K, 3, 9) if training else None
    head = _head().train(training)
    masked = torch.ones(3, 9, dtype=torch.bool)
    masked[1, 4] = False
    expected = _results(head, features, quality, noise=noise, mask=masked)
    row, norm = BAD[bad]
    if row is not None:
        features[1, 4] = row
    if norm is not None:
        quality[1, 4] = norm
    got = _results(head, features, quality, noise=noise)
    assert got[1][0][1, 4].abs().max() == 0
    assert got[1][1][1, 4] == 0
    _same(got, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_bad_row_reaches_no_backbone(training):
    """As the head is used: one network gives the features and their norms."""
    backbone = torch.nn.Linear(5, DIM)
    images = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    embeddings = backbone(images)
    embeddings = embeddings + torch.zeros(2, 6, 1).index_fill(1, torch.tensor([3]), torch.nan)
    norms = embeddings.norm(dim=-1)
    output = _head().train(training)(embeddings / norms[..., None], norms)
    grads = torch.autograd.grad(output.descriptor.cumsum(-1).sum(), embeddings)[0]
    # the division by a norm of NaN is the caller's; what reaches it is 0
    assert grads[:, [0, 1, 2, 4, 5]].isfinite().all()


BACKENDS = {"cpp": torch_backend, "torch": torch_backend, "triton": launch}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """What the head's selection and attention run on."""
    monkeypatch.setattr(facecoresetnet, "coreset_select", partial(coreset_select, backend=request.param))
    monkeypatch.setattr(attention_op, "_backend", lambda features: BACKENDS[request.param])
    return request.param


@pytest.mark.parametrize(
    ("backend", "training"),
    # the interpreter's time is for the harder of the two: with noise, and through every gradient
    [("cpp", True), ("cpp", False), ("torch", True), ("torch", False), ("triton", True)],
    indirect=["backend"],
)
@pytest.mark.parametrize("layout", ["lengths", "mask", "packed"])
def test_nothing_is_read_where_nothing_may_be_read(layout, training, backend):
    """Padding, masked rows and rows of no quality, full of NaN or infinities."""
    features, quality = _rows(4, 7)
    lengths = torch.tensor([7, 0, 3, 5])
    noise = _gumbel(K, 4, 7) if training else None
    outside = torch.arange(7) >= lengths[:, None]
    head = _head().train(training)
    if layout == "packed":  # packed sets have no padding: a row of no quality stands in its place
        options = {"cu_seqlens": torch.tensor([0, 7, 14, 21, 28])}
        quality = quality.masked_fill(outside, 0)
    else:
        options = {"lengths": lengths} if layout == "lengths" else {"mask": ~outside}

    def run(features, quality, noise):
        if layout == "packed":
            features, quality = features.flatten(0, 1), quality.flatten()
            noise = None if noise is None else noise.flatten(1)
        return _results(head, features, quality, noise=noise, **options)

    expected = run(features, quality, noise)
    generator = torch.Generator().manual_seed(0)
    poison = [torch.tensor(POISON)[torch.randint(3, t.shape, generator=generator)] for t in (features, quality)]
    got = run(
        features.where(~outside[..., None], poison[0]),
        quality.where(~outside, poison[1]),
        None if noise is None else noise.masked_fill(outside, -torch.inf),  # NaN and inf are refused
    )
    _same(got, expected)
    assert all(grad.view(4, 7, -1)[outside].count_nonzero() == 0 for grad in got[1])


@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 6), sets=st.integers(1, 3), training=st.booleans())
def test_any_unusable_rows_are_as_if_they_were_masked(seed, rows, sets, training):
    generator = torch.Generator().manual_seed(seed)
    features, quality = _rows(sets, rows, seed=seed)
    noise = _gumbel(K, sets, rows, seed=seed) if training else None
    mask = torch.rand(sets, rows, generator=generator) < 0.6
    head = _head().train(training)
    expected = _results(head, features, quality, noise=noise, mask=mask)
    values = torch.tensor([*POISON, 0.0])
    for b, n in (~mask).nonzero().tolist():
        value = values[torch.randint(4, (), generator=generator)]
        if torch.rand((), generator=generator) < 0.5:
            quality[b, n] = value
        elif value == 0:
            features[b, n] = 0
        else:
            features[b, n, torch.randint(DIM, (), generator=generator)] = value
    got = _results(head, features, quality, noise=noise)
    _same(got, expected)
    assert all(grad[~mask].count_nonzero() == 0 for grad in got[1])


STRIDED = {
    "transposed sets": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "strided columns": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", STRIDED)
def test_memory_may_be_laid_out_in_any_way(layout, dtype):
    features, quality = _rows(3, 8, dtype=dtype)
    head = _head(dropout=0.0)
    noise, spread = _gumbel(K, 3, 8), STRIDED[layout]
    expected = head(features, quality, noise=noise)
    rows, norms = spread(features).requires_grad_(), spread(quality[..., None])[..., 0].requires_grad_()
    got = head(rows, norms, noise=noise)
    assert torch.equal(got.coreset.indices, expected.coreset.indices)
    assert (got.descriptor - expected.descriptor).abs().max() <= 1e-6
    grads = torch.autograd.grad(got.descriptor.cumsum(-1).sum(), (rows, norms))
    assert all(grad.isfinite().all() for grad in grads)


# Attention: the same rows on both backends


def test_selection_and_attention_take_the_same_rows():
    """Rows of one norm, from one end of float32 to the other, and the unusable among them."""
    expected = torch.tensor([True, True, False, False, True, False, True, True, True])
    for size in (1e-36, 1e-25, 1.0, 1e25, 1e30):
        features, quality = _rows(1, 9)
        features = features * size
        features[0, 2], features[0, 3, 1], quality[0, 5] = 0, torch.nan, torch.inf
        indices = coreset_select(features, 9, quality, distinct=True).indices[0]
        assert sorted(indices[indices >= 0].tolist()) == expected.nonzero()[:, 0].tolist(), size
        sets, big = RowSets.padded(1, 9, None, features.device), max(1.0, size)
        queries = torch.randn(1, 2, DIM, generator=torch.Generator().manual_seed(0)) / big
        p = Inputs(queries, features[0], quality[0], torch.ones(DIM), *sets, None, 0.0, 1e-5)
        for backend in (torch_backend, launch):
            _, weight_sum, _, rows, norms, _ = _attention(
                backend, p, (torch.ones_like(queries) / big, torch.ones(1, 2))
            )
            assert weight_sum.tolist() == [pytest.approx([1, 1])]
            assert torch.equal(rows.abs().amax(1) > 0, expected), size
            assert torch.equal(norms != 0, expected), size


@st.composite
def _calls(draw):
    """A call of set attention, packed or padded, of which some rows are unusable, and its float64 twin."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    lengths = draw(st.lists(st.integers(0, 9), max_size=3))
    dim, queries = draw(st.sampled_from((6, 16, 34))), draw(st.integers(1, 5))
    padded = draw(st.booleans())
    owned = [9 if padded else n for n in lengths]
    rows = sum(owned)
    features = F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)
    scale = draw(st.sampled_from((1.0, 1.0, 1e-25, 1e25)))
    features, quality = features * scale, torch.rand(rows, generator=generator) * 5 + 1
    for at in range(rows):
        kind = int(torch.randint(12, (), generator=generator))
        if kind < 3:
            features[at, at % dim] = POISON[kind]
        elif kind < 6:
            quality[at] = POISON[kind - 3]
        elif kind == 6:
            features[at] = 0
        elif kind == 7:
            quality[at] = -float(at % 2)
    sets = (
        RowSets.padded(len(lengths), 9, torch.tensor(lengths, dtype=torch.int64), features.device)
        if padded
        else RowSets.packed(torch.tensor([0, *lengths]).cumsum(0), features.device)
    )
    dropout = draw(st.sampled_from((0.0, 0.3)))
    queries = torch.randn(len(lengths), queries, dim, generator=generator) / max(1, scale)
    encoding_weight = torch.randn(dim, generator=generator)
    seed = torch.tensor(11) if dropout else None
    return Inputs(queries, features, quality, encoding_weight, *sets, seed, dropout, 1e-5), scale


def _attention(backend, p, arriving):
    out, weight_sum, lse = backend.forward(p)
    grad_out, grad_sum = (t.to(p.queries.dtype) for t in arriving)
    delta = (grad_out * out).sum(-1) + grad_sum * weight_sum
    return out, weight_sum, *backend.backward(p, Arriving(lse, grad_out, grad_sum, delta))


@settings(max_examples=10)
@given(call=_calls())
def test_both_backends_attend_to_the_usable_rows_alone(call):
    p, scale = call
    big = max(1.0, scale)
    generator = torch.Generator().manual_seed(1)
    arriving = [torch.randn(shape, generator=generator) for shape in (p.queries.shape, p.queries.shape[:2])]
    arriving[0] /= big
    places = torch.arange(len(p.features))
    taken = torch.zeros(len(p.features), dtype=torch.bool)
    for first, n in zip(p.offsets.tolist(), p.lengths.tolist(), strict=False):
        taken |= (places >= first) & (places < first + n)
    taken &= p.features.isfinite().all(1) & (p.features != 0).any(1) & (p.quality > 0) & p.quality.isfinite()
    clean = p._replace(features=p.features.where(taken[:, None], 1.0), quality=p.quality.where(taken, 0.0))
    exact = _attention(torch_backend, Inputs(*(t.double() for t in clean[:4]), *clean[4:]), arriving)
    sizes = {"out": scale, "sum": 1, "queries": big, "features": 1 / big, "quality": 1, "encoding_weight": 1}
    for backend in (torch_backend, launch):
        got = _attention(backend, p, arriving)
        for (name, size), truth, value in zip(sizes.items(), exact, got, strict=True):
            assert value.isfinite().all(), name
            if truth.numel():
                error = (value - truth).abs().max()
                assert error <= 1e-4 * max(truth.abs().max(), size), (backend.__name__, name)
        assert got[3][~taken].count_nonzero() == 0
        assert got[4][~taken].count_nonzero() == 0
        for one, other in zip(got, _attention(backend, clean, arriving), strict=True):
            assert torch.equal(one, other), backend.__name__


@pytest.mark.parametrize("backend", [torch_backend, launch])
def test_norms_of_any_size_give_finite_results(backend):
    features, _ = _rows(12)
    for size in (1e-25, 70000.0, 1e9, 1e25):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            quality = torch.full((12,), size) * torch.linspace(1, 2, 12)
            queries = torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(0)) / max(1, size)
            sets = RowSets.padded(2, 6, None, features.device)
            p = Inputs(queries, features.to(dtype), quality, torch.ones(DIM), *sets, None, 0.0, 1e-5)
            arriving = torch.ones(2, 4, DIM) / max(1, size), torch.ones(2, 4)
            exact = torch_backend.forward(Inputs(*(t.double() for t in p[:4]), *p[4:]))
            got = _attention(backend, p, arriving)
            assert all(value.isfinite().all() for value in got), (size, dtype)
            if size in (1e-25, 70000.0):  # beyond, float32 angles of the encoding are noise
                assert (got[0] - exact.out).abs().max() <= 0.02 * exact.out.abs().max(), (size, dtype)


def test_forward_mode_raises_instead_of_giving_zeros():
    features, quality = _rows(6)
    sets = RowSets.padded(2, 3, None, features.device)

    def attend(features):
        return set_attention(torch.ones(2, 2, DIM), features, quality, torch.ones(DIM), sets)[0].sum()

    for derivative in (torch.func.jvp, lambda f, x, t: torch.func.jacfwd(f)(*x)):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            derivative(attend, (features,), (torch.ones_like(features),))
    rows = features.clone().requires_grad_()
    expected = torch.autograd.grad(attend(rows), rows)[0]
    assert torch.equal(torch.func.grad(attend)(features), expected)
    assert torch.allclose(torch.func.jacrev(attend)(features), expected)


PRODUCTS = """
import importlib
from benchmarks.checks import builds
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# each kernel once, for the head's 24 queries, of large sets and of small ones, and for the most that are planned for
BUILT = ("bfloat16", "H=24 dropout 0.1", "forward"), ("bfloat16", "H=64 dropout 0.1", "backward")
seen = set()
for spec in builds.attention_specs("sm_90"):
    if (spec.label[:8], spec.label[-16:], spec.kernel[10:]) not in BUILT:
        continue
    order = list(spec.signature)
    source = ASTSource(
        fn=getattr(importlib.import_module(spec.module), spec.kernel),
        signature=spec.signature,
        constexprs={(order.index(name),): value for name, value in spec.constants.items()},
    )
    text = compile(source, target=GPUTarget(*builds.TARGETS["sm_90"]), options=spec.options).asm["ptx"]
    assert "mma.sync" in text, spec
    assert "wgmma" not in text, spec
    seen.add((spec.label, spec.kernel))
assert len(seen) == 3, seen
"""


def test_no_product_is_of_the_kind_that_ptxas_may_break():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", PRODUCTS], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Nothing there


EMPTY = {
    "last sets empty": ((3,), {"cu_seqlens": [0, 3, 3, 3]}),
    "first sets empty": ((3,), {"cu_seqlens": [0, 0, 0, 3]}),
    "all sets empty": ((0,), {"cu_seqlens": [0, 0, 0]}),
    "no packed sets": ((0,), {"cu_seqlens": [0]}),
    "no sets": ((0, 5), {}),
    "no rows": ((2, 0), {}),
    "neither": ((0, 0), {}),
    "lengths 0": ((2, 5), {"lengths": [0, 0]}),
    "some lengths 0": ((2, 5), {"lengths": [0, 4]}),
    "no sets, lengths": ((0, 5), {"lengths": []}),
    "one set, no rows": ((0,), {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EMPTY)
def test_empty_sets_and_batches_train(case, training):
    shape, options = EMPTY[case]
    options = {name: torch.tensor(value, dtype=torch.int64) for name, value in options.items()}
    features, quality = _rows(*shape)
    head = _head().train(training)
    (descriptor, norm, *_), grads, parameters = _results(head, features, quality, **options)
    sets = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else shape[0]
    assert descriptor.shape == ((DIM,) if case == "one set, no rows" else (sets, DIM))
    assert norm.shape == descriptor.shape[:-1]
    assert all(grad.isfinite().all() for grad in (*grads, *parameters))
    full = norm > 0
    assert torch.allclose(descriptor[full].norm(dim=-1), torch.ones(int(full.sum())))
    assert descriptor[~full].count_nonzero() == 0
    lengths = options["cu_seqlens"].diff() if "cu_seqlens" in options else options.get("lengths")
    if lengths is not None:
        assert torch.equal(full, lengths > 0)
    if not full.any():
        assert all(grad.count_nonzero() == 0 for grad in parameters)
    with torch.no_grad():
        head.eval()(features, quality, **options)


def test_a_margin_head_takes_an_empty_batch():
    head = AdaFace(4, 3)
    head.norm_statistics.copy_(torch.tensor([10.0, 2.0]))
    logits = head(torch.zeros(0, 4, requires_grad=True), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0, 3)
    logits.sum().backward()
    assert head.weight.grad.count_nonzero() == 0
    assert head.norm_statistics.tolist() == [10, 2]


# What the head takes


def test_one_set_is_a_batch_of_one():
    features, quality = _rows(1, 9)
    noise, mask = _gumbel(K, 1, 9), torch.arange(9)[None] % 4 != 2
    head = _head(dropout=0.0)
    for options in ({}, {"noise": noise}, {"mask": mask}, {"lengths": torch.tensor([5])}):
        single = {name: v[:, 0] if name == "noise" else v[0] for name, v in options.items()}
        batch, alone = _results(head, features, quality, **options), _results(head, features[0], quality[0], **single)
        _same([[t[0] for t in some] for some in batch[:2]], alone[:2])
        _same(batch[2:], alone[2:])
    with torch.no_grad():
        batch, alone = head.eval()(features, quality), head(features[0], quality[0])
    assert torch.equal(batch.descriptor[0], alone.descriptor)
    assert all(torch.equal(one[0], other) for one, other in zip(batch.coreset, alone.coreset, strict=True))


@pytest.mark.parametrize("shape", [(2, 9), (9,)])
def test_quality_may_have_a_last_axis(shape):
    features, quality = _rows(*shape)
    head = _head().eval()
    _same([head(features, quality[..., None])[:2]], [head(features, quality)[:2]])
    packed = torch.tensor([0, 4, 9]), *_rows(9)
    _same(
        [head(packed[1], packed[2][:, None], cu_seqlens=packed[0])[:2]], [head(*packed[1:], cu_seqlens=packed[0])[:2]]
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_is_the_set_without_the_rows(training):
    features, quality = _rows(2, 12)
    noise = _gumbel(K, 2, 12) if training else None
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    head = _head(dropout=0.0).train(training)
    masked = _results(head, features, quality, noise=noise, mask=mask)
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
    packed = _results(
        head, features[mask], quality[mask], noise=None if noise is None else noise[:, mask], cu_seqlens=cu_seqlens
    )
    for one, other in zip((*masked[0][:3], *masked[2]), (*packed[0][:3], *packed[2]), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    assert (masked[1][0][mask] - packed[1][0]).abs().max() <= 1e-4 * packed[1][0].abs().max()
    assert masked[1][0][~mask].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_a_mask_may_be_of_integers(dtype):
    features, quality = _rows(2, 12)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    head = _head(dropout=0.0)
    noise = _gumbel(K, 2, 12)
    _same(
        _results(head, features, quality, noise=noise, mask=mask.to(dtype)),
        _results(head, features, quality, noise=noise, mask=mask),
    )
    with pytest.raises(ValueError, match="mask"):
        head(features, quality, mask=mask.to(dtype) * 2)
    with pytest.raises(TypeError, match="mask"):
        head(features, quality, mask=mask.float())
    with pytest.raises(ValueError, match="mask"):
        head(features, quality, mask=mask[:, :5].to(dtype))


def test_nested_sets_are_packed_ones():
    features, quality = _rows(9)
    lengths = [4, 0, 5]
    head = _head(dropout=0.0).eval()
    expected = _results(head, features, quality, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    rows = features.clone().requires_grad_()
    nested = torch.nested.as_nested_tensor(list(rows.split(lengths)), layout=torch.jagged)
    norms = torch.nested.as_nested_tensor(list(quality.split(lengths)), layout=torch.jagged)
    for either in (norms, quality):
        output = head(nested, either)
        assert torch.equal(output.descriptor, expected[0][0])
        grad = torch.autograd.grad(output.descriptor.cumsum(-1).sum() + output.norm.sum(), rows, retain_graph=True)[0]
        assert torch.equal(grad, expected[1][0])
    with pytest.raises(ValueError, match="no cu_seqlens with nested features"):
        head(nested, norms, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    with pytest.raises(ValueError, match=r"of layout torch\.jagged"):
        head(torch.nested.nested_tensor([features]), quality)


def test_generator_distinct_and_strict_are_the_selections():
    features, quality = _rows(2, 6)
    head = _head()
    first, second = (
        head(features, quality, generator=torch.Generator().manual_seed(5)).coreset.indices for _ in range(2)
    )
    assert torch.equal(first, second)
    same = features[:, :1].expand(-1, 6, -1)
    assert head.eval()(same, quality, distinct=True).coreset.indices.sort(-1).values.diff().min() > 0
    for training in (True, False):
        for name, spoil in (("features are not finite", features), ("quality is nan", quality)):
            spoilt = spoil.clone()
            spoilt[1, 2] = torch.nan
            arguments = (spoilt, quality) if spoil is features else (features, spoilt)
            with pytest.raises(ValueError, match=f"row 2 of set 1 cannot be picked: its {name}"):
                head.train(training)(*arguments, strict=True)


BUILT = [
    ({"num_heads": 0}, ValueError, "num_heads to be an integer of at least 1, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads to be an integer of at least 1, got 2.0 of type float"),
    ({"num_heads": 5}, ValueError, "divisible by num_heads = 5, got 32"),
    ({"k": 0}, ValueError, "k to be an integer of at least 1, got 0"),
    ({"k": True}, TypeError, "k to be an integer of at least 1, got True"),
    ({"k": "3"}, TypeError, "k to be an integer of at least 1, got '3' of type str"),
    ({"k": 2**63}, ValueError, "k to be an integer"),
    ({"dim": 0}, ValueError, "dim to be an integer of at least 1, got 0"),
    ({"dim": 31, "num_heads": 1}, ValueError, "dim even"),
    ({"dropout": 1.0}, ValueError, r"dropout in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout in \[0, 1\), got -0.1"),
    ({"dropout": torch.nan}, ValueError, r"dropout in \[0, 1\), got nan"),
    ({"dropout": "x"}, TypeError, "dropout to be a number, got 'x' of type str"),
    ({"gamma": torch.nan}, ValueError, "gamma finite in float32, got nan"),
    ({"gamma": 1e300}, ValueError, r"gamma finite in float32, got 1e\+300"),
    ({"gamma": None}, TypeError, "gamma to be a number, got NoneType"),
]


@pytest.mark.parametrize(("options", "error", "message"), BUILT)
def test_wrong_settings_are_refused_when_the_head_is_built(options, error, message):
    with pytest.raises(error, match=message):
        CoresetAggregator(**{"dim": 32, **options})


def test_what_is_no_tensor_is_named():
    features, quality = _rows(2, 6)
    with pytest.raises(TypeError, match="features and quality to be Tensors, got list and Tensor"):
        _head()(features.tolist(), quality)
    with pytest.raises(TypeError, match="Tensor and NoneType"):
        _head()(features, None)
    for training in (True, False):
        head = _head().train(training)
        with pytest.raises(TypeError, match=r"features of a floating-point dtype, got torch\.int64"):
            head(features.long(), quality)
        with pytest.raises(TypeError, match="quality of dtype"):
            head(features, quality.long())
        with pytest.raises(ValueError, match="features' device cpu, got meta"):
            head(features, quality.to("meta"))
    with pytest.raises(ValueError, match=r"quality of shape \(2, 6\), got \(2, 6, 2\)"):
        _head()(features, quality[..., None].expand(-1, -1, 2))


# Half precision


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e7])
def test_a_half_precision_head_takes_norms_that_its_dtype_cannot_hold(size, dtype, training):
    exact = _head(dropout=0.0).train(training).to(dtype)
    half = copy.deepcopy(exact)
    exact = exact.double()
    features, quality = _rows(3, 8, dtype=dtype)
    quality = quality * size
    noise = _gumbel(K, 3, 8) if training else None
    outputs, grads, parameters = _results(half, features, quality, noise=noise, norm_weight=1 / size)
    truth = exact(features.double(), quality.double(), noise=None if noise is None else noise.double())
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == torch.float32
    assert torch.equal(outputs[3], truth.coreset.indices)
    # float32 all the way but for the result; its angles of encodings are off by 2^-24 of the norm
    assert F.cosine_similarity(outputs[0].double(), truth.descriptor).min() > 1 - 1e-5
    assert (outputs[1] / truth.norm - 1).abs().max() < 1e-3
    assert all(grad.isfinite().all() for grad in (*grads, *parameters))
    with torch.autocast("cpu", dtype):
        cast = _head(dropout=0.0).train(training)(features, quality, noise=noise)
    assert cast.descriptor.dtype == torch.float32
    assert cast.descriptor.isfinite().all()


def test_the_head_compiles_whole():
    head = _head(dropout=0.0).eval()
    features, quality = _rows(2, 9)
    mask = torch.arange(18).view(2, 9) % 5 != 1
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    expected, got = head(features, quality, mask=mask), compiled(features, quality, mask=mask)
    assert (expected.descriptor - got.descriptor).abs().max() <= 1e-6
    assert torch.equal(expected.coreset.indices, got.coreset.indices)


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e10, 1e19, 1e25, 1e36])
def test_picks_of_any_norm_are_refined_as_in_float64(size):
    """LayerNorm, softmax and the descriptor's length would square what float32 cannot hold squared."""
    features, quality = _rows(3, 8)
    quality = quality * size
    results = []
    for dtype in (torch.float32, torch.float64):
        head = _head(dropout=0.0).eval().to(dtype)
        rows, norms = (t.to(dtype).requires_grad_() for t in (features, quality))
        core = (rows * norms[..., None])[:, :K]
        sets = RowSets.padded(3, 8, None, features.device)
        aggregate = facecoresetnet.refine(
            head._layers(), core, torch.tensor([3, 2, 0]), rows.flatten(0, 1), norms.flatten(), sets
        )
        norm = facecoresetnet._length(aggregate)
        descriptor = aggregate / torch.where(norm > 0, norm, 1)[:, None]
        grads = torch.autograd.grad(descriptor.cumsum(-1).sum(), (rows, norms, *head.parameters()), allow_unused=True)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)
        results.append((descriptor, norm / size, *grads[:2]))
    for name, single, exact in zip(("descriptor", "norm", "features", "quality"), *results, strict=True):
        # a score of 1e19 hangs on the last bit of its rows: there float32's softmax is another at times
        assert (single - exact).abs().max() <= 1e-3 * exact.abs().max(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e25, 1e30])
@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
def test_norms_from_one_end_of_float32_to_the_other(size, training, backend):
    features, quality = _rows(2, 8)
    noise = _gumbel(K, 2, 8) if training else None
    head = _head(dropout=0.0).train(training)
    outputs, grads, parameters = _results(head, features, quality * size, noise=noise, norm_weight=1 / size)
    reference = ReferenceHead(DIM, K, 4, dropout=0.0).double()
    reference.load_state_dict(head.state_dict())
    descriptor, norm = reference(features.double(), quality.double() * size, None if noise is None else noise.double())
    assert (outputs[0] - descriptor).abs().max() <= 1e-5
    assert (outputs[1] / norm - 1).abs().max() <= 1e-5
    assert all(grad.isfinite().all() for grad in (*grads, *parameters))
