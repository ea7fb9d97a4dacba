"""Aligned scores and their modules: against float64 vectors, by inner products, with a bank and what replaces one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_alignment_reference import problem
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels import (
    ContextNet,
    DiscrepancyAlignment,
    HypersphereSampler,
    align_scores,
    context_statistics,
    search_rows,
)
from fcn_kernels.evaluation.verification import roc
from fcn_kernels.heads.adaface import AdaFace
from fcn_kernels.neighbors.context import Context
from fcn_kernels.neighbors.scores import affine, unit_rows

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def pick(context: Context, rows: Tensor) -> Context:
    return Context(*(t if t is None else t[rows] for t in context))


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "short", "cap"])
def test_vectors(name: str) -> None:
    """CSLS, Z-, T-, AS- and S-norm by plain NumPy, where sigma is not 0."""
    p = problem(name)
    ids = {"ids": p["row_ids"], "bank_ids": p["bank_ids"]} if "row_ids" in p else {}
    k, cap = (None if p["k"] < 0 else int(p["k"])), (None if p["cap"].isnan() else float(p["cap"]))
    context = context_statistics(p["x"], p["bank"], k, min_cosine=cap, **ids)
    whole = context_statistics(p["x"], p["bank"], None, min_cosine=-1, **ids)
    a, b = p["pairs"].T
    raw = p["score_raw"]

    def close(expected: str, found: Tensor, among: Tensor | slice = slice(None)) -> None:
        torch.testing.assert_close(found[among], p[expected][among], rtol=1e-10, atol=1e-10)

    first, second = pick(context, a), pick(context, b)
    close("score_mean", align_scores(raw, first, second))
    close("score_csls", 2 * align_scores(raw, first, second))
    plain = (context.counts >= 2) & (context.std > 1e-6)
    apart = (whole.counts >= 2) & (whole.std > 1e-6)
    assert (plain[a] & plain[b]).any()
    assert (apart[a] & apart[b]).any()
    close("score_as_norm", align_scores(raw, first, second, "mean-std"), plain[a] & plain[b])
    close("score_z", align_scores(raw, first, second, "mean-std", sides="first"), plain[a])
    close("score_t", align_scores(raw, first, second, "mean-std", sides="second"), plain[b])
    close("score_s_norm", align_scores(raw, pick(whole, a), pick(whole, b), "mean-std"), apart[a] & apart[b])


@pytest.mark.parametrize("method", ["mean", "mean-std"])
@pytest.mark.parametrize("sides", ["both", "first", "second"])
def test_a_matrix_is_the_pairs_one_by_one(method: str, sides: str) -> None:
    q, g, bank = draw(4, 6), draw(5, 6, seed=1), draw(30, 6, seed=2)
    first, second = (context_statistics(t, bank, 7) for t in (q, g))
    cosines = unit_rows(q) @ unit_rows(g).T
    whole = align_scores(cosines, first, second, method, sides=sides)
    i, j = torch.cartesian_prod(torch.arange(4), torch.arange(5)).T
    pairs = align_scores(cosines[i, j], pick(first, i), pick(second, j), method, sides=sides)
    assert torch.equal(whole.flatten(), pairs)
    assert align_scores(cosines[1, 2], pick(first, 1), pick(second, 2), method, sides=sides) == whole[1, 2]


def test_rows_without_a_context() -> None:
    """No neighbor: "mean" leaves a score as it is, "mean-std" gives a finite one far below the others."""
    score = torch.tensor([0.6])
    none = Context(torch.zeros(1), torch.zeros(1), torch.tensor([0]), None)
    usual = Context(torch.tensor([0.2]), torch.tensor([0.01]), torch.tensor([50]), None)
    assert torch.equal(align_scores(score, none, none), score)
    assert align_scores(score, usual, none).item() == pytest.approx(0.5)
    assert align_scores(score, usual, none, strength=0.5).item() == pytest.approx(0.55)
    assert align_scores(score, usual, usual, "mean-std").item() == pytest.approx(40)
    assert align_scores(score, none, none, "mean-std").item() == pytest.approx(0.6)
    flat = usual._replace(std=torch.zeros(1))
    assert align_scores(score, flat, flat, "mean-std", eps=0.1).item() == pytest.approx(4)


@pytest.mark.parametrize("method", ["mean", "mean-std"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_search_rows_rank_by_aligned_scores(method: str, dtype: torch.dtype) -> None:
    q, g, bank = (draw(n, 12, seed=n, dtype=dtype) for n in (8, 90, 200))
    bank[:40] = 4 * bank[:1] + bank[:40]  # some places are crowded
    first, second = (context_statistics(t, bank, 20) for t in (q, g))
    queries, gallery = search_rows(q, first, method), search_rows(g, second, method, "gallery")
    assert queries.shape == (8, 13 if method == "mean" else 25)
    found = queries @ gallery.T
    expected = align_scores(unit_rows(q) @ unit_rows(g).T, first, second, method)
    torch.testing.assert_close(found - affine(first, method).offset[:, None], expected)
    if dtype == F64:
        assert found.argsort(1, descending=True).equal(expected.argsort(1, descending=True))
        assert not expected.argsort(1).equal((unit_rows(q) @ unit_rows(g).T).argsort(1))
    assert torch.equal(search_rows(q[3], pick(first, 3), method), queries[3])


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "method": (ValueError, 'method "mean" or "mean-std", got \'csls\'', {"method": "csls"}),
    "strength": (ValueError, r"strength in \[0, 1\], got 1.5", {"strength": 1.5}),
    "ignored": (ValueError, 'with method "mean" alone', {"method": "mean-std", "strength": 0.5}),
    "strength's type": (TypeError, "strength to be a number", {"strength": "1"}),
    "sides": (ValueError, 'sides "both"', {"sides": "left"}),
    "eps": (ValueError, "eps to be finite and above 0, got 0", {"eps": 0}),
    "scores": (TypeError, "floating-point Tensor, got torch.int64", {"scores": torch.arange(3)}),
    "rank": (ValueError, r"shape \(P,\) or \(Q, G\)", {"scores": torch.zeros(1, 3, 3)}),
    "first": (ValueError, r"first to be a context of shape \(4,\)", {"scores": torch.zeros(4)}),
    "no context": (TypeError, "first to be a Context, got NoneType", {"first": None}),
    "other tuple": (TypeError, "second to be a Context, got tuple", {"second": (torch.zeros(3), torch.ones(3))}),
    "second": (ValueError, r"second to be a context of shape \(2,\)", {"scores": torch.zeros(3, 2)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_calls_say_what_was_expected(name: str) -> None:
    error, message, options = WRONG[name]
    context = Context(torch.zeros(3), torch.ones(3), torch.full((3,), 9), None)
    call = {"scores": torch.zeros(3), "first": context, "second": context} | options
    with pytest.raises(error, match=message):
        align_scores(**call)


def test_bad_rows_to_search_by_say_what_was_expected() -> None:
    context = Context(torch.zeros(3), torch.ones(3), torch.full((3,), 9), None)
    with pytest.raises(TypeError, match="expected x to be a Tensor, got NoneType"):
        search_rows(None, context)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected context to be a Context, got Tensor"):
        search_rows(torch.zeros(3, 2), torch.zeros(3))  # type: ignore[arg-type]


# --- with a bank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mean", "mean-std"])
def test_the_module_is_the_functions(method: str) -> None:
    bank, bank_ids = draw(40, 8), torch.arange(40) // 4
    align = DiscrepancyAlignment(bank, bank_ids, k=6, method=method)
    a, b = draw(5, 8, seed=1), draw(5, 8, seed=2)
    a_ids, b_ids = torch.arange(5), torch.arange(5) + 3
    sides = (context_statistics(t, bank, 6, ids=ids, bank_ids=bank_ids) for t, ids in ((a, a_ids), (b, b_ids)))
    expected = align_scores(F.cosine_similarity(a, b), *sides, method)
    torch.testing.assert_close(align(a, b, a_ids, b_ids), expected)
    torch.testing.assert_close(align.matrix(a, b, a_ids, b_ids).diagonal(), expected)
    assert not torch.allclose(align(a, b), expected)  # their own identities are in the bank
    assert align(a, a)[0] > align(a, b).min()


@pytest.mark.parametrize("method", ["mean", "mean-std"])
def test_autocast_leaves_scores_exact(method: str) -> None:
    align = DiscrepancyAlignment(draw(40, 8, dtype=torch.float32), k=6, method=method)
    q, g = draw(5, 8, seed=1, dtype=torch.float32), draw(7, 8, seed=2, dtype=torch.float32)
    plain = align.matrix(q, g), align(q, g[:5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(align.matrix(q, g), plain[0])
        assert torch.equal(align(q, g[:5]), plain[1])


def test_rows_of_two_dtypes_are_scored_in_the_finer() -> None:
    align = DiscrepancyAlignment(draw(40, 8), k=6)
    q, g = draw(5, 8, seed=1), draw(5, 8, seed=2, dtype=torch.float32)
    for one, other in ((q, g), (g, q)):
        found = align.matrix(one, other)
        assert found.dtype == F64
        torch.testing.assert_close(found, align.matrix(one.double(), other.double()))
        torch.testing.assert_close(found.diagonal(), align(one, other))


@pytest.mark.parametrize("method", ["mean", "mean-std"])
def test_gradcheck(method: str) -> None:
    align = DiscrepancyAlignment(draw(15, 3), k=4, method=method)
    a, b = draw(3, 3, seed=1).requires_grad_(), draw(3, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(align, (a, b))


def test_unusable_rows_score_0_and_get_no_gradient() -> None:
    align = DiscrepancyAlignment(draw(60, 4, dtype=torch.float32), k=5)
    a = draw(3, 4, seed=1, dtype=torch.float32)
    a[1], a[2, 0] = 0, torch.nan
    a.requires_grad_()
    scores = align(a, torch.ones(3, 4))
    (scores * torch.arange(3)).sum().backward()
    assert scores.isfinite().all()
    assert torch.equal(a.grad[1:], torch.zeros(2, 4))


def test_state_travels() -> None:
    align = DiscrepancyAlignment(draw(20, 4), torch.arange(20), k=3, method="mean-std")
    other = DiscrepancyAlignment(
        torch.zeros(20, 4, dtype=F64), torch.zeros(20, dtype=torch.int64), k=3, method="mean-std"
    )
    other.load_state_dict(align.state_dict())
    a, b = draw(2, 4, seed=1), draw(2, 4, seed=2)
    for twin in (other, copy.deepcopy(align), pickle.loads(pickle.dumps(align))):
        assert torch.equal(twin(a, b), align(a, b))
    assert align.float()(a.float(), b.float()).dtype == torch.float32


def test_class_centers_as_a_bank() -> None:
    """Labels leave out the row's own center, to which it is nearest."""
    head = AdaFace(dim=16, classes=30)
    align = DiscrepancyAlignment.from_prototypes(head.weight, k=5)
    rows = head.weight.detach()[:4] + 0.1
    assert align.context(rows).indices[:, 0].tolist() == [0, 1, 2, 3]
    assert not (align.context(rows, torch.arange(4)).indices == torch.arange(4)[:, None]).any()
    assert not align.bank.requires_grad


BAD_MODULES: dict[str, tuple[type[Exception], str, Any]] = {
    "nothing": (ValueError, "a bank or an estimator, got neither", lambda: DiscrepancyAlignment()),
    "both": (ValueError, "got both", lambda: DiscrepancyAlignment(draw(3, 2), estimator=ContextNet(2))),
    "ids": (
        ValueError,
        "with a bank alone",
        lambda: DiscrepancyAlignment(None, torch.arange(3), estimator=ContextNet(2)),
    ),
    "k": (ValueError, "k of at least 2", lambda: DiscrepancyAlignment(draw(3, 2), k=1, method="mean-std")),
    "no limit": (ValueError, "got None for both", lambda: DiscrepancyAlignment(draw(3, 2), k=None)),
    "rank": (ValueError, r"bank of shape \(M, C\)", lambda: DiscrepancyAlignment(draw(3))),
    "ids' shape": (ValueError, r"bank_ids of shape \(3,\)", lambda: DiscrepancyAlignment(draw(3, 2), torch.arange(4))),
    "generator": (
        ValueError,
        r"sample\(9\) to be",
        lambda: DiscrepancyAlignment.from_generator(lambda n: draw(3, 2), 9),
    ),
    "columns": (ValueError, r"\(N, 4\) or \(4,\), got \(3, 5\)", lambda: ContextNet(4)(draw(3, 5))),
    "estimator's ids": (
        ValueError,
        "expected no ids",
        lambda: DiscrepancyAlignment(estimator=ContextNet(2)).context(draw(3, 2), torch.arange(3)),
    ),
    "one row": (
        ValueError,
        r"rows \(Q, C\) and \(G, C\), got \(2,\) and \(3, 2\)",
        lambda: DiscrepancyAlignment(draw(9, 2)).matrix(draw(2), draw(3, 2)),
    ),
    "one row to learn": (
        ValueError,
        r"rows \(N, C\), got \(2,\)",
        lambda: DiscrepancyAlignment(draw(9, 2)).distil(draw(2)),
    ),
    "pairs": (
        ValueError,
        "as many rows on both sides",
        lambda: DiscrepancyAlignment(draw(9, 2))(draw(3, 2), draw(2, 2)),
    ),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_bad_modules_say_what_was_expected(name: str) -> None:
    error, message, call = BAD_MODULES[name]
    with pytest.raises(error, match=message):
        call()


# --- in the bank's place ---------------------------------------------------------------------------------------------


def test_a_network_learns_the_contexts_of_64_rows() -> None:
    torch.manual_seed(0)
    x, bank = draw(64, 24, dtype=torch.float32), draw(500, 24, seed=1, dtype=torch.float32)
    context = context_statistics(x, bank, 20)
    net = ContextNet(24, dropout=0)
    assert net.fit(x, context, steps=150, lr=2e-2, weight_decay=0) < 0.01
    found = net(x)
    assert (found.mean - context.mean).std() < 0.2 * context.mean.std()
    assert (found.std - context.std).std() < 0.2 * context.std.std()
    assert found.counts.tolist() == [20] * 64
    assert not net.training
    x[3] = torch.nan
    assert (net(x).counts[3], net(x).mean[3]) == (0, 0)


def test_distil_leaves_the_bank_behind() -> None:
    torch.manual_seed(0)
    bank, bank_ids = draw(300, 16, dtype=torch.float32), torch.arange(300)
    align = DiscrepancyAlignment(bank, bank_ids, k=20)
    small = align.distil(bank, bank_ids, hidden=32, steps=200)
    assert small.bank is None
    assert "bank" not in small.state_dict()
    a, b = draw(6, 16, seed=1, dtype=torch.float32), draw(6, 16, seed=2, dtype=torch.float32)
    assert (small(a, b) - align(a, b)).abs().max() < 0.1
    twin = DiscrepancyAlignment(k=20, estimator=ContextNet(16, 32)).eval()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(a, b), small(a, b))


def test_the_sampler_draws_rows_like_those_it_saw() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([3.0, 1.0, 1.0, 0.1, 0.1, 0.1])
    people = torch.randn(400, 6, generator=generator) * spread + torch.tensor([0, 0, 2.0, 0, 0, 0])
    ids = torch.arange(400).repeat_interleave(5)
    rows = F.normalize(people[ids] + 0.2 * torch.randn(2000, 6, generator=generator), dim=1)
    drawn = HypersphereSampler.fit(rows, ids)(4000, generator)
    assert torch.allclose(drawn.norm(dim=1), torch.ones(4000))
    seen, made = rows.T.cov(), drawn.T.cov()
    assert (seen - made).norm() < 0.25 * seen.norm()
    assert (rows.mean(0) - drawn.mean(0)).norm() < 0.1


@pytest.mark.parametrize(("people", "each"), [(2, 1), (3, 4), (40, 1)])
def test_the_sampler_draws_from_few_rows(people: int, each: int) -> None:
    """Fewer than columns: shrunk, the covariance has full rank."""
    rows, ids = draw(people * each, 24, dtype=torch.float32), torch.arange(people).repeat_interleave(each)
    rows = torch.cat([rows, torch.full((1, 24), torch.nan)])
    sampler = HypersphereSampler.fit(rows, torch.cat([ids, torch.tensor([7])]))
    drawn = sampler(100, torch.Generator().manual_seed(1))
    assert torch.linalg.matrix_rank(drawn) == 24
    twin = HypersphereSampler(*(torch.zeros_like(t) for t in sampler.buffers()))
    twin.load_state_dict(sampler.state_dict())
    assert torch.equal(twin(100, torch.Generator().manual_seed(1)), drawn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(twin(100, torch.Generator().manual_seed(1)), drawn)
    align = DiscrepancyAlignment.from_generator(sampler, 200)
    assert align.bank.shape == (200, 24)


def test_the_sampler_wants_two_identities() -> None:
    with pytest.raises(ValueError, match="at least two identities, got 1"):
        HypersphereSampler.fit(draw(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(N, C\), got \(3,\)"):
        HypersphereSampler.fit(draw(3), torch.arange(3))


def test_it_helps_where_pictures_share_a_fault() -> None:
    """A direction, not a promise (docs/alignment.md has real ones): what many pictures have in common, blur for one,
    makes strangers alike, and their nearest strangers tell."""
    generator = torch.Generator().manual_seed(0)

    def pictures(people: Tensor) -> Tensor:
        fault = 8 * torch.rand(len(people), 1, generator=generator)
        return people + fault * torch.eye(32)[0] + 0.5 * torch.randn(len(people), 32, generator=generator)

    people = torch.randn(600, 32, generator=generator)
    bank, x, y = pictures(people[:300]), pictures(people[300:]), pictures(people[300:])
    align, same = DiscrepancyAlignment(bank, k=50), torch.eye(300, dtype=torch.bool).flatten()
    raw, aligned = unit_rows(x) @ unit_rows(y).T, align.matrix(x, y)
    before, after = (roc(scores.flatten(), same).tar_at([1e-3])[0] for scores in (raw, aligned))
    assert after > before + 0.05
