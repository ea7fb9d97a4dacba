"""The faces command: with a detector and an embedder made for it, and on the clip where the extra is there."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fcn_kernels.__main__ import main
from fcn_kernels.cli import faces
from fcn_kernels.faces.models import Detection
from fcn_kernels.faces.pictures import Picture, photo
from fcn_kernels.faces.tracks import Tracker, overlap_of
from fcn_kernels.files.formats import InputError

np = pytest.importorskip("numpy")
images = pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")
has_extra = all(find_spec(name) for name in ("av", "dlib", "face_recognition_models", "skvideo"))


class Squares:
    """Its faces are pictures that are not black; the red channel's mean is the score, the color the embedding."""

    same = 0.6

    def detect(self, rgb: Any) -> list[Detection]:
        return [Detection((0, 0, 8, 8), float(rgb[..., 0].mean()) / 100)] if rgb.any() else []

    def align(self, rgb: Any, box: tuple[int, int, int, int]) -> Any:
        return np.ascontiguousarray(rgb[:8, :8])

    def embed(self, chips: Sequence[Any]) -> Any:
        return np.array([chip.mean((0, 1)) / 255 for chip in chips], "float32")


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = faces.require
    monkeypatch.setattr(faces, "require", lambda name, extra: None if name == "av" else real(name, extra))


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    faces.add_arguments(parser)
    return faces.run(parser.parse_args([*options, "--out", "out"]), Squares)


def save(path: str, color: tuple[int, int, int]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    images.new("RGB", (16, 8), color).save(path)


def test_folders_of_photos_become_templates_and_what_is_bad_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for number, color in enumerate([(250, 10, 10), (120, 200, 10), (130, 190, 20), (90, 10, 240)]):
        save(f"people/anna/{number}.png", color)
    save("people/ben/a.png", (200, 50, 50))
    save("people/ben/black.png", (0, 0, 0))
    Path("people/ben/text.jpg").write_text("no photo")
    Path("empty").mkdir()
    assert run("people", "empty", "--k", "2") == faces.LEFT_OUT
    said = capsys.readouterr()
    assert "people/ben/text.jpg: is no photo that can be read" in said.err
    assert "people/ben: no face in 1 of 3 photos: black.png" in said.err
    assert "empty: has no photos" in said.err
    assert said.out.startswith("out: 5 faces in 6 pictures, 2 templates\n")
    assert "embedding" in said.out
    with np.load("out/embeddings.npz") as rows, np.load("out/descriptors.npz") as made:
        assert rows["template_ids"].tolist() == ["people/anna"] * 4 + ["people/ben"]
        np.testing.assert_allclose(rows["quality"], np.exp([2.5, 1.2, 1.3, 0.9, 2.0]))
        assert made["counts"].tolist() == [2, 1]
        assert made["picks"][0, 0] == 0  # the best quality comes first
    with open("out/picks.csv", newline="") as file:
        picks = list(csv.DictReader(file))
    assert [(pick["template"], pick["pick"]) for pick in picks] == [
        ("people/anna", "1"), ("people/anna", "2"), ("people/ben", "1")]  # fmt: skip
    assert picks[0]["file"] == "people/anna/0.png"
    assert images.open("out/sheet.png").size[0] > 300
    assert main(["aggregate", "out/embeddings.npz", "--k", "2", "--out", "again.npz"]) == 0
    with np.load("again.npz") as again, np.load("out/descriptors.npz") as made:
        np.testing.assert_array_equal(again["descriptors"], made["descriptors"])


def test_a_video_becomes_a_template_for_each_track(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def clip(path: Path, per_second: float) -> Any:
        colors = [(200, 0, 0)] * 4 + [(10, 200, 200)] * 3 + [(200, 0, 200)] + [(0, 0, 0)]
        for number, color in enumerate(colors):
            yield Picture(np.full((8, 8, 3), color, "uint8"), path, number / per_second)
        raise InputError(f"{path}: is damaged after 0.8 s")

    monkeypatch.setattr(faces, "frames", clip)
    assert run("clip.mp4") == faces.LEFT_OUT
    said = capsys.readouterr()
    assert "clip.mp4: left out 1 tracks of fewer than 3 faces" in said.err
    assert "clip.mp4: is damaged after 0.8 s" in said.err
    with np.load("out/embeddings.npz") as rows:
        assert rows["template_ids"].tolist() == ["clip.mp4#1"] * 4 + ["clip.mp4#2"] * 3


def test_without_a_face_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    save("black/a.png", (0, 0, 0))
    assert run("black") == 2
    assert "no face was found in black" in capsys.readouterr().err
    assert not list(Path("out").iterdir())


def test_results_that_are_there_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    save("a.png", (200, 0, 0))
    assert run("a.png") == 0
    assert run("a.png") == 2
    assert "is there already; --overwrite replaces it" in capsys.readouterr().err
    assert run("a.png", "--overwrite") == 0


def test_the_sheet_of_an_earlier_run_is_no_photo() -> None:
    save("anna/a.png", (200, 0, 0))
    save("out/ben.png", (0, 200, 0))
    for _ in range(2):
        assert run(".", "--overwrite") == 0
        with np.load("out/embeddings.npz") as rows:
            assert rows["template_ids"].tolist() == ["anna", "out"]


def test_photos_are_turned_and_brought_to_eight_bits() -> None:
    image = images.new("RGB", (4, 2), (10, 20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save("turned.jpg", exif=exif)
    assert photo(Path("turned.jpg")).rgb.shape == (4, 2, 3)
    images.fromarray(np.full((2, 4), 0x8000, "uint16")).save("deep.png")
    assert (photo(Path("deep.png")).rgb == 0x80).all()
    images.new("L", (4, 2), 77).save("gray.png")
    assert (photo(Path("gray.png")).rgb == 77).all()
    Path("broken.png").write_bytes(Path("gray.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"broken\.png"):
        photo(Path("broken.png"))


def test_tracks_follow_overlap_and_person() -> None:
    assert overlap_of((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    tracker = Tracker(0.6)
    here, there = Detection((0, 0, 10, 10), 1.0), Detection((50, 0, 60, 10), 1.0)
    one, two = np.zeros(3), np.ones(3)
    assert tracker.add(0.0, [here, there], np.array([one, two])) == [0, 1]
    assert tracker.add(0.1, [there, here], np.array([two, one])) == [1, 0]
    assert tracker.add(0.2, [here], np.array([two])) == [2]  # another person in the same place
    assert tracker.add(5.0, [there], np.array([two])) == [3]  # too long after


@pytest.mark.skipif(not has_extra, reason="needs the extra [faces]")
def test_the_clip_and_a_text_file_named_mp4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    assert main(["faces", "--per-second", "2", "--k", "3", "--out", "out"]) == 0
    with np.load("out/descriptors.npz") as made:
        assert made["descriptors"].shape == (1, 128)
        assert made["counts"].tolist() == [3]
    Path("notes.mp4").write_text("no video")
    assert main(["faces", "notes.mp4", "--out", "other"]) == 2
    assert "notes.mp4: is no video that can be read" in capsys.readouterr().err
