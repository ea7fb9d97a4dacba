"""The aggregate command with a ClusterAggregate: descriptors, states that later rows join, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_aggregate import SIZES, arguments, load, make, save

from fcn_kernels import ClusterAggregate
from fcn_kernels.cli import aggregate
from fcn_kernels.files.formats import InputError

np = pytest.importorskip("numpy")
ROWS = sum(SIZES)


def head(**options: Any) -> ClusterAggregate:
    torch.manual_seed(0)
    small = {"clusters": 3, "style_dim": 8, "norm_dim": 8, "num_heads": 4, "style_channels": 6, "depth": 1}
    made = ClusterAggregate(16, **(small | options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    made.norm_code.norm.running_mean.fill_(15)
    made.norm_code.norm.running_var.fill_(30)
    return made


def columns(raw: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return make() | {"style": rng.standard_normal((ROWS, 6, 2) if raw else (ROWS, 8)).astype(np.float32)}


def run(folder: Path, given: dict[str, Any], *options: object, kind: str = "npz") -> dict[str, Any]:
    path = folder / "out.npz"
    common = ("--checkpoint", folder / "head.pt", "--out", path, "--overwrite", "--styles", "style")
    aggregate.run_checked(arguments(*save(folder, kind, given), *common, *options))
    return load(path)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("batch_rows", [16384, 5])
def test_descriptors_are_the_heads(tmp_path: Path, raw: bool, batch_rows: int) -> None:
    made, given = head(), columns(raw)
    torch.save({"state_dict": {f"aggregator.{name}": v for name, v in made.state_dict().items()}}, tmp_path / "head.pt")
    out = run(tmp_path, given, "--chunk", 7, "--batch-rows", batch_rows, "--num-heads", 4)
    assert set(out) == {"template_ids", "descriptors", "norms", "counts", "left_out"}
    for b, identity in enumerate(out["template_ids"]):
        mine = torch.from_numpy(given["template_ids"] == identity)
        x, styles = (torch.from_numpy(given[name])[mine] for name in ("features", "style"))
        norms = torch.linalg.vector_norm(x, dim=-1)
        with torch.no_grad():
            fused = made(x / norms[:, None], styles, norms, chunk=7)
        assert torch.equal(torch.from_numpy(out["descriptors"][b]), fused.descriptor)
        assert out["norms"][b] == fused.norm
        assert out["counts"][b] == SIZES[b]


@pytest.mark.parametrize("kind", ["npz", "npy", "pt", "safetensors", "parquet"])
def test_later_rows_join_a_state_to_the_bit(tmp_path: Path, kind: str) -> None:
    """Templates of 1 to 30 rows; 4 of them in both runs, cut as one run over chunks would be."""
    torch.save(head().state_dict(), tmp_path / "head.pt")
    given, numbers = columns(), ("--num-heads", 4, "--chunk", 1)  # any split of rows is a split of chunks
    whole = run(tmp_path, given, *numbers)
    early = np.arange(ROWS) % 3 == 0
    early[given["template_ids"] == 12] = True  # a template that has no later rows
    early[given["template_ids"] == 10] = False  # and one that has no early ones
    first, second = ({name: values[part] for name, values in given.items()} for part in (early, ~early))
    state, last = tmp_path / f"state.{kind}", tmp_path / f"last.{kind}"
    run(tmp_path, first, *numbers, "--state-out", state)
    joined = run(tmp_path, second, *numbers, "--state-in", state, "--state-out", last)
    for name in ("template_ids", "descriptors", "norms", "counts"):
        assert np.array_equal(joined[name], whole[name]), name
    states = load(last)
    assert states["sums"].shape == (len(SIZES), 3 * 16)
    run(tmp_path, given, *numbers, "--state-out", state)
    for name, values in load(state).items():
        assert np.array_equal(values, states[name]), name


def test_text_ids_and_heads_without_styles(tmp_path: Path) -> None:
    torch.save(head(style_dim=0).state_dict(), tmp_path / "head.pt")
    given = {name: values for name, values in columns().items() if name != "style"}
    given["template_ids"] = given["template_ids"].astype("U5")
    out, state = tmp_path / "out.npz", tmp_path / "state.npz"
    common = ("--checkpoint", tmp_path / "head.pt", "--out", out, "--overwrite", "--num-heads", 4)
    aggregate.run_checked(arguments(*save(tmp_path, "npz", given), *common, "--state-out", state))
    assert load(out)["template_ids"].tolist() == sorted(set(given["template_ids"].tolist()))
    given["template_ids"] = columns()["template_ids"]
    with pytest.raises(InputError, match="expected ids of one kind, got strings in the states and integers in"):
        aggregate.run_checked(arguments(*save(tmp_path, "npz", given), *common, "--state-in", state))


def test_unsigned_ids_join_signed_ones(tmp_path: Path) -> None:
    """NumPy makes float64 of both together, in which these ids are one."""
    torch.save(head().state_dict(), tmp_path / "head.pt")
    given, state = columns(), tmp_path / "state.npz"
    given["template_ids"] += 2**60
    before = run(tmp_path, given, "--num-heads", 4, "--state-out", state)["template_ids"]
    given["template_ids"] = given["template_ids"].astype("uint64") + 100
    after = run(tmp_path, given, "--num-heads", 4, "--state-in", state)["template_ids"]
    assert after.dtype == "int64"
    assert after.tolist() == [*before.tolist(), *(before + 100).tolist()]


def test_bad_rows_are_named_or_left_out(tmp_path: Path) -> None:
    torch.save(head().state_dict(), tmp_path / "head.pt")
    given = columns()
    given["style"][5, 3] = np.nan
    with pytest.raises(InputError, match=r"row 5 of template \d+: its style is not finite"):
        run(tmp_path, given, "--num-heads", 4)
    given["features"][7] = 0
    out = run(tmp_path, given, "--num-heads", 4, "--skip-bad-rows")
    assert out["left_out"].sum() == 2
    assert (out["counts"] + out["left_out"]).tolist() == list(SIZES)
    good = np.delete(np.arange(ROWS), [5, 7])
    kept = run(tmp_path, {name: values[good] for name, values in given.items()}, "--num-heads", 4)
    same = np.isin(out["template_ids"], kept["template_ids"])
    assert np.array_equal(out["descriptors"][same], kept["descriptors"])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    made, given, heads = head(), columns(), ("--num-heads", 4)
    torch.save(made.state_dict(), tmp_path / "head.pt")
    state = tmp_path / "state.npz"
    run(tmp_path, given, *heads, "--state-out", state)
    damaged = load(state)
    np.savez(tmp_path / "twice.npz", **{name: np.concatenate([v, v]) for name, v in damaged.items()})
    damaged["sums"][1, 2] = np.inf
    np.savez(tmp_path / "damaged.npz", **damaged)
    for message, options in (
        ("picks no rows", (*heads, "--k", 3)),
        ("picks no rows", (*heads, "--gamma", 0.5)),
        ("num_heads to divide", ("--num-heads", 3)),
        ("expected finite sums", (*heads, "--state-in", tmp_path / "damaged.npz")),
        ("every template once", (*heads, "--state-in", tmp_path / "twice.npz")),
        ("expected a column 'sums'", (*heads, "--state-in", tmp_path / "in.npz")),
        ("another file for --state-out", (*heads, "--state-out", tmp_path / "out.npz")),
        ("is read from", (*heads, "--state-in", state, "--state-out", state)),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path, given, *options)
    torch.save(head(depth=0).state_dict(), tmp_path / "head.pt")
    with pytest.raises(InputError, match="of another checkpoint"):
        run(tmp_path, given, *heads, "--state-in", state)
    given["style"] = given["style"][:, :5]
    with pytest.raises(InputError, match=r"row of 'style' of shape"):
        run(tmp_path, given, *heads)
    with pytest.raises(InputError, match="--styles: expected with --checkpoint"):
        aggregate.run_checked(arguments(tmp_path / "in.npz", "--out", tmp_path / "o.npz", "--styles", "style"))
    options = ("--checkpoint", tmp_path / "head.pt", "--out", tmp_path / "o.npz", *heads)
    with pytest.raises(InputError, match="expected --styles with the name"):
        aggregate.run_checked(arguments(tmp_path / "in.npz", *options))
