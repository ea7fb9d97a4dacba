"""The aggregate command: every format in and out, against plain references, and what it does with bad files."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fcn_kernels import CoresetAggregator
from fcn_kernels.__main__ import main
from fcn_kernels.cli import aggregate
from fcn_kernels.files import aggregate as library
from fcn_kernels.files import formats
from fcn_kernels.files.embeddings import Embeddings
from fcn_kernels.files.formats import InputError
from reference.head import ReferenceHead
from reference.listing import coreset_listing

np = pytest.importorskip("numpy")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
st = pytest.importorskip("safetensors.numpy")
pytest.importorskip("tqdm")

DIM, K = 16, 3
SIZES = (1, 7, 2, 30, 3, 12)  # of the templates 10, 11, ...; two have fewer rows than K
ROWS = sum(SIZES)
OUTPUTS = (".npz", ".npy", ".pt", ".safetensors", ".parquet")
# float32 descriptors are of unit length; sums of the same numbers in another order differ by a few 6e-8
REORDERED = 1e-6


def make(seed: int = 0) -> dict[str, Any]:
    """Rows of all templates mixed, with norms of 5 to 25."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((ROWS, DIM))
    features *= rng.uniform(5, 25, (ROWS, 1)) / np.linalg.norm(features, axis=1, keepdims=True)
    ids = rng.permutation(np.repeat(np.arange(len(SIZES)) + 10, SIZES))
    return {"features": features.astype(np.float32), "template_ids": ids}


def save(folder: Path, kind: str, columns: dict[str, Any]) -> list[str]:
    """Write INPUT; returns the arguments that name it."""
    path = folder / f"in.{kind.split('-')[0]}"
    if kind == "npz":
        np.savez(path, **columns)
    elif kind == "npz-compressed":
        np.savez_compressed(path, **columns)
    elif kind == "npz-fortran":
        np.savez(path, **{name: np.asfortranarray(column) for name, column in columns.items()})
    elif kind == "npy":
        paths = [folder / f"{name}.npy" for name in columns]
        for file, column in zip(paths, columns.values(), strict=True):
            np.save(file, column)
        return [str(file) for file in paths]
    elif kind == "npy-fields":
        records = np.empty(len(columns["features"]), [(n, c.dtype, c.shape[1:]) for n, c in columns.items()])
        for name, column in columns.items():
            records[name] = column
        np.save(path, records)
    elif kind.startswith("pt"):
        tensors = {n: torch.from_numpy(c) if c.dtype.kind != "U" else c.tolist() for n, c in columns.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pt")
    elif kind == "safetensors":
        st.save_file(columns, path)
    else:
        lists = {n: pa.array(list(c)) for n, c in columns.items()}
        if kind == "parquet-fixed":
            flat = pa.array(columns["features"].reshape(-1))
            lists["features"] = pa.FixedSizeListArray.from_arrays(flat, columns["features"].shape[1])
        pq.write_table(pa.table(lists), path, row_group_size=20)
    return [str(path)]


INPUTS = (
    *("npz", "npz-compressed", "npz-fortran", "npy", "npy-fields", "pt", "pt-legacy"),
    *("safetensors", "parquet", "parquet-fixed"),
)


def load(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return dict(archive)
    if path.suffix == ".npy":
        records = np.load(path)
        return {name: records[name] for name in records.dtype.names}
    if path.suffix == ".pt":
        return {name: np.asarray(values) for name, values in torch.load(path, weights_only=True).items()}
    if path.suffix == ".safetensors":
        return dict(st.load_file(path))
    return {n: np.array(column.to_pylist()) for n, column in zip(*_table(path), strict=True)}


def _table(path: Path) -> tuple[list[str], list[Any]]:
    table = pq.read_table(path)
    return table.column_names, table.columns


def arguments(*options: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    aggregate.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


def result(folder: Path, columns: dict[str, Any], *options: object) -> dict[str, Any]:
    """What a run over an .npz of these columns writes."""
    aggregate.run_checked(arguments(*save(folder, "npz", columns), "--out", folder / "o.npz", "--overwrite", *options))
    return load(folder / "o.npz")


def refused(folder: Path, inputs: list[str], *options: object) -> str:
    """The message with which a run is refused; it leaves no OUTPUT and no temporary file."""
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as caught:
        aggregate.run_checked(arguments(*inputs, "--out", folder / "o.npz", *options))
    assert sorted(folder.iterdir()) == before
    return str(caught.value)


def expected(columns: dict[str, Any], head: ReferenceHead | None = None, gamma: float = 1.0) -> dict[str, Any]:
    """Every template by itself, in float64, by the listing and the head with projected keys and values."""
    features = torch.from_numpy(columns["features"]).double()
    quality = torch.from_numpy(columns["quality"]).double() if "quality" in columns else features.norm(dim=1)
    out: dict[str, list[Any]] = {name: [] for name in ("descriptors", "norms", "counts", "picks")}
    for template in np.unique(columns["template_ids"]):
        rows = torch.from_numpy((columns["template_ids"] == template).nonzero()[0])
        unit, q = features[rows] / features[rows].norm(dim=1, keepdim=True), quality[rows]
        count = min(K, len(rows))
        with torch.no_grad():
            core = coreset_listing((unit * q[:, None])[None], q[None], count, gamma)
            mean = core.features[0].mean(0)
            descriptor, norm = (mean / mean.norm(), mean.norm()) if head is None else head(unit[None], q[None])
        out["descriptors"].append(descriptor.flatten().numpy())
        out["norms"].append(norm.item())
        out["counts"].append(count)
        out["picks"].append(rows[core.indices[0]].tolist() + [-1] * (K - count))
    return {name: np.array(values) for name, values in out.items()}


def compare(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    for name in want:
        if want[name].dtype.kind == "f":
            np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def make_head(head: torch.nn.Module) -> Any:
    """Every parameter away from where it starts: a LayerNorm's 1 and 0 would hide much."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name == "gamma":
                parameter.fill_(0.7)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return head.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(make_head(CoresetAggregator(DIM, K)).state_dict(), tmp_path / "head.pt")
    return tmp_path / "head.pt"


@pytest.fixture
def reference(checkpoint: Path) -> ReferenceHead:
    head = ReferenceHead(DIM, K)
    head.load_state_dict(torch.load(checkpoint, weights_only=True))
    return head.double().eval()


# What it computes


@pytest.mark.parametrize("quality", [False, True], ids=["norms", "quality"])
@pytest.mark.parametrize("gamma", [0, 0.01, 2])
def test_mean_of_coreset_is_the_listing_of_every_template_alone(tmp_path: Path, gamma: float, quality: bool) -> None:
    columns = make()
    if quality:
        columns["quality"] = np.random.default_rng(5).uniform(0.5, 3, ROWS)
    got = result(tmp_path, columns, "--dtype", "float64", "--gamma", gamma)
    assert got["template_ids"].tolist() == [10, 11, 12, 13, 14, 15]
    compare(got, expected(columns, gamma=gamma), 1e-12)  # a few roundings of float64


def test_gamma_is_1_unless_given(tmp_path: Path) -> None:
    compare(result(tmp_path, make(), "--dtype", "float64"), expected(make(), gamma=1.0), 1e-12)


def test_checkpoint_gives_the_reference_head_of_every_template_alone(
    tmp_path: Path, checkpoint: Path, reference: ReferenceHead
) -> None:
    got = result(tmp_path, make(), "--dtype", "float64", "--checkpoint", checkpoint)
    compare(got, expected(make(), reference, gamma=0.7), 1e-9)  # the head's own tolerance to its reference
    other = result(tmp_path, make(), "--dtype", "float64", "--checkpoint", checkpoint, "--gamma", 3)
    reference.gamma.data.fill_(3)
    compare(other, expected(make(), reference, gamma=3), 1e-9)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "lightning"])
def test_checkpoint_may_be_the_authors(tmp_path: Path, checkpoint: Path, wrapped: bool) -> None:
    theirs = {
        "encoding_norm": "pos_trans_norm",
        "self_attention": "decoder_layer1.self_attn1",
        "self_norm": "decoder_layer1.norm1",
        "cross_attention": "decoder_layer1.multihead_attn1",
        "cross_norm": "decoder_layer1.norm2",
    }
    state = {"tau": torch.ones(())}
    for name, value in torch.load(checkpoint, weights_only=True).items():
        layer, _, leaf = name.partition(".")
        state[f"{theirs[layer]}.{leaf}" if leaf else name] = value
    if wrapped:
        state = {"state_dict": {f"aggregate_model.{name}": value for name, value in state.items()}}
    torch.save(state, tmp_path / "theirs.ckpt")
    ours = result(tmp_path, make(), "--checkpoint", checkpoint)
    compare(result(tmp_path, make(), "--checkpoint", tmp_path / "theirs.ckpt"), ours, 0)


def test_heads_are_told_and_a_safetensors_checkpoint_is_read(tmp_path: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    st.save_file({name: value.numpy() for name, value in state.items()}, tmp_path / "head.safetensors")
    two = ReferenceHead(DIM, K, num_heads=2)
    two.load_state_dict(state)
    options = ("--checkpoint", tmp_path / "head.safetensors", "--num-heads", 2, "--dtype", "float64")
    compare(result(tmp_path, make(), *options), expected(make(), two.double().eval(), gamma=0.7), 1e-9)


@pytest.mark.parametrize("with_head", [False, True], ids=["mean", "head"])
@pytest.mark.parametrize("batch_rows", [1, 13, 31])
def test_batches_change_nothing(tmp_path: Path, checkpoint: Path, batch_rows: int, with_head: bool) -> None:
    options = ["--checkpoint", checkpoint] if with_head else []
    whole = result(tmp_path, make(), *options)
    compare(result(tmp_path, make(), *options, "--batch-rows", batch_rows), whole, REORDERED)


def test_order_of_rows_changes_nothing_but_their_numbers(tmp_path: Path) -> None:
    columns = make()
    order = np.random.default_rng(1).permutation(ROWS)
    moved = result(tmp_path, {name: values[order] for name, values in columns.items()})
    moved["picks"] = np.where(moved["picks"] < 0, -1, order[moved["picks"]])
    compare(moved, result(tmp_path, columns), REORDERED)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("with_head", [False, True], ids=["mean", "head"])
def test_half_precision_picks_from_rounded_rows(tmp_path: Path, checkpoint: Path, dtype: str, with_head: bool) -> None:
    options = ["--checkpoint", checkpoint] if with_head else []
    got = result(tmp_path, make(), "--dtype", dtype, *options)
    whole = result(tmp_path, make(), *options)
    assert got["descriptors"].dtype == np.float32
    same = (got["picks"] == whole["picks"]).all(1)
    assert same.sum() >= len(SIZES) - 1  # rounding may turn a near tie
    # 3 rows rounded to 8 bits, each within 2^-9; the head's layers triple what the mean keeps
    difference = np.abs(got["descriptors"] - whole["descriptors"])[same].max()
    assert 0 < difference < 3 * 2**-8


class Recorder:
    """Features that remember how many rows were asked for at once."""

    def __init__(self, features: Tensor) -> None:
        self.features, self.shape, self.asked = features, features.shape, []

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.asked.append(len(rows))
        return self.features[rows]


def test_a_batch_holds_no_more_rows_than_told_unless_one_template_does() -> None:
    columns = make()
    recorder = Recorder(torch.from_numpy(columns["features"]))
    embeddings = Embeddings(recorder, columns["template_ids"], None, "x")  # type: ignore[arg-type]

    def pool(*args: Tensor) -> Any:
        return library.mean_of_coreset(*args, k=K, gamma=0.0)

    library.aggregate(embeddings, pool, k=K, batch_rows=12)
    assert recorder.asked == [1 + 7 + 2, 30, 3, 12]


# Formats


@pytest.mark.parametrize("kind", INPUTS)
def test_all_formats_are_read_alike(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PARQUET_BATCH_ROWS", 8)
    columns = make() | {"quality": np.random.default_rng(5).uniform(0.5, 3, ROWS).astype(np.float32)}
    want = result(tmp_path, columns)
    assert aggregate.run(arguments(*save(tmp_path, kind, columns), "--out", tmp_path / "p.npz")) == 0
    compare(load(tmp_path / "p.npz"), want, 0)


@pytest.mark.parametrize("suffix", OUTPUTS)
def test_all_formats_are_written_alike(tmp_path: Path, suffix: str) -> None:
    inputs = save(tmp_path, "npz", make())
    assert aggregate.run(arguments(*inputs, "--out", tmp_path / f"o{suffix}")) == 0
    got, want = load(tmp_path / f"o{suffix}"), result(tmp_path, make())
    assert list(got) == list(want) or suffix == ".safetensors"  # which sorts its names
    compare(got, want, 0)
    assert got["descriptors"].shape == (len(SIZES), DIM)
    assert got["picks"].shape == (len(SIZES), K)
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["npz", "npz-compressed", "npy", "npy-fields", "pt", "parquet"])
@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt", ".parquet"])
def test_ids_may_be_strings(tmp_path: Path, kind: str, suffix: str) -> None:
    columns = make()
    columns["template_ids"] = np.array([f"tëmplate {20 - i}" for i in columns["template_ids"]])
    aggregate.run_checked(arguments(*save(tmp_path, kind, columns), "--out", tmp_path / f"o{suffix}"))
    got = load(tmp_path / f"o{suffix}")
    assert got["template_ids"].tolist() == sorted({*columns["template_ids"].tolist()})
    want = result(tmp_path, make())
    np.testing.assert_array_equal(np.sort(got["norms"]), np.sort(want["norms"]))


@pytest.mark.parametrize("suffix", OUTPUTS)
def test_large_unsigned_ids_come_out_as_they_came_in(tmp_path: Path, suffix: str) -> None:
    columns = make()
    columns["template_ids"] = columns["template_ids"].astype(np.uint64) + np.uint64(2**63)
    aggregate.run_checked(arguments(*save(tmp_path, "npz", columns), "--out", tmp_path / f"o{suffix}"))
    assert load(tmp_path / f"o{suffix}")["template_ids"].tolist() == [2**63 + 10 + i for i in range(len(SIZES))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_other_dtypes_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    columns = {name: torch.from_numpy(column) for name, column in make().items()}
    columns["features"] = columns["features"].to(dtype)
    columns["quality"] = torch.full((ROWS, 1), 2.0, dtype=dtype)  # a column, as some models give it
    torch.save(columns, tmp_path / "in.pt")
    aggregate.run_checked(arguments(tmp_path / "in.pt", "--out", tmp_path / "p.npz"))
    rounded = {name: column.float().numpy() for name, column in columns.items() if name != "template_ids"}
    rounded["quality"] = rounded["quality"][:, 0]
    compare(load(tmp_path / "p.npz"), result(tmp_path, make() | rounded), 0)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    columns = make() | {"sharpness": np.random.default_rng(5).uniform(0.5, 3, ROWS)}
    want = result(tmp_path, make() | {"quality": columns["sharpness"]})
    renamed = {"x": columns["features"], "t": columns["template_ids"], "s": columns["sharpness"]}
    compare(result(tmp_path, renamed, "--features", "x", "--ids", "t", "--quality", "s"), want, 0)


# What is refused


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("features", np.nan, "the norm of its features is nan"),
        ("features", np.inf, "the norm of its features is inf"),
        ("features", 0, "the norm of its features is 0"),
        ("features", 3e38, "the norm of its features is inf"),  # it is more than float32 can hold
        ("features", 1e-40, "the norm of its features is 0"),  # it has not all of float32's digits
        ("quality", np.nan, "its quality is nan"),
        ("quality", 0, "its quality is 0"),
        ("quality", -2, "its quality is -2"),
    ],
)
def test_bad_rows_are_named_or_left_out_and_counted(tmp_path: Path, name: str, value: float, reason: str) -> None:
    columns = make() | {"quality": np.ones(ROWS)}
    bad = (columns["template_ids"] == 13).nonzero()[0][[4, 9]]
    columns["quality"][bad] = 2  # they would be picked first
    columns[name][bad] = value
    inputs = save(tmp_path, "npz", columns)
    message = refused(tmp_path, inputs, "--batch-rows", 12)
    assert message.startswith(f"{inputs[0]}: row {bad[0]} of template 13: {reason} in float32, expected finite and")

    got = result(tmp_path, columns, "--skip-bad-rows")
    assert got["left_out"].tolist() == [0, 0, 0, 2, 0, 0]
    without = result(tmp_path, {name: np.delete(column, bad, 0) for name, column in columns.items()})
    good = np.delete(np.arange(ROWS), bad)
    without["picks"] = np.where(without["picks"] < 0, -1, good[without["picks"]])
    del without["left_out"]
    compare(got, without, REORDERED)


@pytest.mark.parametrize("with_head", [False, True], ids=["mean", "head"])
def test_a_template_of_bad_rows_alone_has_a_zero_descriptor(
    tmp_path: Path, checkpoint: Path, with_head: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = make()
    columns["features"][columns["template_ids"] == 12] = np.nan
    options = ["--checkpoint", checkpoint] if with_head else []
    inputs = save(tmp_path, "npz", columns)
    assert aggregate.run(arguments(*inputs, "--out", tmp_path / "o.npz", "--skip-bad-rows", *options)) == 0
    assert "2 rows left out; templates without a row, whose descriptors are zero: 1" in capsys.readouterr().out
    got = load(tmp_path / "o.npz")
    assert got["counts"].tolist() == [1, 3, 0, 3, 3, 3]
    assert got["picks"][2].tolist() == [-1] * K
    assert got["norms"][2] == 0
    lengths = np.linalg.norm(got["descriptors"], axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 0, 1, 1, 1], atol=REORDERED)


def test_columns_of_different_lengths_are_refused_by_row_and_template(tmp_path: Path) -> None:
    columns = make()
    last = columns["template_ids"][-1]
    short = columns | {"features": columns["features"][:-1]}
    inputs = save(tmp_path, "npz", short)
    at = f"{inputs[0]}: row {ROWS - 1}"
    assert refused(tmp_path, inputs) == (
        f"{at} of template {last}: not in 'features': 'features' has {ROWS - 1} rows and 'template_ids' has {ROWS}"
    )
    inputs = save(tmp_path, "npz", columns | {"template_ids": columns["template_ids"][:-1]})
    assert refused(tmp_path, inputs).startswith(f"{at}: not in 'template_ids'")
    inputs = save(tmp_path, "npz", columns | {"quality": np.ones(ROWS - 1)})
    assert refused(tmp_path, inputs).startswith(f"{at} of template {last}: not in 'quality'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template_ids": np.arange(ROWS) / 2}, "expected integers or strings in 'template_ids', got float64"),
        ({"template_ids": np.zeros((ROWS, 2), int)}, "expected 'template_ids' of shape (T,) or (T, 1), got"),
        (
            {"features": np.ones((ROWS, 2, 2))},
            "expected floating-point or integer 'features' of shape (T, C), got float64",
        ),
        (
            {"features": np.ones((ROWS, DIM), bool)},
            "expected floating-point or integer 'features' of shape (T, C), got",
        ),
        ({"features": np.ones((ROWS, 0))}, f"got float64 of shape ({ROWS}, 0)"),
        ({"quality": np.array(["sharp"] * ROWS)}, "expected numbers in 'quality', got text"),
        ({"template_ids": np.zeros(0, int)}, "expected at least one row, got none in 'template_ids'"),
        (
            {"template_ids": np.array([None] * ROWS)},
            "template_ids.npy: cannot be read: holds Python objects other than strings",
        ),
    ],
)
def test_columns_of_the_wrong_kind_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    inputs = save(tmp_path, "npz", make() | change)
    refusal = refused(tmp_path, inputs)
    assert refusal.startswith(f"{inputs[0]}: ")
    assert message in refusal


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    inputs = save(tmp_path, "npz", make())
    message = f"{inputs[0]}: expected a column 'x', got 'features', 'template_ids'"
    for option in ("--features", "--ids", "--quality"):
        assert refused(tmp_path, inputs, option, "x") == message


def test_parquet_lists_that_are_ragged_or_missing_are_refused_by_row_and_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "PARQUET_BATCH_ROWS", 8)
    columns = make()
    path, ids = tmp_path / "in.parquet", columns["template_ids"]

    def refusal(row: int, value: Any) -> str:
        lists = list(columns["features"].tolist())
        lists[row] = value
        pq.write_table(pa.table({"features": lists, "template_ids": ids}), path, row_group_size=10)
        return refused(tmp_path, [str(path)])

    assert (
        refusal(33, [1.0]) == f"{path}: row 33 of template {ids[33]}: 1 values in 'features', {DIM} in the rows before"
    )
    assert refusal(33, None) == f"{path}: row 33 of template {ids[33]}: 'features' is null"
    assert "row 33" in refusal(33, [None] * DIM)
    assert "the norm of its features is nan" in refusal(33, [None] * DIM)
    whole = np.rint(columns["features"] * 100).astype("int64").tolist()
    for row in (3, 33):  # in the first batch, and in a later one
        lists = [[None, *values[1:]] if place == row else values for place, values in enumerate(whole)]
        pq.write_table(pa.table({"features": lists, "template_ids": ids}), path, row_group_size=10)
        assert refused(tmp_path, [str(path)], "--skip-bad-rows") == (
            f"{path}: row {row} of template {ids[row]}: a value in 'features' is null, "
            "expected one in every place of integers"
        )
    holes = pa.array([None if row == 7 else int(i) for row, i in enumerate(ids)])
    pq.write_table(pa.table({"features": columns["features"].tolist(), "template_ids": holes}), path)
    assert refused(tmp_path, [str(path)]) == f"{path}: row 7: 'template_ids' is null"


@pytest.mark.parametrize("kind", INPUTS)
def test_damaged_files_are_named(tmp_path: Path, kind: str) -> None:
    inputs = save(tmp_path, kind, make())
    whole = Path(inputs[0]).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a file of this kind" * 9):
        Path(inputs[0]).write_bytes(damaged)
        assert refused(tmp_path, inputs).startswith(f"{inputs[0]}: ")
    Path(inputs[0]).unlink()
    assert "o such file" in refused(tmp_path, inputs)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["pt", "npy", "npz", "checkpoint"])
def test_files_run_no_code(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs, options = save(tmp_path, "npz", make()), []
    if kind == "pt":
        inputs = [str(tmp_path / "in.pt")]
        torch.save({"features": Bomb()}, inputs[0])
    elif kind == "checkpoint":
        options = ["--checkpoint", str(tmp_path / "c.pt")]
        (tmp_path / "c.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    else:
        inputs = save(tmp_path, kind, make() | {"template_ids": np.array([Bomb()])})
    refused(tmp_path, inputs, *options)
    assert not (tmp_path / "exploded").exists()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    inputs = save(tmp_path, "npz", make() | {"features": np.ones((ROWS, 8), np.float32)})
    assert refused(tmp_path, inputs, "--checkpoint", checkpoint) == (
        f"{inputs[0]}: has C = 8 columns, {checkpoint} is for C = {DIM}"
    )
    inputs = save(tmp_path, "npz", make())
    state = torch.load(checkpoint, weights_only=True)
    other = tmp_path / "other.pt"
    for content, part in (
        ({n: v for n, v in state.items() if n != "self_norm.bias"}, "missing keys ['self_norm.bias']"),
        (state | {"self_norm.bias": torch.ones(5)}, f"self_norm.bias (5,) instead of ({DIM},)"),
        (state | {"encoding_norm.weight": torch.ones(5, 5)}, "encoding_norm.weight of shape (C,), got (5, 5)"),
        (state | {"self_norm.bias": torch.full((DIM,), torch.nan)}, "NaN or infinity in ['self_norm.bias']"),
        ({"weight": torch.ones(3)}, "missing keys"),
        ([1, 2], "expected a state dict, got list"),
    ):
        torch.save(content, other)
        message = refused(tmp_path, inputs, "--checkpoint", other)
        assert message.startswith(f"{other}: ")
        assert part in message
    assert "divisible by num_heads = 5" in refused(tmp_path, inputs, "--checkpoint", checkpoint, "--num-heads", 5)


def test_options_that_cannot_be_met_are_refused_before_any_work(tmp_path: Path) -> None:
    inputs = save(tmp_path, "npz", make())
    npy = save(tmp_path, "npy", make())
    assert "--device nowhere: " in refused(tmp_path, inputs, "--device", "nowhere")
    assert "several .npy files have none" in refused(tmp_path, npy, "--ids", "x")
    assert "expected one INPUT, FEATURES.npy IDS.npy [QUALITY.npy] or FEATURES.npy TABLE.csv, got" in refused(
        tmp_path, [*inputs, *npy]
    )
    assert "or a second .npy or .csv with the template ids" in refused(tmp_path, npy[:1])
    assert "expected a file that ends in .npz, .npy, .pt" in refused(tmp_path, [str(tmp_path / "x.csv")])
    for out, message in (
        (tmp_path / "o.csv", "expected a file that ends in"),
        (tmp_path / "nowhere" / "o.npz", "expected a file in a folder that exists"),
        (tmp_path / "d.npz", "is a folder"),
    ):
        (tmp_path / "d.npz").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=re.escape(message)):
            aggregate.run_checked(arguments(*inputs, "--out", out))
    strings = save(tmp_path, "npz", make() | {"template_ids": np.array(["a"] * ROWS)})
    with pytest.raises(InputError, match="safetensors cannot hold template ids that are strings"):
        aggregate.run_checked(arguments(*strings, "--out", tmp_path / "o.safetensors"))


@pytest.mark.parametrize("options", [["--k", "0"], ["--batch-rows", "0"], ["--gamma", "nan"], ["--dtype", "int8"]])
def test_bad_numbers_are_usage_errors(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["aggregate", "x.npz", "--out", "o.npz", *options])
    assert left.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = save(tmp_path, "npz", make())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    assert main(["aggregate", *inputs, "--out", str(tmp_path / "o.parquet")]) == 2
    assert 'pip install "fcn_kernels[tool]"' in capsys.readouterr().err


# What is left behind


def test_output_is_replaced_only_when_told_and_never_when_it_is_read_from(tmp_path: Path) -> None:
    inputs = save(tmp_path, "npz", make())
    out = tmp_path / "o.npz"
    out.write_bytes(b"precious")
    assert "--overwrite replaces it" in refused(tmp_path, inputs)
    assert out.read_bytes() == b"precious"
    aggregate.run_checked(arguments(*inputs, "--out", out, "--overwrite"))
    assert zipfile.is_zipfile(out)
    with pytest.raises(InputError, match="is read from, and cannot be written too"):
        aggregate.run_checked(arguments(*inputs, "--out", inputs[0], "--overwrite"))


def test_output_has_the_mode_of_any_new_file_and_a_link_stays_a_link(tmp_path: Path) -> None:
    inputs = save(tmp_path, "npz", make())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "o.npz").symlink_to(tmp_path / "elsewhere" / "o.npz")
    aggregate.run_checked(arguments(*inputs, "--out", tmp_path / "o.npz"))
    assert (tmp_path / "o.npz").is_symlink()
    assert (tmp_path / "elsewhere" / "o.npz").stat().st_mode == Path(inputs[0]).stat().st_mode


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "is as it was"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(file: Any, _: Any) -> None:
        file.write(b"half")
        file.flush()
        assert len(list(tmp_path.glob(".fcn-*.tmp"))) == 1
        raise error

    inputs = save(tmp_path, "npz", make())
    (tmp_path / "o.npz").write_bytes(b"old")
    monkeypatch.setitem(formats._FORMATS, ".npz", formats._FORMATS[".npz"]._replace(write=fail))
    assert aggregate.run(arguments(*inputs, "--out", tmp_path / "o.npz", "--overwrite")) == status
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "o.npz"]
    assert (tmp_path / "o.npz").read_bytes() == b"old"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_amid_the_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def signalled(file: Any, _: Any) -> None:
        file.write(b"half")
        signal.raise_signal(number)

    inputs = save(tmp_path, "npz-compressed", make())
    monkeypatch.setitem(formats._FORMATS, ".npz", formats._FORMATS[".npz"]._replace(write=signalled))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        sys.exit(aggregate.run(arguments(*inputs, "--out", tmp_path / "o.npz")))
    assert left.value.code == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]
    assert signal.getsignal(number) is before


def test_a_signal_that_the_shell_ignores_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = formats._FORMATS[".npz"].write

    def hung_up(file: Any, arrays: Any) -> None:
        signal.raise_signal(signal.SIGHUP)  # as after nohup, when the terminal is closed
        write(file, arrays)

    monkeypatch.setitem(formats._FORMATS, ".npz", formats._FORMATS[".npz"]._replace(write=hung_up))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert aggregate.run(arguments(*save(tmp_path, "npz", make()), "--out", tmp_path / "o.npz")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_is_ended_leaves_nothing_and_shows_no_traceback(tmp_path: Path) -> None:
    inputs = save(tmp_path, "npz", make())
    script = """
import signal, sys
from fcn_kernels.files import aggregate as library
from fcn_kernels.files import formats
from fcn_kernels.__main__ import main
def write(file, arrays):
    file.write(b"half")
    print("writing", flush=True)
    signal.pause()
formats._FORMATS[".npz"] = formats._FORMATS[".npz"]._replace(write=write)
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, "aggregate", *inputs, "--out", str(tmp_path / "o.npz")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob(".fcn-*.tmp"))) == 1
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"{ROWS}.0/{ROWS}.0" in errors  # the progress bar
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_the_command_says_what_it_did_and_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, out = save(tmp_path, "npz", make()), str(tmp_path / "o.npz")
    assert main(["aggregate", *inputs, "--out", out]) == 0
    assert capsys.readouterr().out == f"{out}: {len(SIZES)} templates from {ROWS} rows\n"
    assert main(["aggregate", *inputs, "--out", out]) == 2
    assert (
        capsys.readouterr().err
        == f"python -m fcn_kernels aggregate: {out}: is there already; --overwrite replaces it\n"
    )
    with pytest.raises(SystemExit):
        main(["aggregate", "--help"])
    assert "compressed .npz and separate columns are unpacked" in capsys.readouterr().out
