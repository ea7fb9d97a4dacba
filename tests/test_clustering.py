"""cluster_sums and the operator over chunks: against plain formulas, layouts, bad rows, bits, PyTorch's own checks."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fcn_kernels import cluster_sums
from fcn_kernels.clustering import op, torch_backend
from fcn_kernels.clustering.norm_code import code_table, norm_codes, norm_edges
from fcn_kernels.clustering.problem import Chunks, Sums

F64 = torch.float64


def _draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _plain(x, weight, bias, keys, scale, ghosts=0):
    """One set (N, C)."""
    share = (keys @ weight.T + bias).softmax(-1)[:, : len(weight) - ghosts]
    return share.T @ (scale[:, None] * x), share.T @ keys, share.sum(0)


def _inputs(sets=3, n=7, dim=6, key_dim=4, centers=5, dtype=F64):
    draw = (
        _draw(sets, n, dim),
        _draw(centers, key_dim, seed=1),
        _draw(centers, seed=2),
        _draw(sets, n, key_dim, seed=3),
    )
    return *(t.to(dtype) for t in draw), _draw(sets, n, seed=4).abs().to(dtype)


@pytest.mark.parametrize("ghosts", [0, 2])
def test_sums_and_gradients_are_the_plain_ones(ghosts):
    tensors = [t.requires_grad_() for t in _inputs()]
    x, weight, bias, keys, scale = tensors
    got = cluster_sums(*tensors, ghosts=ghosts)
    each = [_plain(x[b], weight, bias, keys[b], scale[b], ghosts) for b in range(3)]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]
    arriving = [_draw(*t.shape, seed=9) for t in expected]
    for ours, theirs in zip(
        (*got, *torch.autograd.grad(got, tensors, arriving)),
        (*expected, *torch.autograd.grad(expected, tensors, arriving)),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-13 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("centers", [1, 3, 4])
def test_gradcheck(centers):
    x, weight, bias, keys, scale = (t.requires_grad_() for t in _inputs(2, 3, 4, 2, centers))
    lengths, fast = torch.tensor([3, 1]), {"fast_mode": centers > 1}
    inputs = (x, weight, bias, keys, scale)
    assert torch.autograd.gradcheck(lambda *t: cluster_sums(*t, lengths=lengths), inputs, **fast)
    weight = _draw(centers, 4, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: cluster_sums(*t)[::2], (x, weight, bias), **fast)


def test_netvlad_in_five_lines():
    x, centers, weight = F.normalize(_draw(3, 50, 16), dim=-1), _draw(8, 16, seed=1), _draw(8, 16, seed=2)
    share = (x @ weight.T).softmax(-1)
    residuals = x[:, :, None] - centers  # (B, N, M, C)
    expected = F.normalize((share[..., None] * residuals).sum(1), dim=-1)
    sums, _, masses = cluster_sums(x, weight)
    assert (F.normalize(sums - masses[..., None] * centers, dim=-1) - expected).abs().max() <= 1e-13


def test_ghostvlad_in_five_lines():
    x, centers, weight, bias = _draw(3, 50, 16), _draw(8, 16, seed=1), _draw(10, 16, seed=2), _draw(10, seed=3)
    share = (x @ weight.T + bias).softmax(-1)[..., :8]
    residuals = x[:, :, None] - centers
    expected = (share[..., None] * residuals).sum(1)
    sums, _, masses = cluster_sums(x, weight, bias, ghosts=2)
    assert (sums - masses[..., None] * centers - expected).abs().max() <= 1e-12


def test_a_step_of_slot_attention_in_five_lines():
    inputs, slots = _draw(40, 16), _draw(5, 16, seed=1)
    to_query, to_key, to_value = (_draw(16, 16, seed=s) / 4 for s in (2, 3, 4))
    q, k, v = slots @ to_query, inputs @ to_key, inputs @ to_value
    attention = (k @ q.T / 4).softmax(-1)  # over the slots
    expected = (attention / attention.sum(0)).T @ v
    sums, _, masses = cluster_sums(v, q / 4, keys=k)
    assert (sums / masses[:, None] - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_set_gives_the_same_bits_padded_packed_masked_and_alone(dtype):
    lengths = [5, 1, 0, 33, 5, 20, 12]
    x, weight, bias, keys, scale = _inputs(7, 33, 24, 16, 5, dtype=dtype)
    inside = torch.arange(33) < torch.tensor(lengths)[:, None]
    x[~inside] = torch.nan
    padded = cluster_sums(x, weight, bias, keys, scale, lengths=torch.tensor(lengths))
    packed = cluster_sums(
        x[inside], weight, bias, keys[inside], scale[inside], cu_seqlens=torch.tensor([0, *lengths]).cumsum(0)
    )
    masked = cluster_sums(x, weight, bias, keys, scale, mask=inside)
    alone = [cluster_sums(x[b, :n], weight, bias, keys[b, :n], scale[b, :n]) for b, n in enumerate(lengths)]
    for name, value in padded._asdict().items():
        for other in (packed, masked):
            assert torch.equal(value, getattr(other, name)), name
        assert torch.equal(value, torch.stack([getattr(a, name) for a in alone])), name
    assert padded.sums[2].abs().max() == 0
    assert padded.masses.sum(-1).tolist() == pytest.approx(lengths)


def test_rows_that_are_not_finite_change_nothing_and_get_no_gradient():
    tensors = [t.requires_grad_() for t in _inputs(2, 9, dtype=torch.float32)]
    expected = cluster_sums(*tensors, mask=(torch.arange(9) % 4 != 3).expand(2, 9))
    bad = [t.detach().clone() for t in tensors]
    bad[0][0, 3, 1], bad[0][1, 3, 2], bad[3][0, 7, 0], bad[4][1, 7] = torch.nan, torch.inf, -torch.inf, torch.nan
    bad = [t.requires_grad_() for t in bad]
    got = cluster_sums(*bad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    grads = torch.autograd.grad([t.cumsum(-1).sum() for t in got], bad)
    theirs = torch.autograd.grad([t.cumsum(-1).sum() for t in expected], tensors)
    assert all(torch.equal(a, b) for a, b in zip(grads, theirs, strict=True))
    assert grads[0][:, 3::4].abs().max() == 0


def test_bad_calls_say_what_was_expected():
    x, weight, bias, keys, scale = _inputs()
    for message, call in {
        r"weight of shape \(5, 6\)": lambda: cluster_sums(x, weight),
        r"keys of shape \(3, 7, 4\)": lambda: cluster_sums(x, weight, keys=keys[:, :3]),
        r"bias of shape \(5,\)": lambda: cluster_sums(x, weight, bias[:2], keys),
        r"scale of shape \(3, 7\)": lambda: cluster_sums(x, weight, bias, keys, scale[0]),
        r"ghosts in \[0, 5\)": lambda: cluster_sums(x, weight, bias, keys, ghosts=5),
        "at most one of mask, lengths": lambda: cluster_sums(
            x, weight, bias, keys, mask=x[..., 0] > 0, lengths=torch.tensor([1, 1, 1])
        ),
        r"lengths in \[0, 7\]": lambda: cluster_sums(x, weight, bias, keys, lengths=torch.tensor([1, 8, 1])),
        "cu_seqlens to run from 0 to T = 7": lambda: cluster_sums(
            x[0], weight, bias, keys[0], cu_seqlens=torch.tensor([0, 8])
        ),
        r"shape \(B, N, C\)": lambda: cluster_sums(x[0, 0], weight),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="ghosts to be an integer"):
        cluster_sums(x, weight, bias, keys, ghosts=1.0)
    with pytest.raises(TypeError, match="values to be a Tensor"):
        cluster_sums([1.0], weight)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"values that is not nested: give its values\(\)"):
        cluster_sums(nested, weight)
    with pytest.raises(TypeError, match="keys of dtype"):
        cluster_sums(x, weight, keys=keys.long())


def test_no_second_derivative():
    x, weight, bias, keys, scale = (t.requires_grad_() for t in _inputs())
    grad = torch.autograd.grad(cluster_sums(x, weight, bias, keys, scale).sums.sum(), scale, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_float32_loses_no_more_than_eager_and_half_is_summed_in_float32():
    x, weight, bias, keys, scale = (t[0] if t.ndim > 1 and len(t) == 1 else t for t in _inputs(1, 300, 64, 32, 4))
    single = [t.float() for t in (x, weight, bias, keys, scale)]
    exact, eager, ours = _plain(x, weight, bias, keys, scale)[0], _plain(*single)[0], cluster_sums(*single).sums
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + exact.abs().max() * 2**-24
    half = x.bfloat16()
    assert torch.equal(cluster_sums(half, *single[1:]).sums, cluster_sums(half.float(), *single[1:]).sums)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cluster_sums(*single).sums, ours)


def test_compile_and_export_take_it_whole():
    tensors = _inputs(dtype=torch.float32)
    lengths = torch.tensor([7, 0, 3])
    expected = cluster_sums(*tensors, lengths=lengths)

    class Module(torch.nn.Module):
        def forward(self, lengths, *tensors):
            return tuple(cluster_sums(*tensors, lengths=lengths))

    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Module(), (lengths, *tensors)).module()
    for run in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(run(lengths, *tensors), expected, strict=True))
    tensors[0].requires_grad_()
    compiled(lengths, *tensors)[0].cumsum(-1).sum().backward()
    expected = torch.autograd.grad(cluster_sums(*tensors, lengths=lengths).sums.cumsum(-1).sum(), tensors[0])[0]
    assert torch.equal(tensors[0].grad, expected)


def chunks(lengths=(4, 1, 0, 6), depth=2, dim=16, norm_dim=8, centers=3, width=5, quality=False, dtype=F64):
    """A drawn problem: rows with norms about 3, and weights that matter."""
    rows = sum(lengths)

    def draw(*shape, seed):
        return (_draw(*shape, seed=seed) / 2).to(dtype)

    return Chunks(
        features=4 * draw(rows, width, seed=0),
        quality=draw(rows, seed=1).abs() + 3 if quality else None,
        styles=draw(rows, dim - norm_dim, seed=2) if norm_dim < dim else None,
        table=code_table(norm_dim, dtype),
        edges=norm_edges(torch.tensor(3.0), torch.tensor(1.5), dtype),
        tokens=draw(centers, dim, seed=3),
        qkv_weight=draw(depth, 3 * dim, dim, seed=4),
        qkv_bias=draw(depth, 3 * dim, seed=5),
        proj_weight=draw(depth, dim, dim, seed=6),
        proj_bias=draw(depth, dim, seed=7),
        fc1_weight=draw(depth, 4 * dim, dim, seed=8),
        fc1_bias=draw(depth, 4 * dim, seed=9),
        fc2_weight=draw(depth, dim, 4 * dim, seed=10),
        fc2_bias=draw(depth, dim, seed=11),
        weight=draw(centers, dim, seed=12),
        bias=draw(centers, seed=13),
        residual=None,
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        lengths=torch.tensor(lengths),
        valid=None,
        heads=4,
        longest=rows,
    )


def plain_chunk(p, b):
    """One chunk by autograd's own operations: sums, key sums, masses, shares."""
    inside = slice(int(p.offsets[b]), int(p.offsets[b] + p.lengths[b]))
    x = p.features[inside]
    r = x.norm(dim=-1) if p.quality is None else p.quality[inside]
    unit = x / (r + 1e-5)[:, None] * (1 if p.quality is None else r[:, None])
    h = p.table[norm_codes(r, p.edges)]
    h = torch.cat([h if p.styles is None else torch.cat([p.styles[inside], h], -1), p.tokens])
    for i in range(p.depth):
        factor = (1, 1) if p.residual is None else p.residual[i, :, b]
        qkv = F.linear(F.layer_norm(h, h.shape[-1:]), p.qkv_weight[i], p.qkv_bias[i])
        q, k, v = qkv.unflatten(-1, (3, p.heads, -1)).permute(1, 2, 0, 3)
        attended = ((q @ k.mT).softmax(-1) @ v).transpose(0, 1).flatten(1)
        h = h + factor[0] * F.linear(attended, p.proj_weight[i], p.proj_bias[i])
        wide = F.linear(F.layer_norm(h, h.shape[-1:]), p.fc1_weight[i], p.fc1_bias[i])
        h = h + factor[1] * F.linear(F.gelu(wide), p.fc2_weight[i], p.fc2_bias[i])
    x_hat = F.layer_norm(h[: len(x)], h.shape[-1:])
    share = (x_hat @ p.weight.T + p.bias).softmax(-1)
    return share.T @ unit, share.T @ x_hat, share.sum(0), share


def leaves(p):
    """Names of the tensors that take a gradient."""
    return [n for n, t in p._asdict().items() if isinstance(t, torch.Tensor) and t.requires_grad]


def with_gradients(p):
    constant = ("edges", "residual", "offsets", "lengths", "valid")
    wanted = {n: t for n, t in p._asdict().items() if isinstance(t, torch.Tensor) and n not in constant}
    return p._replace(**{n: t.detach().clone().requires_grad_() for n, t in wanted.items()})


CHUNKS = {
    "style": {},
    "quality": {"quality": True},
    "no style": {"norm_dim": 16},
    "no blocks": {"depth": 0},
    "one center": {"centers": 1, "depth": 1},
    "many": {"lengths": (20,) * 7 + (3, 70, 20), "depth": 3, "centers": 5},
}


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_and_their_gradients_are_the_plain_ones(case, dropped):
    p = chunks(**CHUNKS[case])
    if dropped:
        p = p._replace(residual=(_draw(p.depth, 2, len(p.lengths), seed=14) > -0.3) * 1.4)
    p = with_gradients(p)
    out = op.cluster_chunks(p, "torch")
    each = [plain_chunk(p, b) for b in range(len(p.lengths))]
    expected = [torch.stack(parts) for parts in list(zip(*each, strict=True))[:3]]
    arriving = [_draw(*t.shape, seed=20) for t in expected]
    inputs = [getattr(p, name) for name in leaves(p) if getattr(p, name).numel()]
    for ours, theirs in zip(
        (*out[:3], out.shares, *torch.autograd.grad(out[:3], inputs, arriving)),
        (
            *expected,
            torch.cat([e[3] for e in each]),
            *torch.autograd.grad(expected, inputs, arriving, materialize_grads=True),
        ),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max().clamp(min=1)
    assert out.counts.tolist() == p.lengths.tolist()


def test_frozen_rows_get_no_gradient_computed(monkeypatch):
    p = chunks()
    p = with_gradients(p)._replace(features=p.features)
    wanted = []
    run = torch_backend.chunks_backward
    monkeypatch.setattr(torch_backend, "chunks_backward", lambda *a: wanted.append(a[-1]) or run(*a))
    op.cluster_chunks(p, "torch").sums.sum().backward()
    assert wanted == [False]
    assert p.tokens.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_chunk_gives_the_same_bits_in_any_batch(dtype):
    lengths = [3, 20, 20, 1, 0, 61, 20, 7]
    p = chunks(lengths, dim=32, norm_dim=16, centers=4, width=24, dtype=dtype)
    whole = op.cluster_chunks(p, "torch")
    for b, n in enumerate(lengths):
        inside = slice(int(p.offsets[b]), int(p.offsets[b + 1]))
        alone = op.cluster_chunks(
            p._replace(
                features=p.features[inside],
                styles=p.styles[inside],
                offsets=torch.tensor([0, n]),
                lengths=torch.tensor([n]),
            ),
            "torch",
        )
        assert all(torch.equal(a[0], w[b]) for a, w in zip(alone[:3], whole[:3], strict=True)), b
        assert torch.equal(alone.shares, whole.shares[inside])


@pytest.mark.parametrize("quality", [False, True])
def test_bad_rows_of_chunks_change_nothing(quality):
    p = chunks((5, 4, 2), quality=quality, dtype=torch.float32)
    bad = torch.tensor([1, 5, 8, 9, 10])
    valid = torch.ones(11, dtype=torch.bool).index_fill_(0, bad, False)
    features, styles = p.features.clone(), p.styles.clone()
    features[1, 2], features[9], styles[5, 1], styles[8] = torch.nan, torch.inf, torch.nan, -torch.inf
    norms = p.quality
    if quality:
        norms = norms.clone()
        norms[10] = -1.0
    else:
        features[10] = torch.nan
    p = with_gradients(p)
    q = with_gradients(p._replace(features=features, styles=styles, quality=norms))
    expected, got = (op.cluster_chunks(c, "torch") for c in (p._replace(valid=valid), q))
    assert all(torch.equal(a, b) for a, b in zip(got[:5], expected[:5], strict=True))
    assert got.counts.tolist() == [4, 2, 0]
    assert got.sums[2].abs().max() == got.shares[bad].abs().max() == 0
    for c, out in ((p, expected), (q, got)):
        (out.sums.cumsum(-1).sum() + out.key_sums.cumsum(-1).sum()).backward()
        assert c.features.grad[bad].abs().max() == c.styles.grad[bad].abs().max() == 0
    assert all(torch.equal(getattr(p, name).grad, getattr(q, name).grad) for name in leaves(p))


def test_all_rows_bad_and_no_rows_give_zeros():
    for p in (chunks((3, 2), quality=True), chunks((0, 0)), chunks(())):
        p = with_gradients(p._replace(features=torch.full_like(p.features, torch.nan)))
        out = op.cluster_chunks(p, "torch")
        assert out.counts.sum() == 0
        assert all((t == 0).all() for t in out[:4])
        out.sums.sum().backward()
        assert all((getattr(p, name).grad == 0).all() for name in leaves(p))
    x, weight, bias, keys, scale = (t.requires_grad_() for t in _inputs())
    masses = cluster_sums(x * torch.nan, weight, bias, keys, scale).masses
    assert (masses == 0).all()
    assert (torch.autograd.grad(masses.sum(), scale)[0] == 0).all()


def test_a_zero_row_is_a_row():
    p = chunks((5,))
    features = p.features.clone()
    features[2] = 0
    p = with_gradients(p._replace(features=features))
    out = op.cluster_chunks(p, "torch")
    assert out.counts.tolist() == [5]
    out.sums.cumsum(-1).sum().backward()
    assert p.features.grad.isfinite().all()


def test_codes_step_at_their_edges():
    mean, variance = torch.tensor(22.0), torch.tensor(40.0)
    for dtype in (torch.float32, F64):
        edges = norm_edges(mean, variance, dtype)
        assert edges.shape == (60,)
        assert (edges.diff() > 0).all()
        below = torch.nextafter(edges, edges.new_tensor(-torch.inf))
        assert norm_codes(edges, edges).tolist() == list(range(1, 61))
        assert norm_codes(below, edges).tolist() == list(range(60))
        if dtype == torch.float32:  # the formula, in float64
            for norms in (edges, below, torch.linspace(0, 50, 4001)):
                score = (norms.double() - 22) / torch.tensor(40.0 + 1e-5, dtype=F64).sqrt()
                assert norm_codes(norms, edges).tolist() == ((score.clamp(-3, 3) * 10).long() + 30).tolist()


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient):
    x, weight, bias, keys, scale = (t.float().requires_grad_(gradient) for t in _inputs())
    flat = (x.flatten(0, 1), keys.flatten(0, 1), scale.flatten())
    sums = Sums(flat[0], flat[1], flat[2], weight, bias, torch.tensor([0, 7, 14, 21]), torch.tensor([7, 0, 3]), None, 1)
    torch.library.opcheck(torch.ops.fcn_kernels.cluster_sums.default, (*sums, "torch"))
    p = chunks(dtype=torch.float32)
    p = with_gradients(p) if gradient else p
    torch.library.opcheck(torch.ops.fcn_kernels.cluster_chunks.default, (*p, gradient, "torch"))


def test_flops_are_the_formula():
    x, weight, bias, keys, scale = (t.requires_grad_() for t in _inputs())
    with FlopCounterMode(display=False) as counter:
        sums = cluster_sums(x, weight, bias, keys, scale, ghosts=1).sums
    assert counter.get_total_flops() == 2 * 21 * (5 * 4 + 4 * (6 + 4))
    with FlopCounterMode(display=False) as counter:
        sums.sum().backward()
    assert counter.get_total_flops() == 2 * 21 * (3 * 5 * 4 + 2 * 4 * (6 + 4))
    p, (n, m, d, c) = chunks((6, 6)), (6, 3, 16, 5)
    with FlopCounterMode(display=False) as counter:
        op.cluster_chunks(p, "torch")
    per_chunk = 2 * (12 * d * d + 2 * (n + m) * d) * (n + m) + n * m * (2 * d + c)
    assert counter.get_total_flops() == 2 * 2 * per_chunk
