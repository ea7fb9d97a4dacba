"""The train command: what it learns on digits, what a seed and a kill leave of it, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import kill_when
from torch.nn import functional as F

from fcn_kernels.__main__ import main
from fcn_kernels.cli.train import start_from_rows, unit_rows
from fcn_kernels.evaluation.verification import roc
from fcn_kernels.files.checkpoint import load_checkpoint
from fcn_kernels.files.embeddings import Keys, read
from fcn_kernels.files.formats import Scratch
from fcn_kernels.heads.adaface import AdaFace
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.heads.facecoresetnet import CoresetAggregator
from fcn_kernels.integrations.facecoresetnet import build_head
from fcn_kernels.training.draw import Recipe, draw, group

np = pytest.importorskip("numpy")
datasets = pytest.importorskip("sklearn.datasets")
for needed in ("tqdm", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LEARN = 1000  # images; the other 797 make templates that no run has seen
SHORT = ["--hold-out", "rows", "--corrupt", "0.5", "--duplicates", "0.3", "--batch", "16", "--validation-sets", "60"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A file of embeddings of the first images; embeddings and labels of the others."""
    data = datasets.load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32)
    embeddings = pixels - pixels[:LEARN].mean(0)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, features=embeddings[:LEARN].numpy(), digit=data.target[:LEARN])
    return path, embeddings[LEARN:], torch.tensor(data.target[LEARN:])


def train(source: Path, out: Path, *options: str) -> int:
    return main(["train", str(source), "--ids", "digit", "--out", str(out), *SHORT, *options])


def templates(embeddings: torch.Tensor, labels: torch.Tensor, path: Path, seed: int) -> torch.Tensor:
    """A file of 200 corrupted templates; their labels."""
    torch.manual_seed(seed)
    norms = embeddings.norm(dim=1)
    rows = group(embeddings / norms[:, None], norms, labels, 10)
    sets = draw(rows, torch.arange(200) % 10, Recipe(corrupt=0.5, duplicates=0.3))
    ids = torch.arange(200).repeat_interleave(sets.cu_seqlens.diff().long())
    np.savez(path, features=sets.unit.numpy(), quality=sets.quality.numpy(), template_ids=ids.numpy())
    return sets.labels


def tar_of(source: Path, labels: torch.Tensor, out: Path, *options: str) -> float:
    """TAR at FAR 0.01 over all pairs of the descriptors that `aggregate` writes."""
    assert main(["aggregate", str(source), "--out", str(out), "--overwrite", *options]) == 0
    with np.load(out) as written:
        descriptors = torch.from_numpy(written["descriptors"])
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    scores = (descriptors[first] * descriptors[second]).sum(1)
    return roc(scores, labels[first] == labels[second]).tar_at([1e-2])[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_head_learns_and_aggregates_better_than_the_coreset_alone(
    digits: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    source, embeddings, labels = digits
    out = tmp_path / "head.pt"
    assert train(source, out, "--steps", "200", "--every", "25", "--rate", "5e-3", "--seed", str(seed)) == 0
    said = capsys.readouterr().out
    first, last = map(float, re.search(r"steps: ([\d.]+) -> ([\d.]+)", said).groups())  # type: ignore[union-attr]
    assert last < first
    gamma = float(re.search(r"gamma: 1 -> ([-\d.]+)", said)[1])  # type: ignore[index]
    assert abs(gamma - 1) > 0.01
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not Path(f"{out}.state").exists()
    held_out = tmp_path / "templates.npz"
    sets = templates(embeddings, labels, held_out, seed)
    trained = tar_of(held_out, sets, tmp_path / "d.npz", "--checkpoint", str(out))
    alone = tar_of(held_out, sets, tmp_path / "d.npz", "--gamma", "1")
    print(f"seed {seed}: trained {trained:.3f}, coreset alone {alone:.3f}")
    assert trained > alone + 0.02


def test_clusters_learn_to_leave_corrupted_rows_out(
    digits: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, embeddings, labels = digits
    out = tmp_path / "head.pt"
    options = ["--head", "cluster", "--clusters", "2", "--depth", "1", "--num-heads", "4"]
    assert train(source, out, *options, "--steps", "80", "--every", "40", "--rate", "3e-3") == 0
    said = capsys.readouterr().out
    first, last = map(float, re.search(r"steps: ([\d.]+) -> ([\d.]+)", said).groups())  # type: ignore[union-attr]
    assert last < first
    assert "gamma:" not in said
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    head = ClusterAggregate(64, 2, 1, style_dim=0, num_heads=4).eval()
    head.load_state_dict(load_checkpoint(out))
    held_out = tmp_path / "templates.npz"
    sets = templates(embeddings, labels, held_out, seed=0)
    with np.load(held_out) as file:
        unit, quality, ids = (torch.from_numpy(file[name]) for name in ("features", "quality", "template_ids"))
    starts = torch.searchsorted(ids, torch.arange(201))
    trained = head(unit, quality=quality, cu_seqlens=starts).descriptor.detach()
    mean = F.normalize(torch.stack([rows.mean(0) for rows in unit.tensor_split(starts[1:-1])]), dim=-1)
    one, other = torch.triu_indices(200, 200, 1)
    found, plain = (
        roc((d[one] * d[other]).sum(1), sets[one] == sets[other]).tar_at([1e-2])[0] for d in (trained, mean)
    )
    print(f"trained {found:.3f}, mean of all rows {plain:.3f}")
    assert found > plain + 0.02
    assert train(source, out, "--head", "cluster", "--num-heads", "7", "--overwrite") == 2
    assert "expected a divisor of 64" in capsys.readouterr().err


def test_a_killed_run_goes_on_with_the_same_numbers(
    digits: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = digits[0]
    plan = ["--steps", "120", "--every", "10", "--patience", "100", "--rate", "5e-3"]
    assert train(source, tmp_path / "whole.pt", *plan) == 0
    said = capsys.readouterr().out
    out, state = tmp_path / "killed.pt", tmp_path / "killed.pt.state"
    command = [sys.executable, "-m", "fcn_kernels", "train", str(source), "--ids", "digit", "--out", str(out)]
    kill_when(state.exists, [*command, *SHORT, *plan], ENVIRONMENT)
    assert not out.exists()
    assert 0 < torch.load(state, weights_only=True)["step"] < 120
    assert train(source, out, *plan) == 2  # neither --resume nor --overwrite
    assert train(source, out, *plan, "--resume", "--seed", "1") == 2  # another run
    assert train(source, out, *plan, "--resume") == 0
    assert capsys.readouterr().out.replace("killed.pt", "whole.pt") == said
    whole, killed = (torch.load(path, weights_only=True) for path in (tmp_path / "whole.pt", out))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not state.exists()
    assert whole["cross_norm.weight"].any()  # it is not the head before training, which is the same in any case


def test_two_processes_train_one_head(digits: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "head.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fcn_kernels", "train", str(digits[0]), "--ids", "digit", "--out", str(out), *SHORT]
    done = subprocess.run([*command, "--steps", "20", "--every", "10"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss, first and last tenth of 20 steps") == 1
    assert build_head(load_checkpoint(out)).dim == 64


def test_a_batch_that_processes_cannot_share_evenly_has_its_own_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one step, in which nothing but the sets is drawn: one row each, without dropout and margin."""
    source = embeddings(tmp_path / "in.npz")
    options = [*SHORT, *QUICK, "--steps", "1", "--longest", "1", "--dropout", "0", "--loss", "cosine"]
    command = ["train", str(source), "--ids", "digit", *options, "--out"]
    assert main([*command, str(tmp_path / "one.pt"), "--batch", "3"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def two(batch: int) -> subprocess.CompletedProcess[str]:
        run = [*torchrun, "-m", "fcn_kernels", *command, str(tmp_path / f"two-{batch}.pt"), "--batch", str(batch)]
        return subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True)

    losses = [
        float(number)
        for said in (capsys.readouterr().out, two(3).stdout)
        for number in re.findall(r"of 1 steps: ([\d.]+)", said)
    ]
    assert losses == [pytest.approx(losses[0], abs=2e-4)] * 2
    assert "--batch 1: expected a set at least for each of 2 processes" in two(1).stderr


def test_the_shares_of_the_processes_are_the_batch() -> None:
    torch.manual_seed(0)
    rows = group(F.normalize(torch.randn(30, 8), dim=1), torch.rand(30) + 1, torch.arange(30) % 3, 3)
    batch = draw(rows, torch.tensor([0, 1, 2, 1, 0]), Recipe(longest=4))
    shares = [batch.share(rank, 2) for rank in range(2)]
    parts: Any = [part.unit.split(part.cu_seqlens.diff().tolist()) for part in (batch, *shares)]
    assert torch.equal(batch.labels[0::2], shares[0].labels)
    assert torch.equal(batch.labels[1::2], shares[1].labels)
    for number, rows_of_set in enumerate(parts[0]):
        assert torch.equal(rows_of_set, parts[1 + number % 2][number // 2])


def test_drawn_rows_are_the_identitys_and_corruption_lowers_their_quality() -> None:
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(40, 32), dim=1)
    quality, identity = torch.rand(40) + 1, torch.arange(40) % 4
    rows, labels = group(unit, quality, identity, 4), torch.arange(100) % 4
    clean = draw(rows, labels, Recipe(longest=5))
    assert set(clean.cu_seqlens.diff().tolist()) == {1, 2, 3, 4, 5}
    nearest = (clean.unit @ unit.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(len(clean.unit)))
    assert torch.equal(identity[nearest.indices], labels.repeat_interleave(clean.cu_seqlens.diff().long()))
    torch.testing.assert_close(clean.quality, quality[nearest.indices])
    spoiled = draw(rows, labels, Recipe(longest=5, corrupt=1.0))
    assert spoiled.quality.max() <= quality.max() / 2
    torch.testing.assert_close(spoiled.unit.norm(dim=1), torch.ones(len(spoiled.unit)))
    repeated = draw(rows, labels, Recipe(longest=5, duplicates=1.0))
    for one in repeated.unit.split(repeated.cu_seqlens.diff().tolist()):
        assert (one @ one[0]).min() > 0.99


def test_a_head_starts_as_the_mean_of_its_coreset() -> None:
    torch.manual_seed(0)
    unit, quality = F.normalize(torch.randn(12, 16), dim=1), torch.rand(12) + 0.5
    head = CoresetAggregator(16, num_heads=4).eval()
    start_from_rows(head, AdaFace(16, 3), group(unit, quality, torch.arange(12) % 3, 3))
    descriptor, _, coreset = head(unit, quality)
    torch.testing.assert_close(descriptor, F.normalize(coreset.features.mean(0), dim=0))


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e18, 1e30])
def test_where_training_starts_does_not_depend_on_the_rows_lengths(tmp_path: Path, size: float) -> None:
    """Their squares leave float32 by far."""
    torch.manual_seed(0)
    features, ids = torch.randn(12, 16), np.arange(12) % 3
    starts = []
    for scale in (1.0, size):
        np.savez(tmp_path / "in.npz", features=(features * scale).numpy(), digit=ids)
        unit, quality = unit_rows(read([tmp_path / "in.npz"], Keys(ids="digit"), Scratch(tmp_path, 0)))
        head, classifier = CoresetAggregator(16, num_heads=4), AdaFace(16, 3)
        start_from_rows(head, classifier, group(unit, quality, torch.from_numpy(ids), 3))
        starts.append((unit, quality / scale, classifier.weight.detach()))
    torch.testing.assert_close(starts[1], starts[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--far", "1e-9"], "--far 1e-09: expected at least"),
        (["--share", "1", "--hold-out", "identities"], "at least 2 to learn from"),
        (["--resume"], "there is no run to go on with"),
        (["--num-heads", "7"], "divisible by num_heads = 7"),
        (["--quality", "nothing"], "expected a column 'nothing'"),
    ],
)
def test_what_it_refuses(
    digits: tuple[Path, torch.Tensor, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert train(digits[0], tmp_path / "head.pt", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


QUICK = ["--steps", "2", "--every", "1", "--validation-sets", "12", "--batch", "2", "--longest", "3", "--far", "0.1"]


def embeddings(path: Path, **columns: Any) -> Path:
    """A small file: 4 identities with 6 rows each, unless columns say otherwise."""
    rng = np.random.default_rng(0)
    made = {"features": rng.standard_normal((24, 8)).astype("float32"), "digit": np.arange(24) % 4}
    np.savez(path, **(made | {"quality": np.linspace(1, 2, 24)} | columns))
    return path


def test_a_picture_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, picture = embeddings(tmp_path / "in.npz"), tmp_path / "anna.png"
    picture.write_bytes(b"of Anna")
    assert train(source, tmp_path / "anna.pt", *QUICK) == 2
    assert f"{picture}: is there already; --overwrite replaces it" in capsys.readouterr().err
    assert picture.read_bytes() == b"of Anna"
    (tmp_path / "folder.png").mkdir()
    assert train(source, tmp_path / "folder.pt", *QUICK, "--overwrite") == 2
    assert "folder.png: is a folder" in capsys.readouterr().err
    assert not (tmp_path / "folder.pt").exists()
    assert train(source, tmp_path / "anna.pt", *QUICK, "--overwrite") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("hold_out", ["identities", "rows"])
def test_identities_of_one_row_are_too_few(hold_out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for many in (0, 1):  # with two rows or more
        digit = np.arange(24)
        digit[: 3 * many] = 0
        source = embeddings(tmp_path / "in.npz", digit=digit)
        assert train(source, tmp_path / "head.pt", *QUICK, "--hold-out", hold_out) == 2
        assert f"of which {many} have as many rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "values"), [("division in identities", np.arange(24) // 6), ("sum of the qualities", np.ones(24))]
)
def test_a_run_does_not_go_on_with_other_columns(
    changed: str, values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = embeddings(tmp_path / "in.npz"), tmp_path / "head.pt"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("fcn_kernels.cli.train.replacing", interrupt)
        assert train(source, out, *QUICK) == 130
    embeddings(source, **{"digit" if "identities" in changed else "quality": values})
    assert train(source, out, *QUICK, "--resume") == 2
    assert f"is of a run with another {changed}" in capsys.readouterr().err


def test_any_seed_that_pytorch_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = embeddings(tmp_path / "in.npz")
    for seed in ("-1", str(2**64 - 1)):
        assert train(source, tmp_path / "head.pt", *QUICK, "--overwrite", "--seed", seed) == 0
    for option, value, said in (
        ("--seed", str(2**64), "expected a whole number from -2^63 to 2^64 - 1"),
        ("--seed", "1.5", "expected a whole number from -2^63 to 2^64 - 1"),
        ("--rate", "nan", "expected a finite number"),
        ("--rate", "0", "expected a number above 0"),
    ):
        with pytest.raises(SystemExit):
            train(source, tmp_path / "head.pt", *QUICK, option, value)
        assert f"argument {option}: {said}, got {value}" in capsys.readouterr().err


def test_a_bad_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = np.ones((12, 8), dtype=np.float32)
    features[5] = 0
    np.savez(tmp_path / "in.npz", features=features, digit=np.arange(12) % 3)
    assert train(tmp_path / "in.npz", tmp_path / "head.pt") == 2
    assert "row 5 of template 2: the norm of its features is 0" in capsys.readouterr().err
