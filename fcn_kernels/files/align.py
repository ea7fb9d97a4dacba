"""Contexts of rows on disk against a bank on disk: some rows at a time, the bank mapped and never whole in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fcn_kernels.checks import DTYPES
from fcn_kernels.extras import require
from fcn_kernels.files.embeddings import Keys, alike, ids_column, one_a_row, read
from fcn_kernels.files.formats import EXTRA, Columns, InputError, Scratch, format_of, load_npy, reading, suffix_of
from fcn_kernels.neighbors.context import Context, context_statistics
from fcn_kernels.sets import accumulator, row_norms, usable

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

LEAST_IDENTITIES, LEAST_K = 100, 50
"""With fewer, alignment mostly does harm (docs/alignment.md)."""
BLOCK_ROWS = 4096  # rows for which the bank is read again


class Bank(NamedTuple):
    """Rows of other people."""

    rows: Tensor
    """(M, C), mapped from the file."""
    ids: Array | None
    """(M,) integers or strings, their identities, if these are known."""
    left_out: int
    """Rows that are not finite or are zero, which are in no context."""
    source: str
    """The file, for messages."""


class PairScores(NamedTuple):
    """Aligned scores of pairs of templates, as `align` writes them."""

    first: Array
    """(P,) ids."""
    second: Array
    """(P,) ids."""
    scores: Array
    """(P,) float32."""
    source: str
    """The file, for messages."""

    def of(self, first: Array, second: Array, begin: int) -> Tensor:
        """Scores of the pairs of ids that come from ``begin`` on; raises InputError if these are others."""
        end = begin + len(first)
        there = self.first[begin:end], self.second[begin:end]
        if len(there[0]) < len(first):
            raise InputError(f"{self.source} has {len(self.scores)} pairs, --pairs has more")
        for mine, other in zip(there, (first, second), strict=True):
            if not (different := mine != other).any():
                continue
            at = int(different.argmax())
            got = f"{there[0][at]} {there[1][at]} where --pairs has {first[at]} {second[at]}"
            raise InputError(
                f"{self.source}: pair {begin + at + 1}: expected the pairs of --pairs, in its order, got {got}"
            )
        return torch.from_numpy(self.scores[begin:end])


def read_aligned(path: Path, ids: Array, source: str, scratch: Scratch) -> Context | PairScores:
    """Read what `align` wrote: contexts, in the order of ``ids`` (B,); or scores of pairs.

    Args:
        path: the file. ids: the templates of the file ``source``, of each of which a context is wanted.

    Raises:
        InputError: the file cannot be read, or lacks a column or a template.
    """
    with reading(path):
        columns = format_of(path).open(path, scratch)
    name = str(path)
    if "aligned" in columns:
        first, second = (ids_column(columns, side, name) for side in ("first", "second"))
        return PairScores(first, second, _finite(columns, "aligned", name).astype("float32"), name)
    np, known = require("numpy", EXTRA), ids_column(columns, Keys().ids, name)
    mean, std, counts = (_finite(columns, column, name) for column in ("mean", "std", "counts"))
    own, theirs = (t.numpy() for t in _numbered(ids, known, source, name))
    order = theirs.argsort(kind="stable")
    at = order[np.searchsorted(theirs, own, sorter=order).clip(max=len(order) - 1)]
    if (missing := theirs[at] != own).any():
        raise InputError(f"{name}: template {ids[missing.argmax()]} of {source} is not there")
    one, other = (torch.from_numpy(column[at].astype("float32")) for column in (mean, std))
    return Context(one, other, torch.from_numpy(counts[at].astype("int64")), None)


def _finite(columns: Columns, name: str, source: str) -> Array:
    values = one_a_row(columns, name, source)
    if values.dtype.kind not in "fiu" or not require("numpy", EXTRA).isfinite(values).all():
        raise InputError(f"{source}: expected finite numbers in {name!r}, got others")
    return values


def read_bank(path: Path, keys: Keys, with_ids: bool, scratch: Scratch) -> Bank:
    """Open a bank: a file of named columns, or an .npy of rows (M, C) alone.

    Args:
        path: the file. keys: names of its columns. with_ids: whether its ids are wanted. scratch: as :func:`read`.

    Raises:
        InputError: the file cannot be read, or holds what is no bank.
    """
    if suffix_of(path) == ".npy" and not with_ids:
        with reading(path):
            rows, ids = torch.as_tensor(scratch.native(load_npy(path))), None
    else:
        embeddings = read([path], keys, scratch)
        rows, ids = embeddings.features, embeddings.ids if with_ids else None
    if rows.ndim != 2 or not rows.is_floating_point():
        raise InputError(f"{path}: expected floating-point rows (M, C), got {rows.dtype} of {tuple(rows.shape)}")
    good = 0
    for at in range(0, len(rows), BLOCK_ROWS):
        norms = row_norms(rows[at : at + BLOCK_ROWS].to(accumulator(rows.dtype)))
        good += int(usable(norms, norms).sum())
    if not good:
        raise InputError(f"{path}: expected rows that are finite and not 0, got none among {len(rows)}")
    return Bank(rows, ids, len(rows) - good, str(path))


def warnings_of(bank: Bank, k: int | None, compared: Path | None) -> list[str]:
    """What makes alignment by this bank doubtful, in sentences.

    Args:
        bank, k: as in :func:`contexts`. compared: the file of the rows, None if their own identities are left out.
    """
    people = len(bank.rows) - bank.left_out if bank.ids is None else len(require("numpy", EXTRA).unique(bank.ids))
    found = []
    if people < LEAST_IDENTITIES:
        kind = "rows" if bank.ids is None else "identities"
        found.append(f"{bank.source} has {people} {kind}: with fewer than {LEAST_IDENTITIES} it mostly does harm")
    if k is not None and k < LEAST_K:
        found.append(f"--k {k}: with fewer than {LEAST_K} neighbors it mostly does harm")
    if bank.left_out:
        found.append(f"{bank.source}: {bank.left_out} rows are not finite or are zero, and are left out")
    if compared is not None and compared.samefile(bank.source):
        found.append("BANK is INPUT, where each row is its own nearest neighbor: `align --id-key` leaves it out")
    return found


def contexts(
    rows: Tensor, bank: Bank, *, ids: Array | None = None, source: str, k: int | None, min_cosine: float | None = None
) -> Context:
    """Contexts of rows (N, C) against the bank, a block of rows at a time; ``indices`` are None.

    Args:
        rows: floating point, mapped or not. ids: (N,) their identities, which are left out of the bank.
        source: the file that has the rows, for messages. k, min_cosine: as :func:`context_statistics` has them.

    Raises:
        InputError: rows and bank have different numbers of columns, or ids of different kinds.
    """
    if rows.shape[1] != bank.rows.shape[1]:
        raise InputError(f"{source} has {rows.shape[1]} columns, {bank.source} has {bank.rows.shape[1]}")
    own, theirs = None, None
    if ids is not None and bank.ids is not None:
        own, theirs = _numbered(ids, bank.ids, source, bank.source)
    found = []
    with require("tqdm", EXTRA).tqdm(total=len(rows), desc=f"searching {bank.source}", unit="row") as bar:
        for at in range(0, len(rows), BLOCK_ROWS):
            part = slice(at, at + BLOCK_ROWS)
            some = None if own is None else own[part]
            context = context_statistics(rows[part], bank.rows, k, min_cosine=min_cosine, ids=some, bank_ids=theirs)
            found.append(context[:3])
            bar.update(len(context.mean))
    mean, std, counts = (torch.cat(column) for column in zip(*found, strict=True))
    return Context(mean, std, counts, None)


def _numbered(ids: Array, bank_ids: Array, source: str, bank_source: str) -> tuple[Tensor, Tensor]:
    """Both as int64, equal where they are."""
    np = require("numpy", EXTRA)
    ids, bank_ids = alike((source, ids), (bank_source, bank_ids))
    if ids.dtype.kind == "U":
        _, inverse = np.unique(np.concatenate([ids, bank_ids]), return_inverse=True)
        ids, bank_ids = inverse[: len(ids)], inverse[len(ids) :]
    return torch.from_numpy(ids.astype("int64")), torch.from_numpy(bank_ids.astype("int64"))


def check_rows(rows: Tensor, ids: Array, source: str) -> None:
    """Raise InputError for rows that are not of a floating-point dtype, or not finite, naming the template."""
    if rows.dtype not in DTYPES:
        raise InputError(f"{source}: expected floating-point descriptors, got {rows.dtype}")
    for at in range(0, len(rows), BLOCK_ROWS):
        bad = (~rows[at : at + BLOCK_ROWS].isfinite().all(1)).nonzero()
        if len(bad):
            raise InputError(f"{source}: template {ids[at + int(bad[0])]}: expected a finite descriptor")
