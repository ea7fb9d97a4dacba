"""The reference of score alignment against vectors made by plain NumPy in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import alignment

VECTORS = Path(__file__).with_name("data") / "alignment.npz"


def problem(name: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as vectors:
        return {
            key.split("/")[1]: torch.from_numpy(vectors[key]) for key in vectors.files if key.startswith(f"{name}/")
        }


def support(p: dict[str, Tensor], whole: bool = False) -> alignment.Context:
    k = None if whole or p["k"] < 0 else int(p["k"])
    cap = -torch.inf if whole or p["cap"].isnan() else float(p["cap"])
    return alignment.context(p["x"], p["bank"], k, cap, p.get("row_ids"), p.get("bank_ids"))


def close(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("name", ["plain", "short", "cap"])
def test_vectors(name: str) -> None:
    """Sets, mean and deviation, then every score of pairs."""
    p = problem(name)
    c, whole = support(p), support(p, whole=True)
    width = p["indices"].shape[1]
    assert c.counts.equal(p["counts"])
    assert c.indices[:, :width].equal(p["indices"][:, : c.indices.shape[1]])
    for found, expected in ((c.mean, "mean"), (c.std, "std"), (whole.mean, "full_mean"), (whole.std, "full_std")):
        close(found, p[expected])
    a, b = p["pairs"].T
    raw = p["score_raw"]
    close(alignment.csls(raw, c.mean[a], c.mean[b]), p["score_csls"])
    close(alignment.mean_alignment(raw, c.mean[a], c.mean[b]), p["score_mean"])
    finite = (p["std"][a] > 1e-6) & (p["std"][b] > 1e-6)
    for found, expected in (
        (alignment.z_norm(raw, c.mean[a], c.std[a]), "score_z"),
        (alignment.z_norm(raw, c.mean[b], c.std[b]), "score_t"),
        (alignment.as_norm(raw, c.mean[a], c.std[a], c.mean[b], c.std[b]), "score_as_norm"),
    ):
        torch.testing.assert_close(found[finite], p[expected][finite], rtol=1e-10, atol=1e-10)


def test_gradients() -> None:
    """Central differences of 1e-6, good to 1e-7."""
    p = problem("plain")
    p["x"].requires_grad_()
    p["bank"].requires_grad_()
    c = support(p)
    (p["grad_weight_mean"] * c.mean + p["grad_weight_std"] * c.std).sum().backward()
    close(p["x"].grad, p["grad_x"], 1e-7)
    close(p["bank"].grad, p["grad_bank"], 1e-7)
