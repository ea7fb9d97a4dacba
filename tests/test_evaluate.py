"""The evaluate command: IJB's files as they are, against brute force, and what it does with bad ones."""

from __future__ import annotations

import errno
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fcn_kernels.__main__ import main
from fcn_kernels.evaluation import identification, templates
from fcn_kernels.evaluation.identification import search
from fcn_kernels.files import tables

np = pytest.importorskip("numpy")
metrics = pytest.importorskip("sklearn.metrics")
for needed in ("pyarrow", "tqdm", "matplotlib"):
    pytest.importorskip(needed)

DIM, SUBJECTS = 16, 12


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(seed: int = 0, count: int = 60) -> tuple[Any, Any, Any]:
    """Descriptors (B, C) that are not unit rows, ids (B,) in no order, subjects (B,)."""
    rng = np.random.default_rng(seed)
    subject = rng.integers(0, SUBJECTS, count)
    centers = rng.standard_normal((SUBJECTS, DIM))
    rows = (centers[subject] + rng.standard_normal((count, DIM))).astype("float32")
    return rows, rng.permutation(count) * 3 + 1, subject


def cosine(rows: Any) -> Any:
    unit = rows.astype("float64") / np.linalg.norm(rows.astype("float64"), axis=1, keepdims=True)
    return unit @ unit.T


def all_pairs(ids: Any, subject: Any) -> tuple[list[str], Any]:
    """Lines of all pairs in a mixed order, and their places."""
    places = np.stack(np.triu_indices(len(ids), 1), 1)
    places = np.random.default_rng(1).permutation(places)
    return [f"{ids[a]} {ids[b]} {int(subject[a] == subject[b])}" for a, b in places], places


def evaluate(*options: object) -> int:
    return main(["evaluate", *map(str, options)])


def test_pairs_of_ijbs_file_as_brute_force_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows, ids, subject = made()
    np.savez("d.npz", descriptors=rows, template_ids=ids)
    lines, places = all_pairs(ids, subject)
    Path("x_template_pair_label.txt").write_text("\n".join(lines) + "\n")
    assert evaluate("d.npz", "--pairs", "x_template_pair_label.txt", "--out", "o.json") == 0
    scores, genuine = cosine(rows)[tuple(places.T)], subject[places[:, 0]] == subject[places[:, 1]]
    far, tar, threshold = metrics.roc_curve(genuine, scores, drop_intermediate=False)
    got = json.loads(Path("o.json").read_text())["d.npz"]["1:1"]
    assert (got["genuine"], got["impostor"]) == (genuine.sum(), (~genuine).sum())
    for wanted in (1e-2, 1e-1):
        best = (far <= wanted).nonzero()[0][-1]
        assert got["tar_at_far"][f"{wanted:g}"] == pytest.approx(tar[best], abs=1e-12)
        first = threshold[tar >= tar[best]][0]
        assert got["threshold_at_far"][f"{wanted:g}"] == pytest.approx(first, abs=1e-6)
    assert got["tar_at_far"]["1e-06"] is None
    crossing = np.argmin(abs(far - (1 - tar)))
    assert got["eer"] == pytest.approx((far[crossing] + 1 - tar[crossing]) / 2, abs=2 / genuine.sum())
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"1:1, {len(genuine):,} pairs, {genuine.sum():,} of one identity: TAR at FAR"
    assert said[2].split()[1] == "-"
    assert said[2].split()[5:] == [f"{got['tar_at_far'][far]:.4f}" for far in ("0.01", "0.1")] + [f"{got['eer']:.4f}"]
    assert Path("o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("form", ["names", "csv", "tabs", "text ids", "commas in ids", "crlf"])
def test_other_forms_of_pairs_give_the_same(form: str) -> None:
    rows, ids, subject = made()
    lines, _ = all_pairs(ids, subject)
    np.savez("d.npz", descriptors=rows, template_ids=ids)
    Path("plain.txt").write_text("\n".join(lines))
    assert evaluate("d.npz", "--pairs", "plain.txt", "--out", "plain.json") == 0
    end, separator = ("\r\n", " ") if form == "crlf" else ("\n", "\t" if form == "tabs" else ",")
    if "ids" in form:
        name = "person, " if form == "commas in ids" else "person "
        np.savez("d.npz", descriptors=rows, template_ids=np.array([f"{name}{i}" for i in ids]))
        lines = [",".join([*(f'"{name}{i}"' for i in line.split()[:2]), line.split()[2]]) for line in lines]
    lines = [line.replace(" ", separator) if "ids" not in form else line for line in lines]
    if form == "names":
        lines = ["first,second,same", *lines]
    Path("other.csv").write_bytes(end.join(lines).encode())
    assert evaluate("d.npz", "--pairs", "other.csv", "--out", "other.json") == 0
    assert Path("other.json").read_text() == Path("plain.json").read_text()


def test_packed_input_may_lie_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ids, subject = made()
    np.savez_compressed("d.npz", descriptors=rows, template_ids=ids)
    Path("p.txt").write_text("\n".join(all_pairs(ids, subject)[0]))
    here, real = Path().absolute(), tempfile.TemporaryFile

    def refused(dir: Path) -> Any:
        if dir == here:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("fcn_kernels.files.formats.TemporaryFile", refused)
    assert evaluate("d.npz", "--pairs", "p.txt") == 0


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ids, subject = made()
    np.savez("d.npz", descriptors=rows, template_ids=ids)
    Path("p.txt").write_text("\n".join(all_pairs(ids, subject)[0]))
    Path("g.csv").write_text("T,S\n" + "".join(f"{ids[i]},{subject[i]}\n" for i in range(20) if subject[i] < 9))
    Path("q.csv").write_text("T,S\n" + "".join(f"{ids[i]},{subject[i]}\n" for i in range(20, 60)))
    options = ("--pairs", "p.txt", "--gallery", "g.csv", "--probes", "q.csv")
    assert evaluate("d.npz", *options, "--out", "whole.json") == 0
    for module, name, value in ((tables, "BLOCK", 100), (templates, "PIECE", 7 * DIM), (identification, "BLOCK", 3)):
        monkeypatch.setattr(module, name, value)
    assert evaluate("d.npz", *options, "--out", "parts.json") == 0
    whole, parts = (json.loads(Path(f"{name}.json").read_text())["d.npz"] for name in ("whole", "parts"))
    assert parts["1:1"] == whole["1:1"]
    for of, values in whole["1:N"]["g.csv"].items():  # a matrix product of another shape may round the last digit so
        assert parts["1:N"]["g.csv"][of] == (pytest.approx(values) if "at_fpir" in of else values)


def test_searches_as_brute_force_has_them() -> None:
    rows, _, subject = made(3, 120)
    unit = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)
    names = np.array([f"s{value}" for value in subject])
    inside = np.flatnonzero((subject < 9) & (np.arange(120) < 40))  # several templates of a subject
    probes = np.arange(40, 120)
    found = search(unit[inside], names[inside], unit[probes], names[probes])
    cosines = cosine(rows)
    ranks, right, wrong = [], [], []
    for probe in probes:
        best = {name: cosines[probe, inside[names[inside] == name]].max() for name in set(names[inside])}
        if names[probe] not in best:
            wrong.append(max(best.values()))
            continue
        own = best[names[probe]]
        ranks.append(sum(value >= own for value in best.values()))
        right.append(own if ranks[-1] == 1 else -math.inf)
    assert 20 < sum(score > -math.inf for score in right) < len(right)
    assert len(wrong) > 10
    assert found.ranks.tolist() == ranks
    assert found.within(5) == np.mean(np.array(ranks) <= 5)
    assert found.roc is not None
    for fpir in (0.1, 0.3):
        tpirs = [np.mean(np.array(right) >= t) for t in [*right, math.inf] if np.mean(np.array(wrong) >= t) <= fpir]
        assert found.roc.tar_at([fpir]) == [pytest.approx(max(tpirs))]


def test_a_tie_with_another_subject_is_not_rank_one() -> None:
    rows = torch.eye(3)[[0, 0, 1]]
    found = search(rows, np.array(["a", "b", "c"]), torch.eye(3)[[0, 1, 2]], np.array(["b", "c", "nobody"]))
    assert found.ranks.tolist() == [2, 1]


def test_two_galleries_of_ijb_give_their_mean(capsys: pytest.CaptureFixture[str]) -> None:
    rows, ids, subject = made()
    np.savez("d.npz", descriptors=rows, template_ids=ids)
    # several lines of a template, as IJB has one an image, and columns after the two
    names = "TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X\n"
    for name, of in (("G1", range(0, 6)), ("G2", range(6, SUBJECTS))):
        lines = [f'{ids[i]},{subject[i]},"img/{n}.jpg",{n}\n' for i in range(30) if subject[i] in of for n in range(2)]
        Path(f"{name}.csv").write_text(names + "".join(lines))
    Path("probes.csv").write_text(names + "".join(f"{ids[i]},{subject[i]},,\n" for i in range(30, 60)))
    assert evaluate("d.npz", "--gallery", "G1.csv", "G2.csv", "--probes", "probes.csv", "--out", "o.json") == 0
    got = json.loads(Path("o.json").read_text())["d.npz"]["1:N"]
    assert sum(one["probes_in_gallery"] for one in got.values()) == sum(np.isin(subject[30:], subject[:30]))
    assert got["G1.csv"]["probes_not_in_gallery"] == 30 - got["G1.csv"]["probes_in_gallery"]
    last = capsys.readouterr().out.splitlines()[-1].split()
    for column, key in ((1, ("within_rank", "1")), (6, ("tpir_at_fpir", "0.1"))):
        values = [one[key[0]][key[1]] for one in got.values()]
        assert last[column] == f"{sum(values) / 2:.4f}"


def test_a_closed_gallery_has_ranks_and_no_tpir(capsys: pytest.CaptureFixture[str]) -> None:
    rows, ids, subject = made()
    np.savez("d.npz", descriptors=rows, template_ids=ids)
    Path("g.csv").write_text("T,S\n" + "".join(f"{ids[i]},{subject[i]}\n" for i in range(60)))
    assert evaluate("d.npz", "--gallery", "g.csv", "--probes", "g.csv", "--out", "o.json") == 0
    got = json.loads(Path("o.json").read_text())["d.npz"]["1:N"]["g.csv"]
    within = {"1": 1.0, "5": 1.0, "10": 1.0}
    assert got == {"probes_in_gallery": 60, "probes_not_in_gallery": 0, "within_rank": within}
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == ["1.0000"] * 3 + ["-"] * 3


def test_probes_of_whom_none_is_in_the_gallery_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows, ids, _ = made()
    np.savez("d.npz", descriptors=rows, template_ids=ids)
    Path("g.csv").write_text("T,S\n" + "".join(f"{i},a\n" for i in ids[:30]))
    Path("q.csv").write_text("T,S\n" + "".join(f"{i},b\n" for i in ids[30:]))
    assert evaluate("d.npz", "--gallery", "g.csv", "--probes", "q.csv", "--out", "o.json") == 0
    assert "g.csv: 0 probes in it, 30 not" in capsys.readouterr().out
    assert json.loads(Path("o.json").read_text())["d.npz"]["1:N"]["g.csv"]["probes_not_in_gallery"] == 30


@pytest.mark.parametrize("form", ["npy", "npy, big-endian", "npz"])
def test_images_and_media_make_the_usual_baseline(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows, ids, subject = made()
    template = rng.permutation(np.concatenate([ids, rng.choice(ids, 200)]))
    medium = template * 10 + rng.integers(0, 3, len(template))
    at = {one: place for place, one in enumerate(ids)}
    images = (rows[[at[one] for one in template]] + rng.standard_normal((len(template), DIM))).astype("float32")
    Path("x_face_tid_mid.txt").write_text(
        "".join(f"{n}.jpg {t} {m}\n" for n, (t, m) in enumerate(zip(template, medium, strict=True)))
    )
    lines, _ = all_pairs(ids, subject)
    Path("p.txt").write_text("\n".join(lines))
    form, _, order = form.partition(", ")
    if form == "npy":
        np.save("images.npy", images.astype(images.dtype.newbyteorder(">")) if order else images)
    else:
        np.savez("images.npz", features=images, template_ids=template)
    sums = [
        sum(images[medium == m].astype("float64").mean(0) for m in np.unique(medium[template == one])) for one in ids
    ]
    np.savez("d.npz", descriptors=np.array(sums, "float32"), template_ids=ids)
    monkeypatch.setattr(templates, "IMAGES", 11)
    assert evaluate(f"images.{form}", "--media", "x_face_tid_mid.txt", "--pairs", "p.txt", "--out", "media.json") == 0
    assert evaluate("d.npz", "--pairs", "p.txt", "--out", "d.json") == 0
    got, expected = (json.loads(Path(f"{name}.json").read_text()).popitem()[1]["1:1"] for name in ("media", "d"))
    assert got["tar_at_far"] == expected["tar_at_far"]
    assert got["eer"] == pytest.approx(expected["eer"])


def test_descriptors_of_zeros_score_zero_and_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], "float32")
    np.savez("d.npz", descriptors=rows, template_ids=np.arange(4))
    Path("p.txt").write_text("0 1 1\n2 1 0\n0 2 0\n0 3 0\n")
    assert evaluate("d.npz", "--pairs", "p.txt", "--out", "o.json") == 0
    assert "d.npz: 1 templates have descriptors of zeros, which score 0" in capsys.readouterr().out
    assert json.loads(Path("o.json").read_text())["d.npz"]["1:1"]["eer"] == 0


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_descriptors_may_be_of_any_length(size: float) -> None:
    rows, ids, subject = made()
    Path("p.txt").write_text("\n".join(all_pairs(ids, subject)[0]))
    for name, scale in (("d", 1.0), ("scaled", size)):
        np.savez(f"{name}.npz", descriptors=rows.astype("float64") * scale, template_ids=ids)
        assert evaluate(f"{name}.npz", "--pairs", "p.txt", "--out", f"{name}.json") == 0
    one, other = (json.loads(Path(f"{name}.json").read_text()).popitem()[1]["1:1"] for name in ("d", "scaled"))
    assert one["tar_at_far"] == other["tar_at_far"]


def test_what_aggregate_writes_is_read_and_files_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    rows, ids, subject = made(count=40)
    images = np.repeat(rows, 4, 0) + np.random.default_rng(0).standard_normal((160, DIM)).astype("float32")
    np.savez("images.npz", features=images, template_ids=np.repeat(ids, 4))
    for name in ("one.parquet", "two.npy"):
        assert main(f"aggregate images.npz --out {name}".split()) == 0
    capsys.readouterr()
    Path("p.txt").write_text("\n".join(all_pairs(ids, subject)[0]))
    assert evaluate("one.parquet", "two.npy", "--pairs", "p.txt", "--out", "o.json") == 0
    one, two = capsys.readouterr().out.splitlines()[-2:]
    assert one.removeprefix("one.parquet") == two.removeprefix("two.npy    ")


GOOD_PAIRS = "1 4 1\n1 7 0\n"
GOOD_SUBJECTS = "T,S\n1,a\n4,b\n"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"p": "1 4 1\n1 99 0\n"}, "--pairs p", "p: entry 2: template 99 is not in d.npz"),
        ({"p": "1 4\n"}, "--pairs p", "p: expected lines of two template ids and 1 or 0, got '1 4'"),
        ({"p": "1 4 1\n1 4\n"}, "--pairs p", "Expected 3 columns, got 2: 1 4"),
        ({"p": "1 4 1\nx 4 1\n"}, "--pairs p", "invalid value 'x'"),
        ({"p": "1 4 1\n1 7 2\n"}, "--pairs p", "invalid value '2'"),
        ({"p": "1 4 2\n1 4 1\n1 7 0\n"}, "--pairs p", "p: entry 1: expected 1 or 0, got '2'"),
        ({"p": "\ufeff01 4 -1\n1 4 1\n1 7 0\n"}, "--pairs p", "p: entry 1: expected 1 or 0, got '-1'"),
        ({"p": "1,4,1\n1,7,\n"}, "--pairs p", "p: entry 2: expected 1 or 0, got nothing"),
        ({"p": ""}, "--pairs p", "p: expected lines of two template ids and 1 or 0, got ''"),
        ({"p": "a,b,same\n"}, "--pairs p", "p: "),
        ({"p": "1 4 1\n"}, "--pairs p", "expected pairs of both kinds, got 1 with same = 1, 0 with 0"),
        ({}, "--pairs nowhere", "nowhere: cannot be read: [Errno 2] No such file or directory: 'nowhere'"),
        ({}, "", "expected --pairs, or --gallery and --probes"),
        ({"g": GOOD_SUBJECTS}, "--gallery g", "--gallery and --probes come together"),
        ({"g": "1,a\n4,b\n"}, "--gallery g --probes g", "g: expected a line of names first, got template 1"),
        ({"g": "01,a\n4,b\n"}, "--gallery g --probes g", "g: expected a line of names first, got template 01"),
        ({"g": "\ufeff1,a\n4,b\n"}, "--gallery g --probes g", "g: expected a line of names first, got template 1"),
        ({"g": "T,S\n1,a\n1,b\n"}, "--gallery g --probes g", "g: template 1 is of two subjects, a and b"),
        ({"g": "T,S\n1,a\n4,\n"}, "--gallery g --probes g", "g: entry 2: expected a subject of template 4"),
        ({"g": "T,S\n"}, "--gallery g --probes g", "g: "),
        ({"g": "T\n1\n"}, "--gallery g --probes g", "g: expected lines that begin with a template id and a subject id"),
        ({"m": "a.jpg 1 1\n"}, "--media m --pairs p", "d.npz: expected a column 'features'"),
        ({"m": "a.jpg 1 1\n"}, "--media m --pairs p --features descriptors", "d.npz: has 3 images, m is of 1"),
        ({"m": "a.jpg 1\n"}, "--media m --pairs p", "m: expected lines of an image, a template and a medium"),
        ({}, "--pairs p --features nothing", "d.npz: expected a column 'nothing'"),
        ({"o.json": ""}, "--pairs p --out o.json", "o.json: is there already; --overwrite replaces it"),
        ({"o.png": ""}, "--pairs p --out o.json", "o.png: is there already; --overwrite replaces it"),
        ({}, "--pairs p --out o.txt", "o.txt: expected a file that ends in .json"),
        ({}, "--pairs p --out no/o.json", "expected a file in a folder that exists"),
        ({}, "d.npz --pairs p", "expected each INPUT once"),
    ],
)
def test_what_it_refuses(files: dict[str, str], options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("d.npz", descriptors=np.eye(3, dtype="float32"), template_ids=np.array([1, 4, 7]))
    for name, text in ({"p": GOOD_PAIRS} | files).items():
        Path(name).write_text(text)
    before = sorted(Path().iterdir())
    assert evaluate("d.npz", *options.split()) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"descriptors": np.array([[1, 0], [np.nan, 1]]), "template_ids": np.array([4, 9])}, "template 9: expected a"),
        ({"descriptors": np.eye(2), "template_ids": np.array([4, 4])}, "expected each template once, got 4 2 times"),
        ({"descriptors": np.eye(2), "template_ids": np.array([4, 9, 1])}, "row 2 of template 1: not in 'descriptors'"),
    ],
)
def test_descriptors_that_it_refuses(columns: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("d.npz", **columns)
    Path("p.txt").write_text("4 9 0\n4 4 1\n")
    assert evaluate("d.npz", "--pairs", "p.txt") == 2
    assert message in capsys.readouterr().err
