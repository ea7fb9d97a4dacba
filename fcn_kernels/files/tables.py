"""Text tables of templates: pairs, subjects and media, as IJB's files have them or as .csv; read in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from csv import reader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fcn_kernels.extras import require
from fcn_kernels.files.formats import EXTRA, InputError, reading

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

BLOCK = 1 << 22  # bytes, some 300,000 pairs
LABELS = {"0", "1", "true", "false"}


class Pairs(NamedTuple):
    """A block of pairs of templates."""

    first: Array
    """(P,) places among the templates."""
    second: Array
    """(P,), the same."""
    same: Array
    """(P,) bool: whether both show one identity."""


class Subjects(NamedTuple):
    """Templates whose identity is known."""

    templates: Array
    """(T,) places among the templates, each once."""
    subjects: Array
    """(T,) strings."""


def pairs(path: Path, ids: Array, source: str) -> Iterator[Pairs]:
    """Lines of two template ids and 1 or 0, between commas, tabs or spaces, under a line of names or not.

    IJB's ``*_template_pair_label.txt`` is one.

    Args:
        ids: (B,) the templates, each once; integers or strings. source: the file that has them, for messages.

    Raises:
        InputError: the file cannot be read, has no pairs, or names a template that is not among `ids`.
    """
    known, label = _known(ids), require("pyarrow", EXTRA).bool_()
    fields = _first_line(path)
    if len(fields) != 3:
        raise InputError(f"{path}: expected lines of two template ids and 1 or 0, got {' '.join(fields)!r}")
    named = fields[2].lower() not in LABELS
    if named and all(_is_template(field, ids) for field in fields[:2]):
        raise InputError(f"{path}: entry 1: expected 1 or 0, got {fields[2]!r}")
    done = 0
    for batch in _blocks(path, [known.type, known.type, label], skip=int(named)):
        first, second = (_places(path, column, known, source, done) for column in batch.columns[:2])
        same = batch.column(2)
        if same.null_count:
            raise InputError(f"{path}: entry {done + _first_null(same) + 1}: expected 1 or 0, got nothing")
        yield Pairs(first, second, same.to_numpy(zero_copy_only=False))
        done += len(first)
    if not done:
        raise InputError(f"{path}: expected pairs, got none")


def subjects(path: Path, ids: Array, source: str) -> Subjects:
    """A line of names, then lines that begin with a template id and a subject id; a template may have several.

    IJB's ``*_1N_gallery_*.csv`` and ``*_1N_probe_*.csv`` are such files.

    Args:
        ids, source: as in :func:`pairs`.

    Raises:
        InputError: as :func:`pairs` does; and for a template with two subjects.
    """
    np, known = require("numpy", EXTRA), _known(ids)
    fields = _first_line(path)
    if len(fields) < 2:
        raise InputError(f"{path}: expected lines that begin with a template id and a subject id")
    if _is_template(fields[0], ids):
        raise InputError(f"{path}: expected a line of names first, got template {fields[0]}")
    text = require("pyarrow", EXTRA).string()
    kinds = [known.type, text] + [text] * (len(fields) - 2)
    places, names, done = [], [], 0
    for batch in _blocks(path, kinds, skip=1, keep=2):
        places.append(_places(path, batch.column(0), known, source, done))
        names += batch.column(1).to_pylist()
        if "" in names[done:]:
            at = names.index("", done)
            raise InputError(f"{path}: entry {at + 1}: expected a subject of template {batch.column(0)[at - done]}")
        done += len(places[-1])
    if not names:
        raise InputError(f"{path}: expected templates, got none")
    templates, first, inverse = np.unique(np.concatenate(places), return_index=True, return_inverse=True)
    subject = np.array(names)
    several = subject != subject[first][inverse]
    if several.any():
        at = int(several.argmax())
        one, other = subject[first][inverse][at], subject[at]
        raise InputError(f"{path}: template {ids[templates[inverse[at]]]} is of two subjects, {one} and {other}")
    return Subjects(templates, subject[first])


def media(path: Path) -> tuple[Array, Array]:
    """Template and medium (T,) of each image: IJB's ``*_face_tid_mid.txt``, lines of ``image template medium``.

    Frames of one video are one medium. Raises InputError as :func:`pairs` does.
    """
    np = require("numpy", EXTRA)
    fields = _first_line(path)
    if len(fields) != 3:
        raise InputError(f"{path}: expected lines of an image, a template and a medium, got {' '.join(fields)!r}")
    arrow = require("pyarrow", EXTRA)
    kinds = [arrow.string(), *(arrow.int64() if _is_integer(field) else arrow.string() for field in fields[1:])]
    batches = list(_blocks(path, kinds))
    columns = ([value for b in batches for value in b.column(k).to_pylist()] for k in (1, 2))
    template, medium = map(np.array, columns)
    return template, medium


def _known(ids: Array) -> Any:
    values, counts = require("numpy", EXTRA).unique(ids, return_counts=True)
    if counts.max() > 1:
        raise InputError(f"expected each template once, got {values[counts.argmax()]} {counts.max()} times")
    return require("pyarrow", EXTRA).array(ids)


def _places(path: Path, column: Any, known: Any, source: str, done: int) -> Array:
    """Where the ids of a column are among the known ones."""
    found = require("pyarrow.compute", EXTRA).index_in(column, value_set=known)
    if found.null_count:
        at = _first_null(found)
        raise InputError(f"{path}: entry {done + at + 1}: template {column[at]} is not in {source}")
    return found.to_numpy()  # type: ignore[no-any-return]


def _first_null(column: Any) -> int:
    return int(column.is_null().to_numpy(zero_copy_only=False).argmax())


def _separator(line: str) -> str:
    return next((separator for separator in ",\t" if separator in line), " ")


def _first_line(path: Path) -> list[str]:
    with reading(path), path.open(encoding="utf-8-sig") as file:
        line = file.readline().strip()
        return next(reader([line], delimiter=_separator(line)), [""])


def _is_template(text: str, ids: Array) -> bool:
    """Whether a field names a template; integers may have zeros in front."""
    if ids.dtype.kind == "U":
        return text in set(ids.tolist())
    return _is_integer(text) and int(text) in set(ids.tolist())


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _blocks(path: Path, kinds: Sequence[Any], skip: int = 0, keep: int | None = None) -> Iterator[Any]:
    """Batches of the first `keep` columns, of the given types."""
    csv = require("pyarrow.csv", EXTRA)
    with reading(path):
        with path.open(encoding="utf-8") as file:
            separator = _separator(file.readline())
        names = [f"column {number + 1}" for number in range(len(kinds))]
        yield from csv.open_csv(
            path,
            csv.ReadOptions(column_names=names, block_size=BLOCK, skip_rows=skip),
            csv.ParseOptions(delimiter=separator),
            csv.ConvertOptions(column_types=dict(zip(names, kinds, strict=True)), include_columns=names[:keep]),
        )
