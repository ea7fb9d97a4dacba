"""`python -m fcn_kernels evaluate`: error rates of descriptors, by pairs of templates (1:1) and by searches (1:N)."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels.cli.align import add_method, neighbors_of
from fcn_kernels.cli.arguments import EXIT_STATUS, add_max_unpacked, run_to_status
from fcn_kernels.evaluation.identification import Search, search
from fcn_kernels.evaluation.templates import cosines, mean_of_media
from fcn_kernels.evaluation.verification import FARS, Roc, roc_of
from fcn_kernels.extras import require
from fcn_kernels.files import tables
from fcn_kernels.files.align import PairScores, contexts, read_aligned, read_bank, warnings_of
from fcn_kernels.files.embeddings import Keys, read
from fcn_kernels.files.formats import InputError, Scratch, load_npy, reading, suffix_of
from fcn_kernels.files.output import check_output, replacing
from fcn_kernels.neighbors.scores import Affine, affine
from fcn_kernels.sets import row_norms

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

EXTRA = "tool,demo"  # tqdm and formats; matplotlib
FPIRS = (1e-3, 1e-2, 1e-1)
RANKS = (1, 5, 10)
COLORS = ("#225ea8", "#e08214", "#7b3294", "#1b7837", "#c51b7d", "#4d4d4d")
ABOUT = f"""
INPUT has the columns template_ids (B,) and descriptors (B, C), as `aggregate` writes them; a line of the table for each
INPUT. Two templates score the cosine of their descriptors. A descriptor of zeros (a template without a usable row)
scores 0 with any other, and is counted.

--pairs PAIRS (1:1)
  lines `template template same`, same being 1 or 0, between spaces, tabs or commas, under a line of names or not: IJB's
  *_template_pair_label.txt as it is. Printed are TAR at FAR 1e-6 to 1e-1, the best that a threshold gives which keeps
  FAR at or below that, and the equal error rate. "-": fewer impostor pairs than 1 / FAR.

--gallery GALLERY [GALLERY] --probes PROBES (1:N)
  .csv of a line of names and lines that begin `template,subject`: IJB's *_1N_gallery_G1.csv, *_1N_gallery_G2.csv and
  *_1N_probe_mixed.csv as they are. Every probe is searched in each gallery, where a subject scores as its best
  template does. Printed are, of the probes whose subject is there, the shares that have it within rank 1, 5 and 10,
  and TPIR at FPIR 1e-3 to 1e-1: the share that has it at rank 1 and scores at least the threshold, which lets at most
  FPIR of the other probes find anyone. Two galleries give a mean, as IJB's protocol has it.

--media MEDIA
  INPUT has embeddings of images instead, features (T, C), or is an .npy of them, and MEDIA says what they show in T
  lines `image template medium`: IJB's *_face_tid_mid.txt as it is. The usual baseline is made of them: a template's
  descriptor is the sum over its media of the mean of a medium's images, as long as they are.

--bank BANK
  beside each INPUT stands the same with scores aligned by BANK, descriptors of other people: `align --help` says how,
  and what --k, --min-cosine, --method and --bank-features are. It can do harm, which this shows.

--aligned ALIGNED
  the same by what `align` wrote of the one INPUT: contexts of its templates, which --method makes scores of; or, from
  `align --pairs PAIRS`, the scores of PAIRS themselves.

In memory are INPUT and, at most, 8 bytes a pair; what is packed is unpacked into an unnamed file in OUT's folder,
without OUT in INPUT's, or where the system keeps temporary files if nothing can be written there. OUT has the same
numbers, with the thresholds, and OUT with the suffix .png shows the curves; both appear whole, or not at all.

{EXIT_STATUS}
"""


class Templates(NamedTuple):
    """Templates to compare."""

    ids: Array
    """(B,) integers or strings."""
    unit: Tensor
    """(B, C) unit rows, float32; zero where there is no descriptor."""
    source: str
    """The file, for messages."""
    shares: Affine | None = None
    """What makes cosines aligned scores, (B,) each; None: they stay."""
    given: PairScores | None = None
    """Scores of the pairs that are compared, in place of cosines."""

    def scores(self, first: Tensor, second: Tensor, begin: int) -> Tensor:
        """Of pairs (P,) of places, which come from ``begin`` on among all pairs."""
        if self.given:
            return self.given.of(self.ids[first], self.ids[second], begin)
        found = cosines(self.unit, first, second)
        if self.shares is None:
            return found
        scale, offset = self.shares
        return (scale[first] + scale[second]) * found - (offset[first] + offset[second])

    def sides(self) -> tuple[Tensor, Tensor]:
        """Rows (B, C') of probes and of gallery whose inner products are the scores."""
        if self.shares is None:
            return self.unit, self.unit
        scale, offset = (share[:, None] for share in self.shares)
        one = torch.ones_like(offset)
        probe = torch.cat([scale * self.unit, self.unit, one, -offset], 1)
        return probe, torch.cat([self.unit, scale * self.unit, -offset, one], 1)


class Results(NamedTuple):
    """What a file of descriptors is worth."""

    pairs: Roc | None
    genuine: int
    """Pairs that show one identity."""
    searches: Mapping[str, Search]
    """By gallery."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    add("input", type=Path, nargs="+", metavar="INPUT", help="a file of descriptors, as `aggregate` writes it")
    add("--pairs", type=Path, help="pairs of templates to compare")
    add("--gallery", type=Path, nargs="+", default=[], help="templates to search, with their subjects")
    add("--probes", type=Path, help="templates to search for, with their subjects")
    add("--media", type=Path, help="templates and media of images: INPUT has embeddings of these")
    add("--bank", type=Path, help="descriptors of other people: aligned scores are compared with raw ones")
    add("--aligned", type=Path, help="what `align` wrote of INPUT: its scores are compared with raw ones")
    add_method(parser)
    add("--bank-features", metavar="KEY", default="descriptors", help="that column of BANK (default: %(default)s)")
    add("--features", metavar="KEY", help="name of that column (default: descriptors, or features with --media)")
    add("--ids", metavar="KEY", default=Keys().ids, help="name of that column (default: %(default)s)")
    add("--out", type=Path, metavar="OUT", help=".json of the numbers, beside a .png of the curves")
    add("--overwrite", action="store_true", help="replace OUT if it is there")
    add_max_unpacked(parser)


def run(args: argparse.Namespace) -> int:
    """Read, compare, print, write; returns the exit status that the help promises."""
    return run_to_status("evaluate", partial(run_checked, args), "nothing was written")


def run_checked(args: argparse.Namespace) -> str:
    """What :func:`run` does, with errors raised; returns the tables."""
    _check(args)
    results, notes = {}, []
    for path in args.input:
        templates = load(path, args)
        missing = int((~templates.unit.any(1)).sum())
        if missing:
            notes.append(f"{path}: {missing} templates have descriptors of zeros, which score 0")
        results[str(path)] = compare(templates, args)
        if args.aligned:
            results[f"{path}, aligned"] = compare(_aligned(templates, args), args)
        if args.bank:
            bank = read_bank(args.bank, Keys(args.bank_features), False, _scratch(path, args))
            notes += warnings_of(bank, neighbors_of(args), path)
            context = contexts(
                templates.unit, bank, source=templates.source, k=neighbors_of(args), min_cosine=args.min_cosine
            )
            results[f"{path}, aligned"] = compare(templates._replace(shares=affine(context, args.method)), args)
    if args.out:
        draw(args.out.with_suffix(".png"), results, args.overwrite)
        with replacing(args.out, args.overwrite) as file:
            file.write(json.dumps(numbers(results), indent=1).encode())
    return "\n".join([*tables_of(results), *notes])


def _aligned(templates: Templates, args: argparse.Namespace) -> Templates:
    """The same, with scores by what `align` wrote."""
    found = read_aligned(args.aligned, templates.ids, templates.source, _scratch(args.aligned, args))
    if not isinstance(found, PairScores):
        return templates._replace(shares=affine(found, args.method))
    if args.probes or not args.pairs or args.method != "mean":
        raise InputError(f"{args.aligned} has scores of pairs: expected --pairs alone, and no --method")
    return templates._replace(given=found)


def compare(templates: Templates, args: argparse.Namespace) -> Results:
    """Pairs and searches of a file."""
    rates, genuine = verify(templates, args.pairs) if args.pairs else (None, 0)
    return Results(rates, genuine, identify(templates, args.gallery, args.probes))


def load(path: Path, args: argparse.Namespace) -> Templates:
    """The templates of a file; or of a file of images, by their media."""
    if args.media:
        ids, features = _images(path, args)
    else:
        keys = Keys(args.features or "descriptors", args.ids)
        embeddings = read([path], keys, _scratch(path, args))
        ids, features = embeddings.ids, embeddings.features
    norms = row_norms(features.double())
    if not norms.isfinite().all():
        at = int((~norms.isfinite()).int().argmax())
        raise InputError(f"{path}: template {ids[at]}: expected a finite descriptor")
    unit = (features / norms[:, None].clamp(min=torch.finfo(torch.float64).tiny)).float()
    return Templates(ids, unit, str(path))


def _images(path: Path, args: argparse.Namespace) -> tuple[Array, Tensor]:
    template, medium = tables.media(args.media)
    if suffix_of(path) == ".npy":
        with reading(path):
            features = torch.as_tensor(_scratch(path, args).native(load_npy(path)))
    else:
        # any column of a value a row serves as ids, which MEDIA has
        features = read([path], Keys(args.features or "features", args.ids), _scratch(path, args)).features
    if features.ndim != 2 or not features.is_floating_point():
        raise InputError(f"{path}: expected floating-point features (T, C), got shape {tuple(features.shape)}")
    if len(features) != len(template):
        raise InputError(f"{path}: has {len(features)} images, {args.media} is of {len(template)}")
    return mean_of_media(features, template, medium)


def _scratch(path: Path, args: argparse.Namespace) -> Scratch:
    folder = (args.out or path).absolute().parent
    # data sets often lie where nothing can be written
    return Scratch(folder if os.access(folder, os.W_OK) else Path(gettempdir()), args.max_unpacked)


def verify(templates: Templates, path: Path) -> tuple[Roc, int]:
    """ROC of the pairs of a file, and how many show one identity."""
    np = require("numpy", EXTRA)
    genuine, impostor, done = [], [], 0
    with require("tqdm", EXTRA).tqdm(desc=f"comparing {templates.source}", unit="pair", unit_scale=True) as bar:
        for block in tables.pairs(path, templates.ids, templates.source):
            first, second = (torch.from_numpy(side.astype("int64")) for side in (block.first, block.second))
            scores = templates.scores(first, second, done).numpy()
            genuine.append(scores[block.same])
            impostor.append(scores[~block.same])
            bar.update(len(scores))
            done += len(scores)
    if templates.given and done < len(templates.given.scores):
        raise InputError(f"{templates.given.source} has {len(templates.given.scores)} pairs, {path} has {done}")
    positive, negative = np.concatenate(genuine), np.concatenate(impostor)
    if not len(positive) or not len(negative):
        raise InputError(
            f"{path}: expected pairs of both kinds, got {len(positive)} with same = 1, {len(negative)} with 0"
        )
    return roc_of(positive, negative), len(positive)


def identify(templates: Templates, galleries: list[Path], probes: Path | None) -> dict[str, Search]:
    """Search each gallery for the probes."""
    if probes is None:
        return {}
    wanted = tables.subjects(probes, templates.ids, templates.source)
    found = {}
    for path in galleries:
        known = tables.subjects(path, templates.ids, templates.source)
        probe, gallery = (
            rows[torch.from_numpy(side.templates).long()]
            for rows, side in zip(templates.sides(), (wanted, known), strict=True)
        )
        found[str(path)] = search(gallery, known.subjects, probe, wanted.subjects)
    return found


def tables_of(results: Mapping[str, Results]) -> list[str]:
    """The numbers in lines, to be read."""
    wide = max(map(len, results))
    lines = []
    first = next(iter(results.values()))
    if first.pairs:
        lines += [
            f"1:1, {first.genuine + first.pairs.negatives:,} pairs, {first.genuine:,} of one identity: TAR at FAR"
        ]
        lines += [_line("", wide, [*(f"{far:.0e}" for far in FARS), "EER"])]
        for name, result in results.items():
            assert result.pairs is not None
            lines += [_line(name, wide, [*result.pairs.tar_at(), result.pairs.eer()])]
    for gallery, one in first.searches.items():
        lines += [f"1:N, {gallery}: {len(one.ranks):,} probes in it, {one.strangers:,} not: rank within, TPIR at FPIR"]
        lines += [_line("", wide, [*map(str, RANKS), *(f"{fpir:.0e}" for fpir in FPIRS)])]
        lines += [_line(name, wide, _search_numbers(result.searches[gallery])) for name, result in results.items()]
    if len(first.searches) > 1:
        lines += ["1:N, mean of the galleries"]
        for name, result in results.items():
            columns = zip(*map(_search_numbers, result.searches.values()), strict=True)
            lines += [_line(name, wide, [sum(column) / len(column) for column in columns])]
    return lines


def _line(name: str, wide: int, values: list[Any]) -> str:
    cells = (value if isinstance(value, str) else "-" if math.isnan(value) else f"{value:.4f}" for value in values)
    return f"{name:{wide}}" + "".join(f"{cell:>9}" for cell in cells)


def _search_numbers(one: Search) -> list[float]:
    tpirs = one.roc.tar_at(FPIRS) if one.roc else [math.nan] * len(FPIRS)
    return [*(one.within(rank) for rank in RANKS), *tpirs]


def numbers(results: Mapping[str, Results]) -> dict[str, Any]:
    """The numbers by name, NaN as None."""

    def by(axis: tuple[float, ...], values: list[float]) -> dict[str, float | None]:
        return {f"{x:g}": value if math.isfinite(value) else None for x, value in zip(axis, values, strict=True)}

    def one(result: Results) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if result.pairs:
            made["1:1"] = {
                "genuine": result.genuine,
                "impostor": result.pairs.negatives,
                "eer": result.pairs.eer(),
                "tar_at_far": by(FARS, result.pairs.tar_at()),
                "threshold_at_far": by(FARS, result.pairs.threshold_at()),
            }
        for gallery, found in result.searches.items():
            made.setdefault("1:N", {})[gallery] = {
                "probes_in_gallery": len(found.ranks),
                "probes_not_in_gallery": found.strangers,
                "within_rank": by(RANKS, [found.within(rank) for rank in RANKS]),
            }
            if found.roc:
                made["1:N"][gallery] |= {
                    "tpir_at_fpir": by(FPIRS, found.roc.tar_at(FPIRS)),
                    "threshold_at_fpir": by(FPIRS, found.roc.threshold_at(FPIRS)),
                }
        return made

    return {name: one(result) for name, result in results.items()}


def draw(path: Path, results: Mapping[str, Results], overwrite: bool) -> None:
    """ROC of the pairs and of every gallery, down to the FAR of one false accept."""
    panels = {"1:1": {name: result.pairs for name, result in results.items()}}
    for gallery in next(iter(results.values())).searches:
        panels[f"1:N, {Path(gallery).name}"] = {name: result.searches[gallery].roc for name, result in results.items()}
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    page = require("matplotlib.figure", EXTRA).Figure(figsize=(5 * max(len(panels), 1), 4), dpi=130, facecolor="white")
    page.set_layout_engine("constrained")
    for number, (title, curves) in enumerate(panels.items(), 1):
        axis = page.add_subplot(1, len(panels), number)
        for place, (name, curve) in enumerate(curves.items()):
            if curve:
                seen = curve.far > 0
                axis.step(curve.far[seen], curve.tar[seen], where="post", color=COLORS[place % len(COLORS)], label=name)
        false, true = ("FAR", "TAR") if title == "1:1" else ("FPIR", "TPIR")
        axis.set(xscale="log", xlabel=false, ylabel=true, title=title)
        axis.grid(color="#e5e5e5")
        axis.legend(frameon=False, loc="lower right", fontsize=8)
    with replacing(path, overwrite) as file:
        page.savefig(file, format="png")


def _check(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be done, or not be written after it."""
    for package in ("numpy", "tqdm", "pyarrow.csv", *(["matplotlib.figure"] if args.out else [])):
        require(package, EXTRA)
    if bool(args.gallery) != bool(args.probes):
        raise InputError("--gallery and --probes come together")
    if not args.bank and (args.k or args.min_cosine is not None or (args.method != "mean" and not args.aligned)):
        raise InputError("--k, --min-cosine and --method: expected --bank with them")
    if args.aligned and (args.bank or len(args.input) > 1):
        raise InputError("--aligned: expected one INPUT, and no --bank")
    neighbors_of(args)
    if not args.pairs and not args.probes:
        raise InputError("expected --pairs, or --gallery and --probes")
    if len(set(map(str, args.input))) < len(args.input):
        raise InputError("expected each INPUT once")
    if not args.out:
        return
    if args.out.suffix != ".json":
        raise InputError(f"{args.out}: expected a file that ends in .json")
    read_from = [path for path in (*args.input, args.pairs, *args.gallery, args.probes, args.media, args.bank) if path]
    read_from += [args.aligned] if args.aligned else []
    for path in (args.out, args.out.with_suffix(".png")):
        check_output(path, read_from, args.overwrite)
