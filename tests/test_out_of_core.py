"""Selection from a file: the picks of the whole in memory, from few reads, and a run that goes on."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from killed import kill_when
from torch import Tensor

from fcn_kernels import coreset_select
from fcn_kernels.__main__ import main
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
    picker.block = 17
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


def test_few_rows_are_read() -> None:
    x = clustered(10_000, 16, seed=5)
    read = []
    picker = Picker(x, progress=read.append)
    picker.block = 250
    picked(picker, 50)
    assert sum(read) < 3.5 * len(x)  # 50 passes, if each pick met every row


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
        assert f"9 of 500 rows, covering radius {float(whole.distances[9]):.6g}; read" in capsys.readouterr().out
        assert not Path(f"{out}.state").exists()


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
    ],
)
def test_bad_input_is_told(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", features=clustered(500, 12, seed=6).numpy(), x=np.ones((9, 2), dtype=int))
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
        "pick = select.Picker.pick; select.SAVE_SECONDS = 0; "
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
