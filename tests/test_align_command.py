"""The align command, and evaluate with a bank: against the functions, with files of every kind, and with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_aggregate import load

from fcn_kernels import align_scores, context_statistics
from fcn_kernels.__main__ import main
from fcn_kernels.evaluation.verification import roc
from fcn_kernels.files import align as library
from fcn_kernels.files.formats import format_of

np = pytest.importorskip("numpy")
for needed in ("pyarrow", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(needed)

DIM, TEMPLATES, BANK = 16, 40, 300


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(kind: Any = int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """INPUT and BANK, with columns of templates and of people."""
    rng = np.random.default_rng(seed)
    people = rng.standard_normal((60, DIM))
    found = []
    for rows, first in ((TEMPLATES, 0), (BANK, 1000)):
        person = rng.integers(0, 60, rows)
        descriptors = (people[person] + rng.standard_normal((rows, DIM))).astype("float32")
        columns = {"descriptors": descriptors, "template_ids": np.arange(rows) + first, "person": person}
        if kind is str:
            columns |= {n: np.array([f"n{v}" for v in columns[n]]) for n in ("template_ids", "person")}
        found.append(columns)
    return found[0], found[1]


def save(**files: dict[str, Any]) -> None:
    for name, columns in files.items():
        np.savez(f"{name}.npz", **columns)


def align(*options: object) -> int:
    return main(["align", *map(str, options)])


def written(name: str = "out.npz") -> dict[str, Any]:
    with np.load(name) as archive:
        return dict(archive)


def rows(columns: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(columns["descriptors"])


def write_pairs(ids: Any, count: int = 200) -> Any:
    """Lines of pairs, and their places."""
    places = np.random.default_rng(1).integers(0, len(ids), (count, 2))
    Path("pairs.csv").write_text("\n".join(f"{ids[a]},{ids[b]},{int(a % 3 == b % 3)}" for a, b in places) + "\n")
    return torch.from_numpy(places.T)


def test_contexts(capsys: pytest.CaptureFixture[str]) -> None:
    one, bank = made()
    save(one=one, bank=bank)
    assert align("one.npz", "--bank", "bank.npz", "--out", "out.npz") == 0
    out = written()
    expected = context_statistics(rows(one), rows(bank), 50)
    assert list(out) == ["template_ids", "mean", "std", "counts"]
    assert out["template_ids"].tolist() == one["template_ids"].tolist()
    for name in ("mean", "std", "counts"):
        assert torch.equal(torch.from_numpy(out[name]), getattr(expected, name))
    said = capsys.readouterr()
    assert said.out == "out.npz: 40 templates against 300 bank rows\n"
    assert "warning" not in said.err


@pytest.mark.parametrize("method", ["mean", "mean-std"])
def test_pairs(method: str) -> None:
    one, bank = made()
    save(one=one, bank=bank)
    a, b = write_pairs(one["template_ids"])
    options = ["--pairs", "pairs.csv", "--k", 60, "--min-cosine", 0.1, "--method", method]
    assert align("one.npz", "--bank", "bank.npz", "--out", "out.npz", *options) == 0
    out, x = written(), rows(one)
    sides = (context_statistics(x[at], rows(bank), 60, min_cosine=0.1) for at in (a, b))
    raw = torch.nn.functional.cosine_similarity(x[a], x[b])
    torch.testing.assert_close(torch.from_numpy(out["raw"]), raw)
    torch.testing.assert_close(
        torch.from_numpy(out["aligned"]), align_scores(raw, *sides, method), rtol=1e-4, atol=1e-5
    )
    assert out["first"].tolist() == one["template_ids"][a].tolist()
    assert out["second"].tolist() == one["template_ids"][b].tolist()
    assert out["same"].tolist() == (a % 3 == b % 3).tolist()


@pytest.mark.parametrize("kind", [int, str])
def test_own_identities_are_left_out(kind: Any) -> None:
    one, bank = made(kind)
    bank["who"] = bank.pop("person")
    save(one=one, bank=bank)
    keys = ["--id-key", "person", "--bank-id-key", "who"]
    assert align("one.npz", "--bank", "bank.npz", "--out", "out.npz", *keys) == 0
    _, numbers = np.unique(np.concatenate([one["person"], bank["who"]]), return_inverse=True)
    ids, bank_ids = torch.from_numpy(numbers).split([TEMPLATES, BANK])
    expected = context_statistics(rows(one), rows(bank), 50, ids=ids, bank_ids=bank_ids)
    assert torch.equal(torch.from_numpy(written()["mean"]), expected.mean)
    assert not torch.equal(expected.mean, context_statistics(rows(one), rows(bank), 50).mean)


def test_identities_above_int64_are_no_negative_ones(capsys: pytest.CaptureFixture[str]) -> None:
    one, bank = made()
    one["person"] = (-1 - one["person"]).astype("uint64")
    bank["person"] = -1 - bank["person"]
    save(one=one, bank=bank)
    assert align("one.npz", "--bank", "bank.npz", "--out", "out.npz", "--id-key", "person") == 2
    assert "got -1 or less in bank.npz, more in one.npz" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors", ".parquet", ".npy"])
def test_formats(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank of each, rows in several blocks, an output of each."""
    one, bank = made()
    save(one=one)
    path = Path(f"bank{suffix}")
    with path.open("wb") as file:
        if suffix == ".npy":
            np.save(file, bank["descriptors"])
        else:
            format_of(path).write(file, bank)
    monkeypatch.setattr(library, "BLOCK_ROWS", 7)
    assert align("one.npz", "--bank", path, "--out", f"out{suffix}") == 0
    expected = context_statistics(rows(one), rows(bank), 50)
    assert load(Path(f"out{suffix}"))["mean"].astype("float32").tolist() == expected.mean.tolist()


def test_doubtful_banks_are_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    one, bank = made()
    bank["descriptors"][[3, 9]] = [[0], [np.nan]]
    save(one=one, bank=bank)
    assert align("one.npz", "--bank", "bank.npz", "--out", "out.npz", "--id-key", "person", "--k", 400) == 0
    said = capsys.readouterr()
    assert "has 60 identities: with fewer than 100" in said.err
    assert "2 rows are not finite or are zero, and are left out" in said.err
    assert said.out == "out.npz: 40 templates against 300 bank rows; fewer than 400 neighbors: 40, none: 0\n"
    assert align("one.npz", "--bank", "one.npz", "--out", "out.npz", "--overwrite", "--k", 5) == 0
    said = capsys.readouterr()
    assert "has 40 rows" in said.err
    assert "--k 5: with fewer than 50" in said.err
    assert "BANK is INPUT" in said.err


BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "columns": ("one.npz has 16 columns, thin.npz has 3", ("one.npz", "--bank", "thin.npz")),
    "no bank": ("absent.npz: cannot be read", ("one.npz", "--bank", "absent.npz")),
    "column": ("expected a column 'features'", ("one.npz", "--bank", "bank.npz", "--bank-features", "features")),
    "nothing usable": ("none among 4", ("one.npz", "--bank", "zeros.npz")),
    "not finite": ("bad.npz: template 1005: expected a finite", ("bad.npz", "--bank", "bank.npz")),
    "kinds": ("ids of one kind", ("one.npz", "--bank", "text.npz", "--id-key", "person")),
    "bank's ids alone": ("expected --id-key with it", ("one.npz", "--bank", "bank.npz", "--bank-id-key", "person")),
    "k": ("expected at least 2", ("one.npz", "--bank", "bank.npz", "--k", 1, "--method", "mean-std")),
    "cap": ("expected -1 to 1", ("one.npz", "--bank", "bank.npz", "--min-cosine", 2)),
    "unknown template": ("template 77 is not in one.npz", ("one.npz", "--bank", "bank.npz", "--pairs", "other.csv")),
    "no pairs": ("absent.csv: cannot be read", ("one.npz", "--bank", "bank.npz", "--pairs", "absent.csv")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_written(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, bank = made()
    bad = {n: c.copy() for n, c in bank.items()}
    bad["descriptors"][5, 3] = np.inf
    thin, zeros = ({"descriptors": d, "template_ids": np.arange(4)} for d in (np.ones((4, 3)), np.zeros((4, DIM))))
    save(one=one, bank=bank, bad=bad, thin=thin, zeros=zeros, text=made(str)[1])
    Path("other.csv").write_text("1,2,1\n1,77,0\n")
    message, options = BAD[name]
    assert align(*options, "--out", "out.npz") == 2
    assert message in capsys.readouterr().err
    assert not Path("out.npz").exists()
    assert not list(Path().glob(".fcn*"))


def test_an_output_is_not_replaced_unasked_nor_an_input_ever(capsys: pytest.CaptureFixture[str]) -> None:
    one, bank = made()
    save(one=one, bank=bank)
    Path("out.npz").write_text("mine")
    assert align("one.npz", "--bank", "bank.npz", "--out", "out.npz") == 2
    assert Path("out.npz").read_text() == "mine"
    assert align("one.npz", "--bank", "bank.npz", "--out", "bank.npz", "--overwrite") == 2
    assert "is read from, and cannot be written too" in capsys.readouterr().err


def test_evaluate_compares_raw_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs and searches, against brute force."""
    one, bank = made()
    save(one=one, bank=bank)
    ids, person, x = one["template_ids"], torch.from_numpy(one["person"]), rows(one)
    a, b = torch.triu_indices(TEMPLATES, TEMPLATES, 1)
    same = person[a] == person[b]
    Path("pairs.csv").write_text("\n".join(f"{ids[i]},{ids[j]},{int(s)}" for i, j, s in zip(a, b, same, strict=True)))
    Path("gallery.csv").write_text("t,s\n" + "\n".join(f"{ids[i]},{person[i]}" for i in range(20)))
    Path("probes.csv").write_text("t,s\n" + "\n".join(f"{ids[i]},{person[i]}" for i in range(20, TEMPLATES)))
    files = ["--pairs", "pairs.csv", "--gallery", "gallery.csv", "--probes", "probes.csv", "--bank", "bank.npz"]
    assert main(["evaluate", "one.npz", *files, "--method", "mean-std", "--k", "60", "--out", "r.json"]) == 0
    said = capsys.readouterr().out
    assert "one.npz, aligned" in said
    found = json.loads(Path("r.json").read_text())
    context = context_statistics(x, rows(bank), 60)
    unit = torch.nn.functional.normalize(x)
    aligned = align_scores(unit @ unit.T, context, context, "mean-std")
    for name, scores in (("one.npz", unit @ unit.T), ("one.npz, aligned", aligned)):
        assert found[name]["1:1"]["eer"] == pytest.approx(roc(scores[a, b], same).eer(), abs=1e-6)
        table = scores[20:, :20]
        mated = (person[20:, None] == person[:20]).any(1)
        own = table.masked_fill(person[20:, None] != person[:20], -torch.inf).amax(1)[mated]
        first = (own == table.amax(1)[mated]).float().mean()
        within = found[name]["1:N"]["gallery.csv"]["within_rank"]["1"]
        assert within == pytest.approx(float(first), abs=1e-6)
    assert "BANK is INPUT" not in said
    assert main(["evaluate", "one.npz", "--pairs", "pairs.csv", "--bank", "one.npz"]) == 0
    assert "BANK is INPUT, where each row is its own nearest neighbor" in capsys.readouterr().out
    assert main(["evaluate", "one.npz", "--pairs", "pairs.csv", "--k", "60"]) == 2
    assert "expected --bank with them" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [int, str])
def test_evaluate_takes_what_align_wrote(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Contexts in any order, or scores of the pairs: the numbers are those of the bank itself."""
    one, bank = made(kind)
    save(one=one, bank=bank)
    write_pairs(one["template_ids"])
    evaluate = ["evaluate", "one.npz", "--pairs", "pairs.csv", "--overwrite", "--out", "r.json"]

    def rates(*options: str) -> Any:
        """Of raw and aligned scores."""
        assert main([*evaluate, *options]) == 0, capsys.readouterr().err
        found = {name: result["1:1"] for name, result in json.loads(Path("r.json").read_text()).items()}
        assert list(found) == ["one.npz", "one.npz, aligned"]
        return {name: one["tar_at_far"] | {"eer": pytest.approx(one["eer"])} for name, one in found.items()}

    assert align("one.npz", "--bank", "bank.npz", "--out", "c.npz") == 0
    assert align("one.npz", "--bank", "bank.npz", "--pairs", "pairs.csv", "--out", "p.npz") == 0
    order = np.random.default_rng(2).permutation(TEMPLATES)
    save(c={name: column[order] for name, column in written("c.npz").items()})
    expected = rates("--bank", "bank.npz")
    assert expected["one.npz"] != expected["one.npz, aligned"]
    assert rates("--aligned", "c.npz") == expected
    assert rates("--aligned", "p.npz") == expected
    normed = rates("--bank", "bank.npz", "--method", "mean-std")
    assert rates("--aligned", "c.npz", "--method", "mean-std") == normed


def test_evaluate_refuses_what_align_wrote_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    one, bank = made()
    save(one=one, bank=bank)
    write_pairs(one["template_ids"])
    assert align("one.npz", "--bank", "bank.npz", "--out", "c.npz") == 0
    assert align("one.npz", "--bank", "bank.npz", "--pairs", "pairs.csv", "--out", "p.npz") == 0
    contexts, scored, lines = written("c.npz"), written("p.npz"), Path("pairs.csv").read_text().splitlines()
    save(lacking={name: column[1:] for name, column in contexts.items()})
    save(spoiled=contexts | {"mean": contexts["mean"] * np.nan}, short={n: c[:-1] for n, c in scored.items()})
    save(more={name: np.concatenate([column, column]) for name, column in scored.items()})
    Path("other.csv").write_text("\n".join([*lines[:7], lines[8], lines[7], *lines[9:]]))
    for options, said in (
        (["--aligned", "lacking.npz"], "template 0 of one.npz is not there"),
        (["--aligned", "spoiled.npz"], "expected finite numbers in 'mean'"),
        (["--aligned", "bank.npz"], "expected a column 'mean'"),
        (["--aligned", "short.npz"], "short.npz has 199 pairs, --pairs has more"),
        (["--aligned", "more.npz"], "more.npz has 400 pairs, pairs.csv has 200"),
        (["--aligned", "p.npz", "--pairs", "other.csv"], "pair 8: expected the pairs of --pairs, in its order"),
        (["--aligned", "p.npz", "--method", "mean-std"], "expected --pairs alone, and no --method"),
        (["--aligned", "c.npz", "--bank", "bank.npz"], "expected one INPUT, and no --bank"),
        (["--aligned", "c.npz", "--k", "60"], "expected --bank with them"),
    ):
        assert main(["evaluate", "one.npz", "--pairs", "pairs.csv", *options]) == 2
        assert said in capsys.readouterr().err
