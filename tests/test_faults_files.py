"""Hostile and unusual files, outputs and options: each is taken as its author meant it, or refused in a sentence."""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_kernels.__main__ import main
from fcn_kernels.cli import aggregate
from fcn_kernels.files import formats
from fcn_kernels.files.formats import InputError
from fcn_kernels.files.output import replacing
from tests.test_aggregate import DIM, INPUTS, ROWS, SIZES, arguments, compare, load, make, refused, result, save

np = pytest.importorskip("numpy")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tqdm")


def run_over(folder: Path, *inputs: object, options: tuple[object, ...] = ()) -> dict[str, Any]:
    aggregate.run_checked(arguments(*inputs, "--out", folder / "p.npz", "--overwrite", *options))
    return load(folder / "p.npz")


def rejected(folder: Path, inputs: list[str], *options: object) -> str:
    return refused(folder, inputs, "--overwrite", *options)


# Files that others write


@pytest.mark.parametrize(
    "ids",
    [
        lambda ids: ids.astype(">i4"),
        lambda ids: ids.astype(np.float32),
        lambda ids: ids.astype(np.float16),
        lambda ids: ids.astype("S"),
        lambda ids: ids.astype(str).astype(object),
    ],
    ids=["big-endian", "whole floats", "whole halves", "bytes", "object strings"],
)
@pytest.mark.parametrize("kind", ["npz", "npz-compressed", "npy"])
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_ids_of_other_types_name_the_same_templates(tmp_path: Path, ids: Any, kind: str, suffix: str) -> None:
    columns = make()
    want = result(tmp_path, columns)
    columns["template_ids"] = ids(columns["template_ids"])
    inputs = save(tmp_path, kind, columns)
    assert main(["aggregate", *inputs, "--out", str(tmp_path / f"p{suffix}")]) == 0
    got = load(tmp_path / f"p{suffix}")
    assert [int(one) for one in got["template_ids"]] == want["template_ids"].tolist()
    np.testing.assert_array_equal(got["descriptors"], want["descriptors"])


def test_a_list_may_hold_ids_that_need_all_64_bits(tmp_path: Path) -> None:
    columns = make()
    ids = [2**63 + one if one % 2 else one for one in columns["template_ids"].tolist()]
    torch.save({"features": torch.from_numpy(columns["features"]), "template_ids": ids}, tmp_path / "in.pt")
    assert run_over(tmp_path, tmp_path / "in.pt")["template_ids"].tolist() == sorted(set(ids))
    torch.save({"features": torch.ones(2, 8), "template_ids": [-1, 2**63]}, tmp_path / "in.pt")
    assert "cannot be read: " in rejected(tmp_path, [str(tmp_path / "in.pt")])


def test_fields_are_no_column(tmp_path: Path) -> None:
    columns = make()
    with warnings.catch_warnings(action="ignore"):  # NumPy's, of the format that such names need
        inputs = save(tmp_path, "npz", columns | {"quality": np.ones(ROWS, [("质量", "f4")])})
    assert "quality.npy: expected numbers or strings, of .npy format 1.0 or 2.0" in rejected(tmp_path, inputs)


@pytest.mark.parametrize(
    "values", [[0.5], [np.nan], [2.0**60], [np.inf], np.array([2.0**24], "float32"), np.array([2.0**11], "float16")]
)
def test_ids_that_are_no_integers_are_refused(tmp_path: Path, values: Any) -> None:
    """Nor are such that stand for several, as 2^24 + 1 has become 2^24 in float32."""
    columns = make()
    columns["template_ids"] = np.resize(values, ROWS)
    assert "expected integers or strings in 'template_ids'" in rejected(tmp_path, save(tmp_path, "npz", columns))


@pytest.mark.parametrize("kind", ["npz", "npz-compressed", "npy", "npy-fields"])
def test_big_endian_features_are_taken(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE", 300)  # several
    columns = make()
    want = result(tmp_path, columns)
    columns["features"] = columns["features"].astype(">f4")
    compare(run_over(tmp_path, *save(tmp_path, kind, columns)), want, 0)


def test_records_of_any_size_are_taken(tmp_path: Path) -> None:
    columns = make()
    want = result(tmp_path, columns)
    records = np.zeros(ROWS, [("flag", "i1"), ("features", "f4", (DIM,)), ("template_ids", "i8"), ("rest", "S2")])
    assert records.itemsize % 4
    for name in ("features", "template_ids"):
        records[name] = columns[name]
    np.save(tmp_path / "in.npy", records)
    compare(run_over(tmp_path, tmp_path / "in.npy"), want, 0)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">u2", "f2"])
def test_whole_and_half_numbers_are_features(tmp_path: Path, dtype: str) -> None:
    columns = make()
    columns["features"] = columns["features"].round().astype(dtype.replace("u", "i")).astype(dtype)
    want = result(tmp_path, columns | {"features": columns["features"].astype(np.float32)})
    compare(result(tmp_path, columns), want, 0)


@pytest.mark.parametrize("suffix", [".pth", ".PT", ".Pt"])
def test_endings_of_tensors_have_other_spellings(tmp_path: Path, suffix: str) -> None:
    columns = make()
    torch.save({name: torch.from_numpy(column) for name, column in columns.items()}, tmp_path / f"in{suffix}")
    want = result(tmp_path, columns)
    compare(run_over(tmp_path, tmp_path / f"in{suffix}"), want, 0)
    np.savez(tmp_path / "IN.NPZ.npz", **columns)
    (tmp_path / "IN.NPZ.npz").rename(tmp_path / "IN.NPZ")
    aggregate.run_checked(arguments(tmp_path / "IN.NPZ", "--out", tmp_path / "OUT.PARQUET"))
    assert pq.read_table(tmp_path / "OUT.PARQUET").column("counts").to_pylist() == want["counts"].tolist()


@pytest.mark.parametrize("old_numpy", [False, True])
def test_a_pt_may_hold_arrays_and_parameters(tmp_path: Path, old_numpy: bool) -> None:
    columns = make()
    want = result(tmp_path, columns)
    content: dict[str, Any] = columns | {"features": np.asfortranarray(columns["features"])}
    content["template_ids"] = content["template_ids"].astype(str).astype(object)
    path = tmp_path / "in.pt"
    torch.save(content, path)
    if old_numpy:  # the name of its module before NumPy 2 is a byte shorter, and so is this
        raw = tmp_path / "raw.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(raw, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        raw.replace(path)
    got = run_over(tmp_path, path)
    assert got.pop("template_ids").tolist() == want.pop("template_ids").astype(str).tolist()
    compare(got, want, 0)
    torch.save({"features": torch.nn.Parameter(torch.from_numpy(columns["features"]))}, path)
    torch.save(torch.load(path) | {"template_ids": torch.from_numpy(columns["template_ids"])}, path)
    got = run_over(tmp_path, path)
    np.testing.assert_array_equal(got["descriptors"], want["descriptors"])


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda f: f.to("meta"), "a meta one"),
        (lambda f: f.to_sparse(), "a nested or sparse one"),
        (lambda f: torch.nested.nested_tensor([f, f[:2]], layout=torch.jagged), ""),
        (lambda f: f[:1].clone().expand(ROWS, DIM), "a place for every number"),
        (lambda f: torch.ones(()).expand(2**40, 2**20), "a place for every number"),
        (lambda f: torch.quantize_per_tensor(f, 0.1, 0, torch.qint8), ""),
        (lambda f: f.to(torch.complex64), "got complex64"),
    ],
)
def test_tensors_that_are_no_rows_are_refused(tmp_path: Path, tensor: Any, reason: str) -> None:
    columns = make()
    content = {"features": tensor(torch.from_numpy(columns["features"])), "template_ids": columns["template_ids"]}
    torch.save(content, tmp_path / "in.pt")
    message = rejected(tmp_path, [str(tmp_path / "in.pt")])
    assert message.startswith(f"{tmp_path / 'in.pt'}: ")
    assert reason in message


def test_a_column_for_each_feature(tmp_path: Path) -> None:
    columns = make()
    want = result(tmp_path, columns)
    shuffled = np.random.default_rng(2).permutation(DIM)
    table = {f"f{place}": columns["features"][:, place] for place in shuffled} | {
        "template_ids": columns["template_ids"]
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    compare(run_over(tmp_path, tmp_path / "in.parquet", options=("--features", "f[0-9]*")), want, 0)
    np.savez(tmp_path / "in.npz", **table)
    compare(run_over(tmp_path, tmp_path / "in.npz", options=("--features", "f?*")), want, 0)
    table["f3"] = table["f3"].astype(np.float64)
    np.savez(tmp_path / "in.npz", **table)
    assert "in 'f3', as in 'f0', got float64" in rejected(tmp_path, [str(tmp_path / "in.npz")], "--features", "f*")


def test_a_folder_of_parquet_is_one_table(tmp_path: Path) -> None:
    columns = make() | {"quality": np.random.default_rng(5).uniform(0.5, 3, ROWS)}
    want = result(tmp_path, columns)
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "_SUCCESS").touch()
    table = pa.table({n: list(c) for n, c in columns.items()})
    for name, rows in (("more/part-2", slice(20, ROWS)), ("part-1", slice(0, 0)), ("a", slice(0, 20))):
        pq.write_table(table.slice(rows.start, rows.stop - rows.start), folder / f"{name}.parquet")
    compare(run_over(tmp_path, folder), want, 0)
    pq.write_table(table.drop_columns("quality"), folder / "z.parquet")
    assert rejected(tmp_path, [str(folder)]).startswith(f"{folder / 'z.parquet'}: has other columns")
    assert "or a folder of .parquet" in rejected(tmp_path, [str(folder / "empty")])


def test_ids_may_stand_in_a_csv(tmp_path: Path) -> None:
    columns = make() | {"quality": np.random.default_rng(5).uniform(0.5, 3, ROWS)}
    want = result(tmp_path, columns)
    np.save(tmp_path / "x.npy", columns["features"])
    table = tmp_path / "t.csv"
    lines = [f"{i},{float(q)!r}" for i, q in zip(columns["template_ids"], columns["quality"], strict=True)]
    table.write_text("\n".join(["template_ids,quality", *lines]))
    compare(run_over(tmp_path, tmp_path / "x.npy", table), want, 0)
    table.write_text("\r\n".join(["person,sharpness", *lines, ""]), encoding="utf-8-sig")
    options = ("--ids", "person", "--quality", "sharpness")
    compare(run_over(tmp_path, tmp_path / "x.npy", table, options=options), want, 0)
    inputs = [str(tmp_path / "x.npy"), str(table)]
    assert "expected a column 'template_ids', got 'person', 'sharpness'" in rejected(tmp_path, inputs)
    ids = [f"00{i}" for i in columns["template_ids"]]  # no integers: their zeros count
    table.write_text("\n".join(ids))
    got = run_over(tmp_path, tmp_path / "x.npy", table)
    assert got["template_ids"].tolist() == sorted({*ids})
    table.write_text("\n".join(["template_ids,quality", *lines[:-1], "12"]))
    assert "lines of as many fields, got [1, 2] fields" in rejected(tmp_path, inputs)


# Files that promise what they do not hold


def _member(path: Path, name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for n, data in members.items():
            archive.writestr(n, content if n == name else data)


@pytest.mark.parametrize("kind", ["npz", "npz-compressed"])
@pytest.mark.parametrize("shape", [(ROWS + 1, DIM), (2**62, DIM), (ROWS - 1, DIM)])
def test_headers_that_promise_more_or_less_are_refused(tmp_path: Path, kind: str, shape: tuple[int, int]) -> None:
    columns = make()
    inputs = save(tmp_path, kind, columns)
    header = tmp_path / "header.npy"
    with header.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.write(columns["features"].tobytes())
    method = zipfile.ZIP_STORED if kind == "npz" else zipfile.ZIP_DEFLATED
    _member(Path(inputs[0]), "features.npy", header.read_bytes(), method)
    header.unlink()
    message = rejected(tmp_path, inputs)
    assert message.startswith(f"{inputs[0]}: features.npy: promises float32 of shape {shape}")


@pytest.mark.parametrize("kind", ["npz", "npz-compressed"])
def test_a_byte_that_changed_on_the_way_is_noticed(tmp_path: Path, kind: str) -> None:
    inputs = save(tmp_path, kind, make())
    content = bytearray(Path(inputs[0]).read_bytes())
    with zipfile.ZipFile(inputs[0]) as archive:
        member = archive.getinfo("features.npy")
    content[member.header_offset + member.compress_size - 100] ^= 1
    Path(inputs[0]).write_bytes(content)
    assert rejected(tmp_path, inputs).startswith(f"{inputs[0]}: features.npy: cannot be read: ")


@pytest.mark.parametrize("kind", ["npz-compressed", "parquet"])
def test_what_unpacks_to_more_than_a_limit_is_refused_until_it_is_lifted(tmp_path: Path, kind: str) -> None:
    columns = make()
    want = result(tmp_path, columns)
    inputs = save(tmp_path, kind, columns)
    little = columns["features"].nbytes / 2**30
    message = rejected(tmp_path, inputs, "--max-unpacked", little * 0.9)
    assert message.startswith(f"{inputs[0]}: ")
    assert "--max-unpacked allows more" in message
    compare(run_over(tmp_path, *inputs, options=("--max-unpacked", little * 1.5)), want, 0)


def test_a_full_disk_while_unpacking_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    inputs = save(tmp_path, "npz-compressed", make())
    monkeypatch.setattr(formats._Unpacked, "write", full)
    assert main(["aggregate", *inputs, "--out", str(tmp_path / "o.npz")]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert inputs[0] not in error


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(INPUTS),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    cut=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_damage_ends_in_a_sentence(kind: str, place: float, byte: int, cut: bool, seed: int) -> None:
    """One byte is another, or all from it on are gone: refused as the file's fault, or computed from what is there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [Path(path) for path in save(folder, kind, make(seed))]
        damaged = paths[seed % len(paths)]
        content = bytearray(damaged.read_bytes())
        at = int(place * len(content))
        damaged.write_bytes(content[:at] if cut else content[:at] + bytes([byte]) + content[at + 1 :])
        status = main(["aggregate", *map(str, paths), "--out", str(folder / "o.npz"), "--max-unpacked", "0.01"])
        assert status in (0, 2)
        assert (folder / "o.npz").exists() == (status == 0)
        assert not list(folder.glob(".fcn*"))


# Options


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--k", "1e8"], 2, "--k 100000000: expected at most 4096, or the 30 rows of the largest template"),
        (["--batch-rows", "1e20"], 0, ""),
        (["--device", "meta"], 2, "--device meta: "),
        (["--dtype", "float16", "--skip-bad-rows"], 0, ""),
        (["--max-unpacked", "1e300"], 0, ""),
    ],
)
def test_options_at_the_ends_of_sense(
    tmp_path: Path, options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = save(tmp_path, "npz", make())
    assert main(["aggregate", *inputs, "--out", str(tmp_path / "o.npz"), *options]) == status
    assert message in capsys.readouterr().err
    assert (tmp_path / "o.npz").exists() == (status == 0)


@pytest.mark.parametrize("text", ["1.5", "-3", "nan", "inf", "many"])
def test_counts_that_are_none_are_usage_errors(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["aggregate", "x.npz", "--out", "o.npz", "--k", text])
    assert left.value.code == 2
    assert f"argument --k: expected a whole number of at least 1, got {text}" in capsys.readouterr().err


def test_k_may_be_as_large_as_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcn_kernels.files.aggregate.MOST_PICKS", 5)
    assert result(tmp_path, make(), "--k", 30)["counts"].tolist() == list(SIZES)
    assert "expected at most 5, or the 30 rows" in rejected(tmp_path, save(tmp_path, "npz", make()), "--k", 31)


def test_memory_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    inputs = save(tmp_path, "npz", make())
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(aggregate, "aggregate", fail)
        assert main(["aggregate", *inputs, "--out", str(tmp_path / "o.npz")]) == 1
        assert "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e18, 1e30])
@pytest.mark.parametrize("scaled", ["features", "quality"])
def test_descriptors_are_unit_whatever_the_rows_lengths(tmp_path: Path, scaled: str, size: float) -> None:
    """Their squares, and those of the means, leave float32 by far."""
    columns = make()
    columns["quality"] = np.linalg.norm(columns["features"], axis=1)
    if scaled == "features":
        del columns["quality"]
    want = result(tmp_path, columns)
    columns[scaled] = columns[scaled] * np.float32(size)
    got = result(tmp_path, columns)
    np.testing.assert_array_equal(got["picks"], want["picks"])
    np.testing.assert_allclose(got["descriptors"], want["descriptors"], atol=1e-6)
    np.testing.assert_allclose(got["norms"] / size, want["norms"], rtol=1e-5)


def test_descriptors_that_are_not_finite_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = aggregate.mean_of_coreset

    def broken(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        out.descriptor[3, 0] = torch.nan
        return out

    monkeypatch.setattr(aggregate, "mean_of_coreset", broken)
    inputs = save(tmp_path, "npz", make())
    assert main(["aggregate", *inputs, "--out", str(tmp_path / "o.npz")]) == 1
    assert f"{inputs[0]}: the descriptor of template 13 is not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


# Where the output goes


def test_output_that_could_not_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    inputs = save(tmp_path, "npz", make())
    loop = tmp_path / "loop.npz"
    loop.symlink_to(loop)
    (tmp_path / "gone.npz").symlink_to(tmp_path / "nowhere" / "o.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    for out, reason in (
        (loop, "cannot be written: "),
        (tmp_path / ("x" * 300 + ".npz"), "cannot be written: File name too long"),
        (Path(f"{tmp_path}/a\0b.npz"), "cannot be written: embedded null byte"),
        (tmp_path / "gone.npz", "expected a file in a folder that exists"),
        (tmp_path / "pipe.npz", "is no regular file"),
        (Path("/proc/o.npz"), "expected a file in a folder that exists and can be written to"),
    ):
        with pytest.raises(InputError, match=reason):
            aggregate.run_checked(arguments(*inputs, "--out", out, "--overwrite"))
    longest = tmp_path / ("x" * 251 + ".npz")
    assert aggregate.run(arguments(*inputs, "--out", longest)) == 0
    assert longest.exists()


def test_a_file_that_appeared_during_the_run_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "o.npz"

    def write() -> None:
        with replacing(out, overwrite=False) as file:
            file.write(b"ours")
            out.write_bytes(b"theirs")

    with pytest.raises(FileExistsError, match="appeared during the run"):
        write()
    assert out.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [out]
    with replacing(out, overwrite=True) as file:
        file.write(b"ours")
    assert out.read_bytes() == b"ours"


@pytest.mark.parametrize("there", [False, True])
def test_a_file_system_without_hard_links(tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "o.npz"
    if there:
        out.write_bytes(b"theirs")
        with pytest.raises(FileExistsError), replacing(out, overwrite=False) as file:
            file.write(b"ours")
    else:
        with replacing(out, overwrite=False) as file:
            file.write(b"ours")
    assert out.read_bytes() == (b"theirs" if there else b"ours")
    assert list(tmp_path.iterdir()) == [out]


def test_the_temporary_file_cannot_be_foreseen_nor_led_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    names = set()
    for _ in range(2):
        with replacing(tmp_path / "o.npz", overwrite=True):
            (temporary,) = tmp_path.glob(".fcn-*.tmp")
            names.add(temporary.name)
    assert len(names) == 2
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / ".fcn-known.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError), replacing(tmp_path / "o.npz", overwrite=True) as file:
        file.write(b"ours")
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path: Path, mode: int) -> None:
    inputs = save(tmp_path, "npz", make())
    (tmp_path / "o.npz").touch()
    (tmp_path / "o.npz").chmod(mode)
    aggregate.run_checked(arguments(*inputs, "--out", tmp_path / "o.npz", "--overwrite"))
    assert stat.S_IMODE((tmp_path / "o.npz").stat().st_mode) == mode


# Ctrl-C


def test_ctrl_c_during_imports_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fcn_kernels.__main__.import_module", interrupt)
    assert main(["aggregate", "x.npz", "--out", "o.npz"]) == 130
    assert capsys.readouterr().err == "python -m fcn_kernels: interrupted\n"


def test_ctrl_c_while_pytorch_is_imported_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(formats.__file__).parents[2]}"}
    command = [sys.executable, "-m", "fcn_kernels", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "python -m fcn_kernels: interrupted\n"


# The process


def run_process(folder: Path, *arguments: object, shell: str = "") -> subprocess.CompletedProcess[str]:
    """A command of the package in a process of its own, whose streams the shell may close or lead elsewhere."""
    command = shlex.join([sys.executable, "-m", "fcn_kernels", *map(str, arguments)])
    environment = os.environ | {"PYTHONPATH": str(Path(formats.__file__).parents[2])}
    return subprocess.run(
        f"{command} {shell}", shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
def test_a_closed_stderr_changes_nothing_but_what_is_seen(tmp_path: Path) -> None:
    (source,) = save(tmp_path, "npz", make())
    assert run_process(tmp_path, "aggregate", source, "--out", "o.npz", shell="2>&-").returncode == 0
    compare(load(tmp_path / "o.npz"), result(tmp_path, make()), 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_said_in_a_sentence(
    tmp_path: Path, unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = run_process(tmp_path, "info", shell="> /dev/full")
    assert re.fullmatch(r"python -m fcn_kernels( info)?: \[Errno 28\] No space left on device\n", done.stderr)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--device", "nowhere"], "python -m fcn_kernels info: --device nowhere: "),
        (["demo", "--device", "nowhere"], "python -m fcn_kernels demo: --device nowhere: "),
        (["demo", "--out", "."], "python -m fcn_kernels demo: --out: expected a file, got the folder ."),
        (["train-demo", "--device", "nowhere"], "python -m fcn_kernels train-demo: --device nowhere: "),
        (["train-demo", "--out", "file"], "python -m fcn_kernels train-demo: --out: expected a folder, got the file"),
    ],
)
def test_other_commands_refuse_in_a_sentence_too(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [["info", "--rows", "0"], ["info", "--k", "x"], ["demo", "--steps", "0"]])
def test_sizes_that_are_none_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
