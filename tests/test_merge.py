"""Shards of `aggregate` and what `merge` makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fcn_kernels.__main__ import main
from fcn_kernels.files.aggregate import Shard
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, 300)
    features = rng.standard_normal((300, 16)).astype("float32")
    np.savez("in.npz", features=features, template_ids=ids)
    np.savez("names.npz", features=features, template_ids=np.array([f"person {i}" for i in ids]))
    torch.manual_seed(0)
    head = ClusterAggregate(16, 2, 1, style_dim=0, norm_dim=16)
    torch.save(head.state_dict(), "head.pt")


def load(path: str) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def same(one: str, other: str) -> None:
    a, b = load(one), load(other)
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert values.dtype == b[name].dtype
        assert np.array_equal(values, b[name]), name


@pytest.mark.parametrize("source", ["in.npz", "names.npz"])
@pytest.mark.parametrize("head", [[], ["--checkpoint", "head.pt"]], ids=["coreset", "clusters"])
def test_shards_merge_to_what_one_process_writes(source: str, head: list[str]) -> None:
    assert main(["aggregate", source, *head, "--out", "whole.npz"]) == 0
    parts = [f"part{i}.npz" for i in range(3)]
    for i, part in enumerate(parts):
        assert main(["aggregate", source, *head, "--out", part, "--shard", f"{i}/3"]) == 0
        assert 0 < len(load(part)["template_ids"]) < 40
    assert main(["merge", *reversed(parts), "--out", "merged.npz"]) == 0
    same("merged.npz", "whole.npz")


def test_states_merge_and_a_shard_takes_up_its_own() -> None:
    shards = [f"{i}/2" for i in range(2)]
    command = ["aggregate", "in.npz", "--checkpoint", "head.pt"]
    for i, part in enumerate(shards):
        files = ["--out", f"out{i}.npz", "--state-out", f"state{i}.npz"]
        assert main([*command, "--shard", part, *files]) == 0
    assert main(["merge", "state0.npz", "state1.npz", "--out", "state.npz"]) == 0
    assert main([*command, "--out", "whole.npz", "--state-out", "whole-state.npz"]) == 0
    same("state.npz", "whole-state.npz")
    for i, part in enumerate(shards):
        assert main([*command, "--shard", part, "--state-in", "state.npz", "--out", f"again{i}.npz"]) == 0
    assert main(["merge", "again0.npz", "again1.npz", "--out", "again.npz"]) == 0
    assert main([*command, "--state-in", "state.npz", "--out", "both.npz"]) == 0
    same("again.npz", "both.npz")


def test_under_torchrun_a_process_takes_and_names_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["aggregate", "in.npz", "--out", "parts.npz"]) == 0
    ids = [load(f"parts.{rank}-of-2.npz")["template_ids"] for rank in range(2)]
    assert sorted(np.concatenate(ids).tolist()) == sorted({*load("in.npz")["template_ids"].tolist()})
    assert all(Shard(rank, 2).has(one) for rank in range(2) for one in ids[rank].tolist())


@pytest.mark.parametrize("rank", [None, "2", "x"])
def test_ranks_that_are_none_are_refused(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launchers leave it to every process of a job
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main(["aggregate", "in.npz", "--out", "parts.npz"]) == 2
    assert f"RANK/WORLD_SIZE: expected I/N with 0 <= I < N, got {rank or ''}/2" in capsys.readouterr().err
    assert main(["aggregate", "in.npz", "--out", "parts.npz", "--shard", "0/1"]) == 0


def test_torchrun_itself() -> None:
    """Two processes at once, whose outputs merge to what one writes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = ["-m", "fcn_kernels", "aggregate", "in.npz", "--out", "parts.npz"]
    done = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main(["merge", "parts.0-of-2.npz", "parts.1-of-2.npz", "--out", "merged.npz"]) == 0
    assert main(["aggregate", "in.npz", "--out", "whole.npz"]) == 0
    same("merged.npz", "whole.npz")


@pytest.mark.parametrize("kind", ["npz", "npy", "pt", "safetensors", "parquet"])
def test_a_shard_may_be_empty(kind: str) -> None:
    np.savez("one.npz", features=np.ones((3, 4), "float32"), template_ids=np.array([7, 7, 7]))
    parts = [f"part{i}.{kind}" for i in range(2)]
    for i, part in enumerate(parts):
        assert main(["aggregate", "one.npz", "--out", part, "--shard", f"{i}/2"]) == 0
    for order in (parts, parts[::-1]):
        assert main(["merge", *order, "--out", "merged.npz", "--overwrite"]) == 0
        assert load("merged.npz")["template_ids"].tolist() == [7]


def test_ids_of_signed_and_unsigned_dtypes_stay_what_they_are() -> None:
    np.savez("a.npz", template_ids=np.array([2**60 + 1, 7], "uint64"), norms=[1.0, 2.0])
    np.savez("b.npz", template_ids=np.array([2**60 + 3, 5], "int64"), norms=[3.0, 4.0])
    assert main(["merge", "a.npz", "b.npz", "--out", "o.npz"]) == 0
    found = load("o.npz")
    assert found["template_ids"].dtype == "int64"
    assert found["template_ids"].tolist() == [5, 7, 2**60 + 1, 2**60 + 3]
    assert found["norms"].tolist() == [4.0, 2.0, 1.0, 3.0]
    np.savez("c.npz", template_ids=np.array([2**63 + 1], "uint64"), norms=[5.0])
    assert main(["merge", "c.npz", "b.npz", "--out", "o.npz", "--overwrite"]) == 0
    assert load("o.npz")["template_ids"].tolist() == [5, 2**60 + 3, 2**63 + 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "large.npz", "negative.npz", "--out", "o.npz"], "-1 or less in negative.npz, more in large.npz"),
        (["merge", "a.npz", "a2.npz", "--out", "o.npz"], "template 2 is in a.npz and a2.npz"),
        (["merge", "a.npz", "wide.npz", "--out", "o.npz"], "wide.npz: expected the columns of a.npz"),
        (["merge", "a.npz", "text.npz", "--out", "o.npz"], "got strings in text.npz and integers in a.npz"),
        (["merge", "short.npz", "--out", "o.npz"], "short.npz: expected 2 rows, as in 'template_ids', in 'norms'"),
        (["merge", "a.npz", "none.npz", "--out", "o.npz"], "none.npz"),
        (["merge", "days.npz", "--out", "o.pt"], "days.npz: expected numbers or strings, got datetime64[D] in 'norms'"),
        (["merge", "a.npz", "--out", "a.npz", "--overwrite"], "is read from"),
        (["merge", "text.npz", "--out", "o.safetensors"], "cannot hold template ids that are strings"),
    ],
)
def test_parts_that_do_not_fit_are_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("a.npz", template_ids=[1, 2], norms=[1.0, 2.0])
    np.savez("a2.npz", template_ids=[2, 3], norms=[1.0, 2.0])
    np.savez("wide.npz", template_ids=[4], norms=[[1.0, 2.0]])
    np.savez("text.npz", template_ids=["x"], norms=[1.0])
    np.savez("short.npz", template_ids=[1, 2], norms=[1.0])
    np.savez("days.npz", template_ids=[1], norms=np.array(["2020-01-01"], "datetime64[D]"))
    np.savez("large.npz", template_ids=np.array([2**63], "uint64"), norms=[1.0])
    np.savez("negative.npz", template_ids=[-1], norms=[1.0])
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not Path("o.npz").exists()


def test_lists_of_strings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """They were written down as addresses, which ended the process when they were read again."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"template_ids": [1, 2], "names": [["Ada"], ["Bo"]]}), "a.parquet")
    assert main(["merge", "a.parquet", "--out", "o.npz"]) == 2
    assert "a.parquet: expected lists of numbers in 'names', got list<" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2/2", "-1/2", "x/3", "1", "0/0"])
def test_shards_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["aggregate", "in.npz", "--out", "o.npz", f"--shard={text}"])
    assert stopped.value.code == 2
    assert "expected I/N with 0 <= I < N" in capsys.readouterr().err
