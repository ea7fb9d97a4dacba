"""The folder of compiled libraries: what is loaded from it, what is not, and that a call goes on whatever is there."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fcn_kernels import compiler

SOURCE = 'extern "C" [[gnu::visibility("default")]] int answer() { return ANSWER; }\n'
needs_compiler = pytest.mark.skipif(sys.platform != "linux", reason="it is compiled on Linux alone")
pytestmark = needs_compiler


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of its own, an empty cache, and a compiler that remembers nothing."""
    try:
        compiler._compiler()
    except compiler.NoCompilerError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "load", compiler.load.__wrapped__)
    file = tmp_path / "source" / "answer.cpp"
    file.parent.mkdir()
    file.write_text(SOURCE)
    return file


def answer(source: Path, value: int = 42) -> int:
    return int(compiler.load(source, f"ANSWER={value}").answer())


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "fcn_kernels").iterdir())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, by the names of the sources."""
    names: list[str] = []
    run = compiler._run
    monkeypatch.setattr(
        compiler, "_run", lambda command: names.append(command[-1]) or run(command) if "-o" in command else run(command)
    )
    return names


def test_folder_and_file_are_ours_alone(source: Path, tmp_path: Path) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_an_entry_is_used_again(source: Path, tmp_path: Path, compiled: list[str]) -> None:
    assert [answer(source), answer(source), answer(source, 7)] == [42, 42, 7]
    assert len(compiled) == len(entries(tmp_path)) == 2
    assert [answer(source, 7), answer(source), answer(source, 7)] == [7, 42, 7]  # each its own, once both are kept
    assert len(compiled) == 2


def test_of_those_who_need_a_library_at_once_one_compiles_it(source: Path, tmp_path: Path, compiled: list[str]) -> None:
    """Locks are of an open file, so that threads stand for processes here."""
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, [source] * 4)) == [42] * 4
    assert len(compiled) == len(entries(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "one bit", "no digest"])
def test_a_damaged_entry_is_made_again(source: Path, tmp_path: Path, compiled: list[str], damage: str) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    bad = {
        "truncated": whole[: len(whole) // 2],
        "random": os.urandom(len(whole)),
        "empty": b"",
        "one bit": bytes(flipped),
        "no digest": whole[:-32],
    }
    entry.write_bytes(bad[damage])
    assert answer(source) == 42
    assert len(compiled) == 2
    assert entries(tmp_path) == [entry]
    assert len(entry.read_bytes()) == len(whole)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_may_write_to_is_not_used(
    source: Path, tmp_path: Path, compiled: list[str], caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    entry.parent.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert answer(source) == 42
    assert len(compiled) == 2
    assert f"others may write to it (mode {mode:o})" in caplog.text


def test_a_file_that_others_may_write_to_is_not_loaded(
    source: Path, tmp_path: Path, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    entry.chmod(0o622)
    assert answer(source) == 42
    assert len(compiled) == 2
    assert "others may write to it (mode 622)" in caplog.text
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600  # made again


def test_a_link_is_not_followed(source: Path, tmp_path: Path, compiled: list[str]) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    elsewhere = tmp_path / "elsewhere.so"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    assert answer(source) == 42
    assert len(compiled) == 2
    assert not entry.is_symlink()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_not_loaded(
    source: Path, tmp_path: Path, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    os.chown(entry, 12345, 12345)
    assert answer(source) == 42
    os.chown(entry.parent, 12345, 12345)
    assert answer(source) == 42
    assert len(compiled) == 3
    assert caplog.text.count("it belongs to user 12345") == 2


def test_a_relative_cache_folder_is_ignored(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert answer(source) == 42
    assert not (tmp_path / "relative").exists()
    assert len(list((tmp_path / "home" / ".cache" / "fcn_kernels").iterdir())) == 1


def test_with_nowhere_to_keep_it_nothing_is_left_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert answer(source) == 42
    assert list((tmp_path / "tmp").iterdir()) == []


READ_ONLY = """
import os, sys
from pathlib import Path
os.setgid(12345); os.setuid(12345)
from fcn_kernels import compiler
run = compiler._run
compiler._run = lambda command: sys.exit("compiled") if "-o" in command else run(command)
print(compiler.load(Path(sys.argv[1]), "ANSWER=42").answer())
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root writes whatever the mode says")
def test_a_read_only_cache_with_a_good_entry_is_used(source: Path, tmp_path: Path) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    for path in (entry, entry.parent):
        os.chown(path, 12345, 12345)
    entry.chmod(0o400)
    entry.parent.chmod(0o500)
    for parent in [tmp_path, *tmp_path.parents]:
        if not parent.stat().st_mode & stat.S_IXOTH:
            pytest.skip(f"{parent} is closed to other users")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(source)], env=environment, capture_output=True, text=True, cwd="/"
    )
    if "PermissionError" in ran.stderr or "ModuleNotFoundError" in ran.stderr:
        pytest.skip("another user cannot read this installation")
    assert ran.stdout == "42\n", ran.stderr


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_writes_nothing_or_speaks_no_utf8_is_an_error_of_ours(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "lazy", "exit 0"))
    with pytest.raises(compiler.CompilerError, match="wrote no library"):
        answer(source)
    real = " ".join(compiler_of(monkeypatch))
    monkeypatch.setenv("CXX", script(tmp_path / "latin", f"""printf 'K\\374rzel\\n'\nexec {real} "$@" """))
    assert answer(source) == 42


def compiler_of(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.delenv("CXX")
    return compiler._compiler()


def test_without_a_temporary_folder(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    with pytest.raises(compiler.CompilerError, match="FileNotFoundError"):
        answer(source)


def test_a_folder_removed_between_two_libraries_is_made_again(source: Path, tmp_path: Path) -> None:
    assert answer(source) == 42
    (entry,) = entries(tmp_path)
    entry.unlink()
    entry.parent.rmdir()
    assert answer(source, 7) == 7
    assert len(entries(tmp_path)) == 1


def test_without_a_name_of_the_processor_it_is_built_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *args: object, **options: object) -> str:
        raise FileNotFoundError(self)

    assert compiler._cpu()[1] == ("-march=native",)
    monkeypatch.setattr(Path, "read_text", missing)
    assert compiler._cpu() == ("any", ())


FORK = """
import os, torch
from fcn_kernels import coreset_select
torch.set_num_threads(4)
x = torch.randn(4, 3000, 64)
wanted = coreset_select(x, 5, backend="cpp").indices
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(coreset_select(x, 5, backend="cpp").indices, wanted) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_selects_too() -> None:
    ran = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "0\n", ran.stderr
