"""The Triton kernels of clustering: against float64, and bit for bit; interpreted where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from poison import poisoned
from test_clustering import chunks, leaves, plain_chunk, with_gradients

from fcn_kernels import cluster_sums
from fcn_kernels.clustering import op, torch_backend
from fcn_kernels.clustering.kernels import launch_chunks, launch_sums
from fcn_kernels.clustering.norm_code import norm_codes, norm_edges
from fcn_kernels.clustering.problem import CODES, ChunksGradients, Summed, Sums, SumsGradients
from fcn_kernels.sets import row_norms

# Beside twice eager's loss: what float32 sums, and a GPU's exp, may lose where eager happens to lose nothing.
DTYPES = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
SLACK = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def _sums(lengths, dim, every, dtype, device, *, key_dim=None, ghosts=0):
    """A call, all numbers of which are representable in dtype, and the gradients that arrive."""
    generator, rows = torch.Generator().manual_seed(0), sum(lengths)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    keyed = key_dim is not None
    width = key_dim if keyed else dim
    p = Sums(
        values=draw(rows, dim),
        keys=draw(rows, width).float() if keyed else None,
        scale=draw(rows).float() if keyed else None,
        weight=(draw(every, width) / 4).float(),
        bias=draw(every).float(),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        lengths=torch.tensor(lengths),
        valid=None,
        ghosts=ghosts,
    )
    grad = Summed(
        *(draw(len(lengths), every - ghosts, *shape).float() for shape in ((dim,), (width if keyed else 0,), ()))
    )
    return _to(p, device=device), _to(grad, device=device)


def _to(fields, dtype=None, device=None):
    """Floating-point tensors to dtype, all to a device."""
    return type(fields)._make(
        t.to(device, dtype if dtype and t.is_floating_point() else None) if isinstance(t, torch.Tensor) else t
        for t in fields
    )


def _run(backend, p, grad, wanted=True):
    return *backend.sums_forward(p), *backend.sums_backward(p, grad, wanted)


def _poisoned(p, grad, wanted=True):
    with poisoned():
        return _run(launch_sums, p, grad, wanted)


def _eager(p, grad):
    """A plain softmax in the values' own dtype throughout, set by set, by autograd."""
    names = [n for n in SumsGradients._fields if getattr(p, n) is not None]
    leaves = {n: getattr(p, n).to(p.values.dtype).detach().requires_grad_() for n in names}
    each = []
    for first, last in zip(p.offsets[:-1].tolist(), p.offsets[1:].tolist(), strict=True):
        x = leaves["values"][first:last]
        k = leaves["keys"][first:last] if "keys" in leaves else x
        share = (k @ leaves["weight"].T + leaves["bias"]).softmax(-1)[:, : p.centers]
        scaled = share * leaves["scale"][first:last, None] if "scale" in leaves else share
        each.append((scaled.T @ x, share.T @ k if "keys" in leaves else x.new_zeros(p.centers, 0), share.sum(0)))
    out = [torch.stack(parts) for parts in zip(*each, strict=True)]
    loss = sum((o * g.to(o.dtype)).sum() for o, g in zip(out, grad, strict=True))
    grads = dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return *out, *(grads.get(n, p.values.new_zeros(0)) for n in SumsGradients._fields)


NAMES = ("sums", "key_sums", "masses", *(f"d{name}" for name in SumsGradients._fields))


@pytest.mark.parametrize(
    ("lengths", "dim", "every", "options", "dtypes"),
    [
        ((1, 0, 15, 16), 64, 4, {"key_dim": 24, "ghosts": 1}, "fbh"),
        ((60, 3), 5, 16, {}, "fbh"),  # fewer columns than a block, all rows in one piece
        ((9, 300), 20, 5, {"key_dim": 16}, "f"),  # several pieces
        ((30,), 33, 70, {"ghosts": 3}, "b"),  # several blocks of centers
        ((20,), 512, 1, {}, "h"),
        ((17,), 513, 5, {"key_dim": 513}, "b"),
    ],
)
def test_error_is_within_twice_eagers(lengths, dim, every, options, dtypes, device):
    for dtype in (DTYPES[letter] for letter in dtypes):
        p, grad = _sums(lengths, dim, every, dtype, device, **options)
        exact = _run(torch_backend, _to(p, torch.float64), _to(grad, torch.float64))
        for name, truth, theirs, got in zip(NAMES, exact, _eager(p, grad), _poisoned(p, grad), strict=True):
            assert got.shape == truth.shape, name
            if not truth.numel():
                continue
            assert got.isfinite().all(), name
            loss, eager = (got - truth).abs().max(), (theirs - truth).abs().max()
            assert loss <= 2 * eager + SLACK[dtype] * truth.abs().max(), f"{dtype} {name}: {loss:.2e}, {eager:.2e}"


def _set(p, grad, b, left):
    """Set b alone, after `left` rows that are in no set."""
    rows = slice(int(p.offsets[b]), int(p.offsets[b + 1]))
    alone = {n: torch.cat([t[:left], t[rows]]) for n in ("values", "keys", "scale") if (t := getattr(p, n)) is not None}
    n = rows.stop - rows.start
    p = p._replace(**alone, offsets=p.offsets.new_tensor([left, left + n]), lengths=p.lengths.new_tensor([n]))
    return p, Summed(*(t[b : b + 1] for t in grad))


@pytest.mark.parametrize("keyed", [False, True])
def test_a_set_gives_the_same_bits_alone_and_in_a_batch(keyed, device):
    p, grad = _sums((5, 130, 0, 65), 20, 4, torch.float32, device, key_dim=8 if keyed else None)
    whole = _poisoned(p, grad)
    for b in range(len(p.lengths)):
        left = b % 3
        alone = _run(launch_sums, *_set(p, grad, b, left))
        for name, one, all_ in zip(NAMES[:3], alone, whole, strict=False):
            assert torch.equal(one[0], all_[b]), name
        rows = slice(int(p.offsets[b]), int(p.offsets[b + 1]))
        for name, one, all_ in zip(NAMES[3:6], alone[3:], whole[3:], strict=False):
            assert torch.equal(one[left:] if one.numel() else one, all_[rows] if all_.numel() else all_), name


def test_padded_and_packed_sets_give_the_same_bits_and_padding_a_gradient_of_0(device):
    lengths = [40, 0, 70, 3]
    p, grad = _sums([70] * 4, 20, 5, torch.float32, device, key_dim=8)
    inside = (torch.arange(70) < torch.tensor(lengths)[:, None]).flatten().to(device)
    rows = {n: t for n in ("values", "keys", "scale") if (t := getattr(p, n)) is not None}
    poison = {n: t.index_put((~inside,), t.new_tensor(torch.nan)) for n, t in rows.items()}
    lengths = torch.tensor(lengths, device=device)
    packed = p._replace(
        **{n: t[inside] for n, t in rows.items()},
        offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        lengths=lengths,
    )
    first = _poisoned(packed, grad)
    for other in (p._replace(**poison, lengths=lengths), p._replace(valid=inside)):
        second = _poisoned(other, grad)
        by_rows = other.valid is None  # rows that take no part stand behind the others: the same pieces
        for name, one, two in zip(NAMES, first, second, strict=True):
            if name[1:] in rows:
                assert torch.equal(one, two[inside]) or not by_rows, name
                assert two[~inside].abs().max() == 0, name
            elif name not in ("dweight", "dbias"):  # whose pieces are counted through the batch
                assert torch.equal(one, two), name
        assert all((one - two).abs().max() <= 1e-5 for one, two in zip(first[-2:], second[-2:], strict=True))


def test_rows_that_are_not_finite_take_no_part(device):
    p, grad = _sums((70, 12, 3), 20, 5, torch.float32, device, key_dim=8)
    values, keys, scale = p.values.clone(), p.keys.clone(), p.scale.clone()
    bad = [3, 68, 71, 75, 82, 83, 84]
    values[3, 19], values[68], keys[71, 2], keys[75], scale[82:84], scale[84] = (
        torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan, torch.inf
    )  # fmt: skip
    valid = torch.ones(85, dtype=torch.bool, device=device).index_fill_(0, torch.tensor(bad, device=device), False)
    expected = _run(launch_sums, p._replace(valid=valid), grad)
    got = _poisoned(p._replace(values=values, keys=keys, scale=scale), grad)
    for name, one, two in zip(NAMES, expected, got, strict=True):
        assert torch.equal(one, two), name
    assert all((t[bad] == 0).all() for t in got[3:6])
    assert (got[0][2] == 0).all()
    values = p.values.clone()
    values[5] = -torch.inf
    got = _run(launch_sums, p._replace(keys=None, scale=None, values=values, weight=p.weight.new_ones(5, 20)), grad)
    assert (got[3][5] == 0).all()
    assert all(t.isfinite().all() for t in got)


def test_strided_rows_and_frozen_values(device):
    p, grad = _sums((30, 9), 20, 4, torch.bfloat16, device)
    wide = torch.full((39, 50), torch.nan, device=device, dtype=torch.bfloat16)
    wide[:, 16:36] = p.values
    first, second = _poisoned(p, grad), _poisoned(p._replace(values=wide[:, 16:36]), grad)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    frozen = _poisoned(p, grad, wanted=False)
    assert frozen[3].numel() == 0
    assert all(torch.equal(one, two) for one, two in zip(first[4:], frozen[4:], strict=True))


def _outside(p):
    """The same call with two rows before the first set and one behind the last."""
    rows = ("values", "keys", "scale", "features", "quality", "styles")
    wide = {n: torch.cat([t[:2] * 0 + torch.nan, t, t[:1]]) for n in rows if (t := getattr(p, n, None)) is not None}
    return p._replace(**wide, offsets=p.offsets + 2)


def test_rows_of_no_set_get_a_gradient_of_0(device):
    p, grad = _sums((30, 9), 20, 4, torch.float32, device, key_dim=8)
    for name, one, two in zip(NAMES, _run(launch_sums, p, grad), _poisoned(_outside(p), grad), strict=True):
        if one.shape != two.shape:
            assert torch.equal(one, two[2:-1]), name
            assert (two[:2] == 0).all(), name
            assert (two[-1] == 0).all(), name
        else:  # but for how the pieces' weights are added
            assert (one - two).abs().max() <= 1e-6 if one.numel() else True, name
    p = _chunks((5, 4), device, depth=1, quality=True)
    grad = _arriving(p)
    first = _run_chunks(launch_chunks, p, grad)
    with poisoned():
        second = _run_chunks(launch_chunks, _outside(p), grad)
    for name, one, two in zip(CHUNK_NAMES, first, second, strict=True):
        if one.shape != two.shape:
            assert torch.equal(one, two[2:-1]), name
            assert (two[:2] == 0).all(), name
            assert (two[-1] == 0).all(), name
        elif one.numel():
            assert (one - two).abs().max() <= 1e-5 * one.abs().max(), name


def test_no_sets_no_rows_and_offsets_that_lead_out_of_the_tensor(device):
    for lengths in ((), (0, 0)):
        p, grad = _sums(lengths, 20, 4, torch.float32, device, key_dim=8)
        got = _poisoned(p, grad)
        assert all((t == 0).all() for t in got)
        assert got[0].shape == (len(lengths), 4, 20)
    p, grad = _sums((30, 9), 20, 4, torch.float32, device)
    for offsets in ([-5, 30, 100], [0, 2**40, 39], [39, 20, 0]):
        with poisoned():  # which looks at what is around the tensors
            launch_sums.sums_forward(p._replace(offsets=torch.tensor(offsets, device=device)))
            launch_sums.sums_backward(p._replace(offsets=torch.tensor(offsets, device=device)), grad, True)
            launch_sums.sums_backward(p._replace(lengths=p.lengths + 1000), grad, True)


def test_the_public_function_runs_the_kernels(device, monkeypatch):
    p, _ = _sums((12, 12), 20, 5, torch.float32, device, key_dim=8)
    tensors = [t.view(2, 12, *t.shape[1:]).requires_grad_() for t in (p.values, p.keys, p.scale)]
    values, keys, scale = tensors
    weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
    lengths, every = torch.tensor([12, 7], device=device), (values, weight, bias, keys, scale)
    ran = []
    for name in ("sums_forward", "sums_backward"):
        run = getattr(launch_sums, name)
        monkeypatch.setattr(launch_sums, name, lambda *a, run=run, name=name: ran.append(name) or run(*a))
    outcomes = []
    for backend in ("triton", "torch"):
        out = cluster_sums(*every, ghosts=1, lengths=lengths, backend=backend)
        outcomes.append((*out, *torch.autograd.grad([t.cumsum(-1).sum() for t in out], every)))
    assert ran == ["sums_forward", "sums_backward"]
    for one, two in zip(*outcomes, strict=True):
        assert (one - two).abs().max() <= 2e-6 * two.abs().max()
    p = p._replace(lengths=lengths)
    check = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fcn_kernels.cluster_sums.default, (*p, "triton"), test_utils=check)
    with pytest.raises(TypeError, match="got float64"):
        cluster_sums(values.double(), weight, bias, keys, backend="triton")
    with pytest.raises(RuntimeError, match="cluster_sums has no C"):
        cluster_sums(*(t.detach().cpu() for t in every), backend="cpp")


def _chunks(lengths, device, *, heads=1, dropped=False, dtype=torch.float32, gentle=False, **sizes):
    p = _to(chunks(lengths, dtype=torch.float32, **sizes), device=device)._replace(heads=heads)
    p = p._replace(features=p.features.to(dtype))
    if gentle:  # scores of no more than a few, whose softmax does not blow up what is rounded
        p = p._replace(qkv_weight=p.qkv_weight / 5)
    if dropped:
        keep = torch.rand(p.depth, 2, len(lengths), generator=torch.Generator().manual_seed(0)) > 0.4
        p = p._replace(residual=(keep * 1.4).to(device))
    return p


def _arriving(p):
    generator = torch.Generator().manual_seed(1)
    sizes = p.features.shape[1:], p.tokens.shape[1:], ()
    return Summed(
        *(torch.randn(len(p.lengths), len(p.tokens), *s, generator=generator).to(p.features.device) for s in sizes)
    )


def _run_chunks(backend, p, grad, wanted=True):
    """What comes of chunks, and the gradients."""
    out = backend.chunks_forward(p, True)
    return *out[:5], *backend.chunks_backward(p, grad, out, wanted)


def _eager_chunks(p, grad):
    """Plain operations in float32, chunk by chunk, by autograd."""
    p = with_gradients(p)
    each = [plain_chunk(p, b) for b in range(len(p.lengths))]
    out = [torch.stack(parts) for parts in list(zip(*each, strict=True))[:3]]
    names = leaves(p)
    found = torch.autograd.grad(out, [getattr(p, n) for n in names], grad, materialize_grads=True)
    grads = dict(zip(names, found, strict=True))
    shares = torch.cat([e[3] for e in each])
    return *out, shares, p.lengths, *(grads.get(n, p.tokens.new_zeros(0)) for n in ChunksGradients._fields)


CHUNK_NAMES = ("sums", "key_sums", "masses", "shares", "counts", *(f"d{name}" for name in ChunksGradients._fields))


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((1, 0, 20), {"depth": 1, "centers": 4, "heads": 2, "width": 33, "dtype": torch.bfloat16}),
        ((60,), {"depth": 2, "centers": 5, "quality": True, "dropped": True}),  # three tiles, the last with one token
        ((16, 3), {"depth": 1, "centers": 1, "norm_dim": 16, "dropped": True}),  # no styles
        ((61, 300), {"depth": 0, "centers": 16, "width": 513, "dtype": torch.float16}),
        ((5,), {"depth": 3, "centers": 2, "dim": 24, "heads": 1}),  # sizes that fill no block
        ((17, 70), {"depth": 1, "centers": 2, "dim": 128, "norm_dim": 64, "gentle": True}),  # a wide head
    ],
)
def test_chunks_error_is_within_twice_eagers(lengths, options, device):
    p = _chunks(lengths, device, **options)
    grad = _arriving(p)
    exact = _run_chunks(torch_backend, _to(p, torch.float64), _to(grad, torch.float64))
    half = p.features.dtype == torch.bfloat16  # products are bfloat16's, as under autocast
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        eager = _eager_chunks(p._replace(features=p.features.float()), grad)
    with poisoned():
        ours = _run_chunks(launch_chunks, p, grad)
    slack = {"dfeatures": 2 * SLACK[p.features.dtype]}  # rounded once; the interpreter cuts bfloat16 off
    for name, truth, theirs, got in zip(CHUNK_NAMES, exact, eager, ours, strict=True):
        assert got.shape == truth.shape, name
        if not truth.numel():
            continue
        loss, allowed = (got - truth).abs().max(), (2 + 2 * half) * (theirs - truth).abs().max()
        assert loss <= allowed + slack.get(name, 5e-6) * truth.abs().max(), f"{name}: {loss:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_multiply_by_tensor_cores_what_is_not_float32(dtype, device, monkeypatch):
    """In the forward and the backward pass, of short and of long chunks."""
    seen = set()
    names = {"attend", "attend_queries", "attend_keys", "linear", "linear_weights", "blocks_of_small_chunks"}
    for name in names:
        kernel = getattr(launch_chunks, name)

        class Watched:
            def __getitem__(self, grid, kernel=kernel, name=name):
                def launch(**arguments):
                    how = arguments.get("HOW", arguments.get("BUILD"))
                    table = name == "linear_weights" and arguments["F"] == CODES
                    seen.add((name, "table" if table else how.OPERAND.value, how.PRECISION.value))
                    return kernel[grid](**arguments)

                return launch

        monkeypatch.setattr(launch_chunks, name, Watched())
    p = _chunks((3, 70), device, depth=1, heads=2, dtype=dtype)
    _run_chunks(launch_chunks, p, _arriving(p))
    expected = {torch.bfloat16: (tl.bfloat16, "ieee"), torch.float16: (tl.float32, "tf32")}
    assert {name for name, *_ in seen} == names
    wanted = expected.get(dtype, (tl.float32, "ieee"))
    assert all((kind, precision) == wanted for _, kind, precision in seen if kind != "table")


def test_a_chunk_gives_the_same_bits_alone_in_a_batch_packed_and_padded(device):
    p = _chunks((20, 3, 0, 70), device, depth=1, centers=3)
    with poisoned():
        whole = launch_chunks.chunks_forward(p, False)
    assert whole.hidden.numel() == 0
    for b, n in enumerate(p.lengths.tolist()):
        rows = slice(int(p.offsets[b]), int(p.offsets[b + 1]))
        alone = launch_chunks.chunks_forward(
            p._replace(
                features=p.features[rows],
                styles=p.styles[rows],
                offsets=p.offsets.new_tensor([0, n]),
                lengths=p.lengths[b : b + 1],
                longest=n,
            ),
            False,
        )
        assert all(torch.equal(one[0], all_[b]) for one, all_ in zip(alone[:3], whole[:3], strict=True)), b
        assert torch.equal(alone.shares, whole.shares[rows])
    lengths = [3, 0, 36]
    p = _chunks((40, 40, 40), device, depth=1, centers=3)
    inside = (torch.arange(40) < torch.tensor(lengths)[:, None]).flatten().to(device)
    packed = p._replace(
        features=p.features[inside],
        styles=p.styles[inside],
        offsets=torch.tensor([0, *lengths], device=device).cumsum(0),
        lengths=torch.tensor(lengths, device=device),
    )
    first = launch_chunks.chunks_forward(packed, False)
    with poisoned():
        second = launch_chunks.chunks_forward(p._replace(lengths=packed.lengths), False)
    assert all(torch.equal(one, two) for one, two in zip(first[:3], second[:3], strict=True))
    assert torch.equal(first.shares, second.shares[inside])
    assert (second.shares[~inside] == 0).all()


def _launched(monkeypatch):
    """The names of kernels, in the order in which they are launched from now on."""
    names, kind = [], type(launch_chunks.attend)
    for module in (launch_chunks, launch_sums):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, kind):

                class Watched:
                    def __getitem__(self, grid, kernel=kernel, name=name):
                        names.append(name)
                        return kernel[grid]

                monkeypatch.setattr(module, name, Watched())
    return names


def test_small_chunks_take_one_launch_each_way_and_give_the_same_bits_beside_long_ones(device, monkeypatch):
    p = _chunks((12, 5), device, depth=2, centers=3, heads=2, quality=True)
    grad, names = _arriving(p), _launched(monkeypatch)
    out = launch_chunks.chunks_forward(p, True)
    assert names == ["blocks_of_small_chunks"]
    names.clear()
    found = launch_chunks.chunks_backward(p, grad, out, True)
    assert [n for n in names if n != "linear_weights"] == [
        "embed", "layer_norm", "share_backward", "layer_norm_backward", "blocks_of_small_chunks_backward"
    ]  # fmt: skip
    assert names.count("linear_weights") == 4 * 2 + 1  # of each layer, and of the table
    both = _chunks((12, 5, 66), device, depth=2, centers=3, heads=2, quality=True)
    both = both._replace(
        **{n: torch.cat([getattr(p, n), getattr(both, n)[17:]]) for n in ("features", "styles", "quality")}
    )
    names.clear()
    more = Summed(*(torch.cat([g, g[:1]]) for g in grad))
    beside = launch_chunks.chunks_backward(both, more, launch_chunks.chunks_forward(both, True), True)
    assert {"blocks_of_small_chunks_backward", "attend_queries", "linear"} <= set(names)
    for name in ("features", "styles", "quality"):
        assert torch.equal(getattr(found, name), getattr(beside, name)[:17]), name


@pytest.mark.parametrize("quality", [False, True])
def test_rows_of_chunks_that_are_not_finite_take_no_part(quality, device):
    p = _chunks((5, 4, 2), device, depth=0 if quality else 1, quality=quality)
    bad = torch.tensor([1, 5, 8, 9, 10], device=device)
    valid = torch.ones(11, dtype=torch.bool, device=device).index_fill_(0, bad, False)
    features, styles, norms, grad = p.features.clone(), p.styles.clone(), p.quality, _arriving(p)
    features[1, 2], features[9], styles[5, 1], styles[8] = torch.nan, torch.inf, torch.nan, -torch.inf
    if quality:
        norms = norms.index_put((bad[-1],), norms.new_tensor(-1.0))
    else:
        features[10] = torch.nan
    expected = _run_chunks(launch_chunks, p._replace(valid=valid), grad)
    with poisoned():
        got = _run_chunks(launch_chunks, p._replace(features=features, styles=styles, quality=norms), grad)
    for name, one, two in zip(CHUNK_NAMES, expected, got, strict=True):
        assert torch.equal(one, two), name
    out = dict(zip(CHUNK_NAMES, got, strict=True))
    assert out["counts"].tolist() == [4, 2, 0]
    assert (out["sums"][2] == 0).all()
    for name in ("shares", "dfeatures", "dstyles"):
        assert (out[name][bad] == 0).all(), name


def _embedded(p):
    tokens = launch_chunks._tokens(p)
    launch_chunks._embed(p, tokens, None)
    return tokens


def test_codes_and_norms_are_the_same_on_every_backend(device):
    edges = norm_edges(torch.tensor(22.0), torch.tensor(40.0), torch.float32)
    norms = torch.cat([edges, torch.nextafter(edges, edges.new_tensor(-torch.inf)), torch.tensor([0.0, 1e30])])
    p = _chunks((len(norms),), device, quality=True, depth=0, width=3)
    p = p._replace(edges=edges.to(device), quality=norms.to(device))
    assert _embedded(p).codes.tolist() == norm_codes(norms, edges).tolist()
    size = torch.tensor([1e-42, 1e-30, 1e-19, 1.0, 1e19, 1e30, 3e38], device=device)
    features = torch.tensor([[3.0, 4.0, 0.0]], device=device) * (size / 4)[:, None]
    tokens = _embedded(_chunks((7,), device, depth=0, width=3)._replace(features=features))
    norms = row_norms(features)[:6]
    assert ((tokens.norms[:6] - norms).abs() <= 2e-7 * norms + 3e-45).all()  # steps of numbers below the normal ones
    assert tokens.usable.tolist() == [True] * 6 + [False]  # whose norm is beyond float32


def test_the_operator_over_chunks_runs_the_kernels_and_padding_gets_a_gradient_of_0(device, monkeypatch):
    p = with_gradients(_chunks((9, 9), device, depth=1)._replace(lengths=torch.tensor([9, 4], device=device)))
    ran = []
    for name in ("chunks_forward", "chunks_backward"):
        run = getattr(launch_chunks, name)
        monkeypatch.setattr(launch_chunks, name, lambda *a, run=run, name=name: ran.append(name) or run(*a))
    inputs = [getattr(p, name) for name in leaves(p)]
    outcomes = []
    for backend in ("triton", "torch"):
        out = op.cluster_chunks(p, backend)
        outcomes.append((*out[:5], *torch.autograd.grad([t.cumsum(-1).sum() for t in out[:3]], inputs)))
    assert ran == ["chunks_forward", "chunks_backward"]
    for one, two in zip(*outcomes, strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max().clamp(min=1)
    assert (outcomes[0][3][13:] == 0).all()
    assert (outcomes[0][5][13:] == 0).all()
    # without gradients of the features, and where there is nothing
    frozen = p._replace(features=p.features.detach())
    assert (
        launch_chunks.chunks_backward(frozen, _arriving(p), launch_chunks.chunks_forward(frozen, True), False)[
            0
        ].numel()
        == 0
    )
    for lengths in ((), (0, 0)):
        p = _chunks(lengths, device, depth=1)
        assert all((t == 0).all() for t in _run_chunks(launch_chunks, p, _arriving(p)))
