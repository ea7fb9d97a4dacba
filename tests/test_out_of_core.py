"""Selection from a file: the picks of the whole in memory, from few reads, and a run that goes on."""

from __future__ import annotations

import math
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import kill_when
from torch import Tensor

from fcn_kernels import coreset_select
from fcn_kernels.__main__ import main
from fcn_kernels.cli import select
from fcn_kernels.files.embeddings import Keys, read_rows
from fcn_kernels.files.formats import Scratch, format_of
from fcn_kernels.selection.mapped import MappedRows
from fcn_kernels.selection.out_of_core import Known, Picker

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]


def clustered(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows about a few centers, some twice, some that cannot be picked."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(7, dim, generator=generator)
    x = centers[torch.randint(7, (count,), generator=generator)] + 0.4 * torch.randn(count, dim, generator=generator)
    x[5:9] = x[1:5]
    x[3], x[11, 0], x[12, 1] = 0, math.nan, math.inf
    return x.to(dtype)


def picked(picker: Picker, k: int) -> Known:
    while len(picker.known.picks) < k and picker.pick():
        pass
    return picker.known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("gamma", "with_quality", "start"), [(0.0, False, 2), (0.0, True, None), (1.0, True, None), (40.0, True, 20)]
)
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_picks_are_those_of_the_whole_to_the_bit(
    dtype: torch.dtype, gamma: float, with_quality: bool, start: int | None, metric: str
) -> None:
    x = clustered(300, 24, seed=1, dtype=dtype)
    quality = torch.rand(300, generator=torch.Generator().manual_seed(2)) * 30 + 1 if with_quality else None
    if quality is not None:
        quality[30:33] = torch.tensor([0.0, math.nan, -1.0])
    picker = Picker(x, quality, gamma, start=start, metric=metric)
    picker.mapped.block = 17
    found = picked(picker, 40)
    of_sums = None if quality is None else quality.to(picker.dtype)
    options = {"start": start, "distinct": True, "metric": metric, "backend": "torch"}
    whole = coreset_select(x, 41, of_sums, gamma, **options)
    assert torch.equal(found.picks, whole.indices[:40])
    assert torch.equal(found.distances, whole.distances[:40])
    assert picker.radius() == float(whole.distances[40])


def test_all_rows_are_picked_and_then_none() -> None:
    x = clustered(20, 6, seed=3)
    picker = Picker(x)
    found = picked(picker, 100)
    assert sorted(found.picks.tolist()) == [i for i in range(20) if i not in (3, 11, 12)][: len(found.picks)]
    assert not picker.pick()
    assert picker.radius() == 0
    assert not picked(Picker(x, start=3), 5).picks.numel()
    assert not picked(Picker(torch.zeros(4, 3)), 5).picks.numel()


def test_from_anchors_the_farthest_comes_first() -> None:
    x, anchors = clustered(200, 8, seed=4).double(), torch.randn(5, 8, dtype=torch.float64)
    found = picked(Picker(x, torch.ones(200), anchors=anchors), 6)
    unit = torch.nn.functional.normalize(torch.cat([anchors, x]), dim=1)
    distance = (1 - unit[5:] @ unit[:5].T).amin(1)
    begun = picked(Picker(x, torch.ones(200), anchors=anchors, start=7), 1)
    assert begun.distances.tolist() == [pytest.approx(float(distance[7]), abs=1e-12)]
    for pick, reached in zip(found.picks.tolist(), found.distances.tolist(), strict=True):
        distance[[3, 11, 12]] = -1  # cannot be picked
        assert pick == int(distance.argmax())
        assert reached == pytest.approx(float(distance[pick]), abs=1e-12)
        distance = torch.minimum(distance, 1 - unit[5:] @ unit[5 + pick])
        distance[pick] = -1


def test_labelled_rows_in_squared_distances(tmp_path: Path) -> None:
    """Rows of zeros count, among the labelled too; picks are those of coreset_select with anchors."""
    x, anchors = clustered(200, 8, seed=4), torch.randn(5, 8)
    anchors[2] = 0
    np.save(tmp_path / "rows.npy", x.numpy())
    np.save(tmp_path / "labelled.npy", anchors.numpy())
    out = tmp_path / "out.npz"
    files = (tmp_path / "rows.npy", "--labelled", tmp_path / "labelled.npy", "--out", out)
    assert run(*files, "--k", 7, "--metric", "sqeuclidean") == 0
    want = coreset_select(x, 7, anchors=anchors, metric="sqeuclidean", distinct=True)
    with np.load(out) as file:
        assert file["picks"].tolist() == want.indices.tolist()
        np.testing.assert_allclose(file["distances"], want.distances.numpy(), rtol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("size", [1e-25, 1, 1e25])
def test_a_given_start_beside_labelled_rows_of_any_length(size: float, metric: str, tmp_path: Path) -> None:
    x, anchors = clustered(200, 8, seed=4), torch.randn(5, 8) * size
    np.save(tmp_path / "rows.npy", x.numpy())
    np.save(tmp_path / "labelled.npy", anchors.numpy())
    out = tmp_path / "out.npz"
    files = (tmp_path / "rows.npy", "--labelled", tmp_path / "labelled.npy", "--out", out)
    assert run(*files, "--k", 7, "--start", 30, "--metric", metric) == 0
    want = coreset_select(x, 7, anchors=anchors, start=30, metric=metric, distinct=True, backend="torch")
    with np.load(out) as file:
        assert file["picks"].tolist() == want.indices.tolist()
        assert file["distances"].tolist() == want.distances.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", [7, 1000])
def test_an_array_in_fortrans_order(block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an exponent that float32 does not have as it is."""
    monkeypatch.setattr("fcn_kernels.selection.mapped.BLOCK_BYTES", block * 36 * 4)
    x, quality = clustered(200, 36, seed=4, dtype=dtype), 1e-20 * torch.rand(200)
    found = picked(Picker(x.T.contiguous().T, quality, 0.3), 50)
    want = coreset_select(x, 50, quality, 0.3, distinct=True, backend="torch")
    assert found.picks.tolist() == want.indices.tolist()
    assert found.distances.tolist() == want.distances.tolist()


def test_an_exponent_that_is_none_in_the_rows_dtype() -> None:
    with pytest.raises(ValueError, match="expected gamma"):
        Picker(clustered(200, 8, seed=4), gamma=1e300)
    assert len(picked(Picker(clustered(200, 8, seed=4).double(), gamma=1e300), 3).picks) == 3


@pytest.mark.parametrize("start", [None, 30])
def test_labelled_rows_farther_away_than_the_largest_number(start: int | None) -> None:
    """Distances end there, before they are weighed, so that of rows as far the better one comes first."""
    x, anchors = clustered(200, 8, seed=4), torch.full((1, 8), 1e25)
    quality = torch.rand(200, generator=torch.Generator().manual_seed(0))
    found = picked(Picker(x, quality, 1.0, anchors, start, metric="sqeuclidean"), 7)
    options = {"start": start, "metric": "sqeuclidean", "distinct": True, "backend": "torch"}
    want = coreset_select(x, 7, quality, 1.0, anchors=anchors, **options)
    assert found.picks.tolist() == want.indices.tolist()
    assert found.distances.tolist() == want.distances.tolist()


@pytest.mark.parametrize("options", [{}, {"metric": "sqeuclidean"}, {"start": 20}])
def test_the_default_device_is_not_where_rows_are(options: dict[str, Any]) -> None:
    x, anchors = clustered(200, 8, seed=4), torch.ones(1, 8)

    def found() -> Known:
        return picked(Picker(x, anchors=anchors, **options), 7)

    want = found()
    with torch.device("meta"):
        got = found()
    assert got.picks.tolist() == want.picks.tolist()
    assert got.distances.tolist() == want.distances.tolist()


def passes(x: Tensor, k: int, **options: Any) -> float:
    """Bytes read for k picks, in whole pages, in sizes of the file."""
    read: list[int] = []
    picker = Picker(x, progress=read.append, **options)
    picker.mapped.block = 500
    picked(picker, k)
    picker.radius()
    return sum(read) / (x.numel() * x.itemsize)


def test_few_bytes_are_read() -> None:
    """30 passes, if each pick met every row. The largest norm, which comes first, is in the middle, or at the end."""
    x = clustered(3000, 1024, seed=5)
    norms = 1 + torch.rand(3000, generator=torch.Generator().manual_seed(1)) / 4
    norms[1500] = 2
    rows = torch.nn.functional.normalize(x, dim=1) * norms[:, None]
    assert passes(rows, 30) < 3.6
    rows[-1] *= 4
    assert passes(rows, 30) < 5
    assert passes(rows, 30, start=0) < 3.6  # before the first pass
    assert passes(rows, 2, start=0) < 1.1


def test_a_wrong_guess_costs_reads_and_no_picks() -> None:
    """Norms that rise: each block's best replaces every guess. Picks are those of the whole in either order."""
    x = torch.nn.functional.normalize(clustered(2000, 512, seed=8).nan_to_num(1, 1, 1) + 1e-3, dim=1)
    for norms in (torch.linspace(1, 2, 2000), torch.linspace(2, 1, 2000)):
        rows = x * norms[:, None]
        picker = Picker(rows)
        picker.mapped.block = 60
        whole = coreset_select(rows, 30, distinct=True, backend="torch")
        assert torch.equal(picked(picker, 30).picks, whole.indices)
        assert torch.equal(picker.known.distances, whole.distances)


@pytest.mark.parametrize(("columns", "offset"), [(3, 0), (100, 5), (512, 32), (700, 1), (1024, 0), (3000, 7)])
def test_rows_on_the_same_pages(columns: int, offset: int) -> None:
    page = mmap.PAGESIZE
    floats = torch.zeros(40 * columns + 3 * page)
    shift = (-floats.data_ptr() % page) // 4 + offset
    mapped = MappedRows(floats[shift : shift + 40 * columns].view(40, columns), torch.float32)
    begin = (floats.data_ptr() + 4 * shift + torch.arange(40) * 4 * columns).tolist()
    pages = [{*range(at // page, (at + 4 * columns - 1) // page + 1)} for at in begin]
    for numbers in (torch.tensor([17]), torch.tensor([30, 2, 31]), torch.arange(40)):
        want = {row for row in range(40) for at in numbers.tolist() if pages[row] <= pages[at]}
        assert mapped.on_pages_of(numbers).tolist() == sorted(want)


def write(path: Path, x: Tensor) -> None:
    """Rows as a file of the suffix; "packed.npz" is compressed, "big.npy" of another byte order."""
    features = {"features": x.numpy()}
    if path.name == "packed.npz":
        np.savez_compressed(path, **features)
    elif path.name == "big.npy":
        np.save(path, x.numpy().astype(">f4"))
    elif path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        lists = arrow.FixedSizeListArray.from_arrays(x.numpy().reshape(-1), x.shape[1])
        parquet.write_table(arrow.table({"features": lists}), path, row_group_size=70)
    else:
        with path.open("wb") as file:
            format_of(path).write(file, features)


def file_of(rows: Tensor) -> str | None:
    """The file that rows are mapped from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5) if "/" in line else (line, "")
        begin, _, end = addresses.split()[0].partition("-")
        if int(begin, 16) <= rows.data_ptr() < int(end, 16):
            return name.strip() or None
    return None


FORMATS = ("rows.npy", "big.npy", "rows.npz", "packed.npz", "rows.pt", "rows.safetensors", "rows.parquet")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_mapped_and_gives_the_same_picks(name: str, tmp_path: Path) -> None:
    x = clustered(500, 40, seed=9)
    write(tmp_path / name, x)
    out = tmp_path / "out.npz"
    assert run(tmp_path / name, "--k", 12, "--out", out) == 0
    whole = coreset_select(x, 12, distinct=True, backend="torch")
    with np.load(out) as file:
        assert file["picks"].tolist() == whole.indices.tolist()
        assert file["distances"].tolist() == whole.distances.tolist()
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not say which files are mapped")
    rows, _ = read_rows(tmp_path / name, Keys(), Scratch(tmp_path, 1 << 30))
    unpacked = name in ("big.npy", "packed.npz", "rows.parquet")  # into an unnamed file in the folder
    mapped = str(file_of(rows))
    assert (
        mapped.startswith(str(tmp_path)) and mapped.endswith("(deleted)")
        if unpacked
        else mapped == str(tmp_path / name)
    )


def run(*arguments: object) -> int:
    return main(["select", *map(str, arguments)])


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_the_command_writes_picks_and_says_the_radius(
    metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = clustered(500, 12, seed=6)
    np.save(tmp_path / "rows.npy", x.numpy())
    quality = np.linspace(1, 2, 500)
    np.savez(tmp_path / "rows.npz", features=x.numpy(), quality=quality)
    for name, given in (("rows.npy", None), ("rows.npz", torch.from_numpy(quality).float())):
        out = tmp_path / f"{name}.out.npz"
        assert run(tmp_path / name, "--k", 9, "--gamma", 0.5, "--metric", metric, "--out", out) == 0
        whole = coreset_select(x, 10, given, 0.5, distinct=True, metric=metric, backend="torch")
        with np.load(out) as file:
            assert file["picks"].tolist() == whole.indices[:9].tolist()
            assert file["distances"].tolist() == whole.distances[:9].tolist()
            assert file["covering_radius"].tolist() == whole.distances[1:].tolist()  # after 1, 2, ... picks
        assert f"9 of 500 rows, covering radius {float(whole.distances[9]):.6g}; read" in capsys.readouterr().out
        assert not Path(f"{out}.state").exists()


def test_the_command_says_that_fewer_rows_came_than_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", clustered(20, 4, seed=1).numpy())  # of which three cannot be picked
    assert run(tmp_path / "rows.npy", "--k", 18, "--out", tmp_path / "out.npz") == 0
    said = "17 of 20 rows, not the 18 asked for, as no other can be picked, covering radius"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--start", "500"], "--start 500: expected a row of"),
        (["--start", "3"], "no row can be picked, or not the one"),
        (["--resume"], "there is no run to go on with"),
        (["--labelled", "narrow.npy"], "expected rows of 12 columns, as in the input, got 5"),
        (["--labelled", "bad.npy"], "bad.npy: row 1: is not finite, or zero"),
        (["--features", "x"], "expected floating-point rows, got torch.int64"),
        (["--features", "y"], "expected a column 'y'"),
        (["--features", "z"], "rows.npz: expected at least one row, got none"),
    ],
)
def test_bad_input_is_told(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    features = clustered(500, 12, seed=6).numpy()
    np.savez("rows.npz", features=features, x=np.ones((9, 2), dtype=int), z=np.ones((0, 12), "float32"))
    np.save("narrow.npy", np.ones((4, 5), "float32"))
    np.save("bad.npy", np.array([[1.0] * 12, [0.0] * 12], "float32"))
    assert run("rows.npz", "--k", 3, "--out", "out.npz", *options) == 2
    assert said in capsys.readouterr().err
    assert not Path("out.npz").exists()


def test_a_killed_run_goes_on_to_the_same_picks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "rows.npy", tmp_path / "picks.npz"
    np.save(rows, clustered(3000, 16, seed=7).numpy())
    slow = (
        "import sys, time; from fcn_kernels.cli import select; from fcn_kernels.__main__ import main; "
        "pick = select.Picker.pick; select.SAVE_SECONDS = select.SAVE_TIMES = 0; "
        "select.Picker.pick = lambda self: (time.sleep(0.01), pick(self))[1]; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "select", str(rows), "--k", "120", "--out", str(out)]
    state = Path(f"{out}.state")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def some_picks() -> bool:
        return state.exists() and len(torch.load(state, weights_only=True)["picks"]) > 5

    kill_when(some_picks, command, environment)
    assert not out.exists()
    assert run(rows, "--k", 40, "--out", out) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert run(rows, "--k", 120, "--gamma", 1, "--out", out, "--resume") == 2
    assert "another gamma" in capsys.readouterr().err
    assert run(rows, "--k", 2, "--out", out, "--resume") == 2
    assert "more than --k 2" in capsys.readouterr().err
    assert run(rows, "--k", 120, "--out", out, "--resume") == 0
    whole = tmp_path / "whole.npz"
    assert run(rows, "--k", 120, "--out", whole) == 0
    with np.load(out) as killed, np.load(whole) as other:
        assert killed["picks"].tolist() == other["picks"].tolist()
        assert killed["distances"].tolist() == other["distances"].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_run_goes_on_where_some_rows_have_no_quality(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = np.linspace(1, 2, 100)
    quality[3:5] = value, np.inf  # which are never picked
    np.savez(tmp_path / "rows.npz", features=clustered(100, 8, seed=3).numpy(), quality=quality)
    arguments = (tmp_path / "rows.npz", "--k", 5, "--out", tmp_path / "out.npz")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for where, said in (("read_rows", "there was nothing to keep yet"), ("write_columns", "--resume goes on from")):
        with monkeypatch.context() as during:
            during.setattr(select, where, interrupt)
            assert run(*arguments) == 130
        assert said in capsys.readouterr().err
    assert run(*arguments, "--resume") == 0
