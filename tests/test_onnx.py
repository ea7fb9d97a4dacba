"""Selections and heads without our operators: in PyTorch, and where it is installed in onnxruntime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import FENCE
from torch import Tensor, nn

from fcn_kernels import CoresetAggregator, CoresetSelect, coreset_select
from fcn_kernels.integrations.onnx import plain

PAGE = Path(__file__).parents[1] / "docs" / "export-to-onnx.md"
has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not has_onnx, reason="no onnx, onnxscript and onnxruntime")
SETS, ROWS = torch.export.Dim("sets", min=2, max=100), torch.export.Dim("rows", min=5, max=1000)
PADDED = {0: SETS, 1: ROWS}


class Select(nn.Module):
    """Of rows and one more tensor, which goes by a name."""

    def __init__(self, name: str, k: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.k, self.options = name, k, options

    def forward(self, rows: Tensor, given: Tensor) -> Any:
        return coreset_select(rows, self.k, **{self.name: given}, **self.options)


def given(name: str, sets: int, rows: int) -> Tensor:
    """Values for an option: rows and sets of all kinds, one with fewer rows to pick than picks."""
    values = {
        "quality": torch.rand(sets, rows) + 0.5,
        "mask": (torch.rand(sets, rows) < 0.6) & (torch.arange(sets) > 0)[:, None],
        "lengths": torch.arange(sets) % rows,
        "start": torch.arange(sets) % rows,
    }
    return values[name]


def spoiled(sets: int, rows: int, dim: int) -> Tensor:
    """Rows of which some cannot be picked, and some are equal."""
    x = torch.randn(sets, rows, dim)
    x[:, 1] = x[:, 0]
    x[:, 2, 0] = torch.nan
    x[0, 3] = 0
    return x


@torch.no_grad()
def exported(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> Any:
    return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quality", {"gamma": 0.7, "distance_scale": 0.5}),
        ("mask", {"metric": "sqeuclidean", "distinct": True}),
        ("lengths", {"distinct": True}),
        ("start", {"normalized": True}),
    ],
)
def test_the_plain_program_picks_the_same_rows(name: str, options: dict[str, Any]) -> None:
    module = Select(name, 4, options)
    program = exported(
        module, (spoiled(3, 9, 6), given(name, 3, 9)), (PADDED, PADDED if name in ("quality", "mask") else {0: SETS})
    )
    unrolled = plain(program)
    assert not [node for node in unrolled.graph.nodes if "fcn_kernels" in str(node.target)]
    for sets, rows in ((3, 9), (2, 40), (7, 5)):
        inputs = spoiled(sets, rows, 6), given(name, sets, rows)
        if options.get("normalized"):
            inputs = torch.nn.functional.normalize(inputs[0], dim=-1), inputs[1]
        ours, theirs = module(*inputs), unrolled.module()(*inputs)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.counts, theirs.counts)
        torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=0)
        torch.testing.assert_close(ours.distances, theirs.distances)


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("k", [1, 4])
def test_the_plain_program_takes_float64(metric: str, k: int) -> None:
    module = Select("quality", k, {"metric": metric, "gamma": 0.7})
    inputs = spoiled(3, 9, 6).double(), given("quality", 3, 9).double()
    ours, theirs = module(*inputs), plain(exported(module, inputs, (PADDED, PADDED))).module()(*inputs)
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.distances, theirs.distances)


@pytest.mark.parametrize("start", [-1, 9, 2**40])
def test_a_start_means_nothing_to_an_empty_set(start: int) -> None:
    lengths = torch.tensor([0, 6])
    module, inputs = Select("start", 3, {"lengths": lengths}), (torch.randn(2, 9, 6), torch.tensor([start, 5]))
    ours, theirs = module(*inputs), plain(exported(module, inputs, None)).module()(*inputs)
    assert torch.equal(ours.indices, theirs.indices)
    assert ours.counts.tolist() == theirs.counts.tolist() == [0, 3]


def test_the_plain_head_gives_the_same_descriptors() -> None:
    head = CoresetAggregator(16, 3, num_heads=2, gamma=0.5)
    module = plain(exported(head, rated(2, 9), (PADDED, PADDED))).module()
    with torch.no_grad():
        for inputs in (rated(3, 30), rated(5, 5)):
            ours, theirs = head(*inputs), module(*inputs)
            torch.testing.assert_close(ours.descriptor, theirs.descriptor)
            assert torch.equal(ours.coreset.indices, theirs.coreset.indices)


def rated(sets: int, rows: int, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Unit rows and qualities; a row that is not finite."""
    features, quality = torch.nn.functional.normalize(torch.randn(sets, rows, dim), dim=-1), torch.rand(sets, rows) + 1
    features[0, 1] = torch.inf
    return features, quality


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"sample": True}, "noise"), ({"return_nearest": True}, "return_nearest"), ({"k": [2, 3]}, "number of picks")],
)
def test_what_does_not_go_along_is_refused(options: dict[str, Any], reason: str) -> None:
    options = {"gamma": 0.5, **options}
    program = exported(Select("quality", options.pop("k", 3), options), (torch.randn(2, 9, 6), torch.ones(2, 9)), None)
    with pytest.raises(NotImplementedError, match=reason):
        plain(program)


def test_gradients_and_packed_sets_are_refused() -> None:
    x = torch.randn(9, 6)
    with pytest.raises(NotImplementedError, match="no_grad"):
        plain(torch.export.export(CoresetSelect(3).eval(), (x,)))
    with pytest.raises(NotImplementedError, match="packed"):
        plain(exported(Select("cu_seqlens", 2, {}), (x, torch.tensor([0, 4, 9])), None))


@needs_onnx
def test_onnxruntime_picks_the_same_rows(tmp_path: Path) -> None:
    import onnxruntime

    select = CoresetSelect(3, 0.5)
    program = exported(select, (torch.randn(2, 20, 16),), (PADDED,))
    torch.onnx.export(plain(program), dynamo=True, verbose=False).save(tmp_path / "select.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "select.onnx", providers=["CPUExecutionProvider"])
    (rows,) = session.get_inputs()
    for sets, n in ((2, 20), (5, 7), (1, 300), (8, 61)):
        x = torch.randn(sets, n, 16)
        features, indices, *_ = session.run(None, {rows.name: x.numpy()})
        ours = select(x)
        assert ours.indices.tolist() == indices.tolist()
        assert ours.features.tolist() == features.tolist()


@needs_onnx
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (fence["text"] for fence in FENCE.finditer(PAGE.read_text()) if fence["language"] == "python")
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    assert (tmp_path / "head.onnx").exists()
