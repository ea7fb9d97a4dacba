"""Chunks in C++: against float64, bits, bad rows, the backward pass; what a head keeps of its parameters."""

import copy
import pickle
import subprocess

import pytest
import torch
from test_cluster_aggregate import make_head, rows, run, same
from test_clustering import chunks, leaves, plain_chunk, with_gradients

from fcn_kernels import ClusterAggregate, compiler
from fcn_kernels.clustering import op, torch_backend
from fcn_kernels.clustering.cpp import launch
from fcn_kernels.clustering.problem import Summed
from fcn_kernels.heads import cluster_cpp

pytestmark = pytest.mark.skipif(bool(launch.unavailable(torch.float32)), reason="no C++ compiler")


def _to(p, dtype):
    """Floating-point tensors in a dtype; edges are rounded upwards as norm_edges does it."""
    return type(p)(*(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in p))


def _dropped(p):
    keep = torch.rand(p.depth, 2, len(p.lengths), generator=torch.Generator().manual_seed(0)) > 0.4
    return p._replace(residual=(keep * 1.4).to(p.tokens.dtype))


CASES = [
    ((1, 0, 59, 3), {"depth": 1, "centers": 4, "width": 64}),
    ((60,), {"depth": 2, "centers": 5, "quality": True, "width": 513}),
    ((61, 2), {"depth": 3, "centers": 1, "dim": 24, "norm_dim": 24, "width": 33}),
    ((300, 7), {"depth": 2, "centers": 16, "dim": 64, "norm_dim": 32, "width": 512}),
    ((90,), {"depth": 0, "centers": 4}),
    ((1000, 200), {"depth": 1, "centers": 33, "dim": 32, "norm_dim": 8}),  # two batches
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lengths", "options"), CASES)
def test_error_is_within_twice_eagers(lengths, options, dtype):
    p = _to(chunks(lengths, **options), torch.float32)
    if options.get("quality"):
        p = _dropped(p)
    p = p._replace(features=p.features.to(dtype))
    exact = torch_backend.chunks_forward(_to(p, torch.float64), True)
    single = p._replace(features=p.features.float())
    eager = [plain_chunk(single, b) for b in range(len(lengths))]
    eager = [torch.stack(t) for t in list(zip(*eager, strict=True))[:3]] + [torch.cat([e[3] for e in eager])]
    got = launch.chunks_forward(p, True)
    for truth, theirs, ours in zip(exact[:4], eager, got, strict=False):
        loss, allowed = (ours - truth).abs().max(), 2 * (theirs - truth).abs().max()
        assert loss <= allowed + 5e-6 * truth.abs().max()
    assert got.counts.tolist() == list(lengths)


@pytest.mark.parametrize("offset", [0.0, -12.0, 12.0])
@pytest.mark.parametrize("scale", [1.0, 8.0, 200.0])
def test_scores_of_any_size_keep_their_digits_and_their_bits(scale, offset):
    """Scores to 1e5, all of them far below 0 or above it, and chunks whose later keys leave the earlier ones behind."""
    lengths = (300, 7, 150)
    p = _to(chunks(lengths, depth=1, dim=64, norm_dim=32), torch.float32)
    weight, bias = p.qkv_weight.clone(), p.qkv_bias.clone()
    weight[:, :64] *= scale
    bias[:, :64], bias[:, 64:128] = bias[:, :64] + offset, bias[:, 64:128] + abs(offset)  # queries, keys
    later = torch.arange(len(p.styles))[:, None] > 200
    p = p._replace(qkv_weight=weight, qkv_bias=bias, styles=torch.where(later, 3 * p.styles, p.styles))
    exact = torch_backend.chunks_forward(_to(p, torch.float64), True)
    eager = [plain_chunk(p, b) for b in range(len(lengths))]
    eager = [torch.stack(t) for t in list(zip(*eager, strict=True))[:3]]
    got = launch.chunks_forward(p, True)
    for truth, theirs, ours in zip(exact[:3], eager, got, strict=False):
        assert (ours - truth).abs().mean() <= 2 * (theirs - truth).abs().mean() + 1e-6 * truth.abs().max()
    for b, n in enumerate(lengths):
        alone = launch.chunks_forward(_of(p, slice(int(p.offsets[b]), int(p.offsets[b + 1])), [n]), False)
        assert all(torch.equal(a[0], w[b]) for a, w in zip(alone[:3], got[:3], strict=True))


def _of(p, rows, lengths, **more):
    """A call with some of the rows."""
    features, styles = p.features[rows], p.styles[rows]
    lengths = torch.tensor(lengths)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return p._replace(features=features, styles=styles, offsets=offsets, lengths=lengths, **more)


def test_a_chunk_gives_the_same_bits_in_any_batch_layout_and_number_of_threads():
    lengths = [3, 20, 130, 1, 0, 61, 20, 7, 900]
    p = _to(chunks(lengths, dim=24, norm_dim=8, centers=5, width=35), torch.float32)
    whole, threads = launch.chunks_forward(p, False), torch.get_num_threads()
    for b, n in enumerate(lengths):
        inside = slice(int(p.offsets[b]), int(p.offsets[b + 1]))
        alone = launch.chunks_forward(_of(p, inside, [n]), False)
        assert all(torch.equal(a[0], w[b]) for a, w in zip(alone[:3], whole[:3], strict=True)), b
        assert torch.equal(alone.shares, whole.shares[inside])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = launch.chunks_forward(p, False)
            assert all(torch.equal(a, w) for a, w in zip(again, whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    # rows of a chunk among others, which are NaN, and strided
    at = torch.arange(len(p.features)) * 2 + 1
    wide = torch.full((2 * len(at), 50), torch.nan).index_put_((at,), torch.nn.functional.pad(p.features, (3, 12)))
    styles = torch.full((2 * len(at), 16), torch.nan).index_put_((at,), p.styles)
    spread = p._replace(features=wide[:, 3:38], styles=styles, offsets=2 * p.offsets, lengths=2 * p.lengths)
    for valid in (None, torch.arange(2 * len(at)) % 2 == 1):
        found = launch.chunks_forward(spread._replace(valid=valid), False)
        assert all(torch.equal(f, w) for f, w in zip(found[:3], whole[:3], strict=True))
        assert torch.equal(found.shares[at], whole.shares)
        assert found.shares[::2].abs().max() == 0
        assert torch.equal(found.counts, whole.counts)


@pytest.mark.parametrize("quality", [False, True])
def test_rows_that_are_not_finite_take_no_part_and_get_no_gradient(quality):
    p = _to(chunks((5, 4, 2), quality=quality), torch.float32)
    bad = torch.tensor([1, 5, 8, 9, 10])
    valid = torch.ones(11, dtype=torch.bool).index_fill_(0, bad, False)
    features, styles, norms = p.features.clone(), p.styles.clone(), p.quality
    features[1, 2], features[9], styles[5, 1], styles[8] = torch.nan, torch.inf, torch.nan, -torch.inf
    features[10] = torch.nan
    if quality:
        features[10], norms = 1, norms.index_put((bad[-1],), torch.tensor(-1.0))
    p = with_gradients(p)
    q = with_gradients(p._replace(features=features, styles=styles, quality=norms))
    outcomes = []
    for call in (p._replace(valid=valid), q):
        out = op.cluster_chunks(call, "cpp")
        (out.sums.cumsum(-1).sum() + out.key_sums.cumsum(-1).sum()).backward()
        outcomes.append([*out[:5], *(getattr(call, name).grad for name in leaves(call))])
    assert same(*outcomes)
    assert outcomes[0][4].tolist() == [4, 2, 0]
    assert (q.features.grad[bad] == 0).all()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_gradients_are_those_of_pytorchs_forward(depth):
    p = with_gradients(_dropped(_to(chunks((20, 3, 0, 70), depth=depth, centers=3), torch.float32)))
    bad = p.features.detach().clone()
    bad[4] = torch.nan
    p = p._replace(features=bad.requires_grad_())
    inputs, found = [getattr(p, name) for name in leaves(p) if getattr(p, name).numel()], []
    for backend in ("torch", "cpp"):
        out = op.cluster_chunks(p, backend)
        grad = Summed(*(torch.ones_like(t).cumsum(-1) for t in out[:3]))
        found.append(torch.autograd.grad(out[:3], inputs, grad, materialize_grads=True))
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1)


def test_no_chunks_and_float64():
    for lengths in ((), (0, 0)):
        out = launch.chunks_forward(_to(chunks(lengths), torch.float32), True)
        assert all((t == 0).all() for t in out)
    assert "float64" in launch.unavailable(torch.float64)
    p = chunks((5,))
    assert torch.equal(op.cluster_chunks(p, "cpu").sums, op.cluster_chunks(p, "torch").sums)


@pytest.mark.parametrize(
    "options", [{}, {"clusters": 1, "channelwise": False}, {"clusters": 5, "depth": 0, "dim": 513}]
)
def test_descriptors_without_a_graph_are_those_with_one(options):
    head = make_head(**options)
    x, styles = torch.randn(40, 6, head.dim), torch.randn(40, 6, 8)
    with_graph, without = head(x, styles), run(head, x, styles)
    assert with_graph.norm.requires_grad
    for one, two in zip(with_graph[:4], without, strict=False):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)
    assert same([t[3] for t in without[:5]], [t[0] for t in run(head, x[3:4], styles[3:4])[:5]])
    empty = run(head, x[:, :0], styles[:, :0])
    assert (empty.descriptor == 0).all()
    assert (empty.norm == 0).all()


def _fresh(head):
    """What a head that has kept nothing gives."""
    other = ClusterAggregate(**{"dim": 24, "clusters": 3, "style_dim": 8, "norm_dim": 8, "num_heads": 4})
    other.style = copy.deepcopy(head.style)
    other.load_state_dict(head.state_dict())
    return run(other.eval(), *rows(2, 9))


def test_what_is_kept_of_parameters_is_never_stale():
    head, given = make_head(), rows(2, 9)
    made = []
    first = run(head, *given)
    kept = head._kept
    assert set(kept) == {"blocks", "mixers"}
    assert same(run(head, *given), first)
    assert head._kept is kept  # not made again

    def check():
        assert same(run(head, *given), _fresh(head))
        made.append(head._kept["blocks"])

    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    head(*given).norm.sum().backward()
    optimizer.step()
    check()
    for parameter in head.parameters():  # as moving averages of weights do it, which PyTorch does not count
        parameter.data.mul_(0.9)
    check()
    head.load_state_dict(make_head(depth=2).state_dict())
    check()
    head.blocks[0].qkv.weight = torch.nn.Parameter(head.blocks[0].qkv.weight.detach() * 1.5)
    check()
    head.mixers[0] = copy.deepcopy(head.mixers[1])
    check()
    head.blocks[1].fc2.weight.data = head.blocks[1].fc2.weight.data.mT.contiguous().mT * 2
    check()
    head.blocks[0].fc1.weight.data[1, 2] += 1  # one number, which no sample need hold
    head.eval()
    check()
    assert len({id(one) for one in made}) >= 5
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert not other._kept
        assert same(run(other, *given), _fresh(head))
    assert same(run(head.double().float(), *given), _fresh(head))


def test_nothing_is_kept_where_a_gradient_is_asked_or_in_training(monkeypatch):
    head, given = make_head(drop_path=0.0), rows(2, 9)
    head(*given).norm.sum().backward()
    head.bfloat16()
    run(head, *given)
    assert not head._kept
    head.float().train()
    head.update(*given)
    assert not head._kept
    frozen = make_head().requires_grad_(False)
    features = given[0].requires_grad_()
    with torch.inference_mode():
        expected = frozen(features.detach(), given[1])
    frozen(features, given[1]).norm.sum().backward()  # through weights kept in inference mode
    assert features.grad.abs().max() > 0
    monkeypatch.setattr(cluster_cpp.launch, "unavailable", lambda _: "no compiler")
    for one, two in zip(expected[:4], run(frozen, *given), strict=False):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_compiles_for_processors_that_are_not_here(processor):
    """Vectors of 16 and 32 bytes."""
    flags = [
        *compiler._FLAGS,
        "-fopenmp",
        f"-march={processor}",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-DROW=float",
    ]
    subprocess.run([*compiler._compiler(), *flags, str(launch._SOURCE)], check=True)
