"""Bad input: what is raised, and that it says what was expected and what came."""

import math

import pytest
import torch

from fcn_kernels import CoresetSelect, coreset_select
from fcn_kernels.backends import resolve_backend

X = torch.randn(2, 6, 4)
ROWS = torch.randn(9, 4)
Q = torch.ones(2, 6)

WRONG = {
    "not a tensor": (TypeError, "features to be a Tensor, got list", [[1.0]], 1, {}),
    "rank": (ValueError, r"\(B, N, C\) or \(N, C\), got \(2, 6, 4, 1\)", X[..., None], 1, {}),
    "integers": (TypeError, "float32, bfloat16, float16 or float64, got torch.int64", X.long(), 1, {}),
    "no columns": (ValueError, r"at least one column, got shape \(2, 6, 0\)", X[..., :0], 1, {}),
    "k of 0": (ValueError, "k to be an integer of at least 1, got 0", X, 0, {}),
    "k a float": (TypeError, "k to be an integer of at least 1, got 2.0 of type float", X, 2.0, {}),
    "k a bool": (TypeError, "k to be an integer", X, True, {}),
    "tau of 0": (ValueError, "tau to be finite and above 0, got 0", X, 1, {"tau": 0}),
    "tau negative": (ValueError, "tau to be finite and above 0, got -1.0", X, 1, {"tau": -1.0}),
    "tau nan": (ValueError, "tau to be finite and above 0, got nan", X, 1, {"tau": math.nan}),
    "tau inf": (ValueError, "tau to be finite and above 0, got inf", X, 1, {"tau": math.inf}),
    "tau a string": (TypeError, "tau to be finite and above 0, got 'x' of type str", X, 1, {"tau": "x"}),
    "scale": (ValueError, "distance_scale to be finite and above 0, got 0", X, 1, {"distance_scale": 0}),
    "quality's shape": (ValueError, r"quality of shape \(2, 6\) .*, got \(2, 5\)", X, 1, {"quality": Q[:, :5]}),
    "quality's dtype": (TypeError, "quality of dtype float32.*, got torch.int64", X, 1, {"quality": Q.long()}),
    "quality a list": (TypeError, "quality to be a Tensor, got list", X, 1, {"quality": [1.0]}),
    "quality's device": (ValueError, "features' device cpu, got meta", X, 1, {"quality": Q.to("meta")}),
    "gamma's shape": (ValueError, r"0-d tensor, got shape \(1,\)", X, 1, {"gamma": torch.ones(1)}),
    "gamma's dtype": (TypeError, "floating-point tensor, got torch.int64", X, 1, {"gamma": torch.tensor(1)}),
    "gamma's device": (
        ValueError,
        "gamma on cpu or the CPU, got meta",
        X,
        1,
        {"gamma": torch.zeros((), device="meta")},
    ),
    "gamma nan": (ValueError, "gamma to be a finite number or a 0-d tensor, got nan", X, 1, {"gamma": math.nan}),
    "gamma a string": (TypeError, "gamma to be a finite number or a 0-d tensor", X, 1, {"gamma": "1"}),
    "noise's shape": (
        ValueError,
        r"noise of shape \(3, 2, 6\) .*, got \(2, 2, 6\)",
        X,
        3,
        {"noise": torch.ones(2, 2, 6)},
    ),
    "noise's dtype": (
        TypeError,
        "noise of dtype float32.*, got torch.int64",
        X,
        1,
        {"noise": torch.ones(1, 2, 6).long()},
    ),
    "noise and generator": (
        ValueError,
        "noise or generator, got both",
        X,
        1,
        {"noise": torch.ones(1, 2, 6), "generator": torch.Generator()},
    ),
    "mask's shape": (ValueError, r"mask of shape \(2, 6\) .*, got \(6,\)", X, 1, {"mask": torch.ones(6).bool()}),
    "mask's dtype": (TypeError, "mask of dtype bool, .*, got torch.float32", X, 1, {"mask": Q}),
    "two of three": (
        ValueError,
        "at most one of mask, lengths and cu_seqlens, got mask and lengths",
        X,
        1,
        {"mask": Q.bool(), "lengths": torch.tensor([1, 2])},
    ),
    "lengths' shape": (ValueError, r"lengths of shape \(2,\) .*, got \(3,\)", X, 1, {"lengths": torch.ones(3).long()}),
    "lengths' dtype": (TypeError, "lengths of dtype int32, int64, got torch.float32", X, 1, {"lengths": torch.ones(2)}),
    "lengths too long": (ValueError, r"lengths in \[0, 6\], got 7 for set 1", X, 1, {"lengths": torch.tensor([1, 7])}),
    "lengths negative": (
        ValueError,
        r"lengths in \[0, 6\], got -1 for set 0",
        X,
        1,
        {"lengths": torch.tensor([-1, 2])},
    ),
    "packed rank": (
        ValueError,
        r"packed features \(T, C\) .* shape \(2, 6, 4\)",
        X,
        1,
        {"cu_seqlens": torch.tensor([0, 6])},
    ),
    "offsets' rank": (ValueError, r"shape \(B \+ 1,\), got \(1, 2\)", ROWS, 1, {"cu_seqlens": torch.tensor([[0, 9]])}),
    "offsets' type": (TypeError, r"shape \(B \+ 1,\), got list", ROWS, 1, {"cu_seqlens": [0, 9]}),
    "offsets' dtype": (TypeError, "int32, int64, got torch.float32", ROWS, 1, {"cu_seqlens": torch.tensor([0.0, 9.0])}),
    "offsets' end": (ValueError, "from 0 to T = 9, got 0 to 8", ROWS, 1, {"cu_seqlens": torch.tensor([0, 8])}),
    "offsets' start": (ValueError, "from 0 to T = 9, got 1 to 9", ROWS, 1, {"cu_seqlens": torch.tensor([1, 9])}),
    "offsets fall": (
        ValueError,
        "not to decrease, got 5 then 3 at set 1",
        ROWS,
        1,
        {"cu_seqlens": torch.tensor([0, 5, 3, 9])},
    ),
    "start beyond": (ValueError, r"start in \[0, 6\), got 6", X, 1, {"start": 6}),
    "start negative": (ValueError, r"start in \[0, 6\), got -1", X, 1, {"start": -1}),
    "start of a set": (ValueError, r"start of set 1 in \[0, 6\), got 9", X, 1, {"start": torch.tensor([0, 9])}),
    "start in padding": (
        ValueError,
        r"start of set 0 in \[0, 2\), got 3",
        X,
        1,
        {"start": 3, "lengths": torch.tensor([2, 6])},
    ),
    "start's shape": (ValueError, r"start of shape \(2,\) .*, got \(3,\)", X, 1, {"start": torch.zeros(3).long()}),
    "start's dtype": (TypeError, "start of dtype int32, int64, got torch.float32", X, 1, {"start": torch.zeros(2)}),
    "start a float": (TypeError, "start to be an int or a Tensor of integers, got float", X, 1, {"start": 1.0}),
    "backend": (ValueError, 'backend "triton", "cpp", "torch" or None, got \'cuda\'', X, 1, {"backend": "cuda"}),
    "triton in float64": (
        TypeError,
        "float16 features for backend=.*got float64",
        X.double(),
        1,
        {"backend": "triton"},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused(name):
    kind, message, features, k, options = WRONG[name]
    with pytest.raises(kind, match=f"expected.*{message}"):
        coreset_select(features, k, **options)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr("fcn_kernels.backends.INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"expected features on a CUDA device.*got cpu"):
        resolve_backend("triton", X, lambda _: "")
    monkeypatch.setattr("fcn_kernels.backends.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="expected triton to be installed"):
        resolve_backend("triton", X, lambda _: "")


def test_too_many_columns_for_a_kernel():
    with pytest.raises(ValueError, match=r"at most 4096 columns.*got 4097"):
        coreset_select(torch.ones(1, 2, 4097), 1, backend="triton")


BROKEN = {
    "features not finite": (1, 3, "its features are not finite", lambda x, q: x[1, 3].fill_(torch.inf)),
    "a zero row": (0, 2, "its features are all zero", lambda x, q: x[0, 2].zero_()),
    "quality nan": (0, 4, "its quality is nan, expected finite and above 0", lambda x, q: q[0, 4].fill_(torch.nan)),
    "quality 0": (1, 0, "its quality is 0, expected finite and above 0", lambda x, q: q[1, 0].zero_()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_strict_names_set_and_row(name):
    b, n, reason, spoil = BROKEN[name]
    features, quality = X.clone(), Q.clone()
    spoil(features, quality)
    with pytest.raises(ValueError, match=f"row {n} of set {b} cannot be picked: {reason}"):
        coreset_select(features, 2, quality, strict=True)
    packed = {"cu_seqlens": torch.tensor([0, 6, 12])}
    with pytest.raises(ValueError, match=f"row {n} of set {b} cannot be picked: {reason}"):
        coreset_select(features.flatten(0, 1), 2, quality.flatten(), strict=True, **packed)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[b, n] = False  # a row that takes no part may be anything
    assert coreset_select(features, 2, quality, strict=True, mask=mask).counts.tolist() == [2, 2]
    assert coreset_select(features, 2, quality).counts.tolist() == [2, 2]


def test_strict_passes_sound_rows():
    assert torch.equal(coreset_select(X, 3, Q, strict=True).indices, coreset_select(X, 3, Q).indices)


def test_a_module_takes_no_unknown_argument():
    with pytest.raises(TypeError, match="temperature"):
        CoresetSelect(3, temperature=1.0)
