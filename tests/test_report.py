"""The benchmarks' report: a quick run of some, and results made up here whose tables can be worked out by hand."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.model.calls import BACKWARD, CALLS, EVAL, TRAINING
from benchmarks.report import picture, predictions, targets
from benchmarks.report import tables as report
from benchmarks.report.results import Results, Row, exponent, load
from fcn_kernels import coreset_select

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.xdist_group("report")

ROOT = Path(__file__).parents[1]
ABOUT = {
    "device": "a GPU",
    "device_type": "cuda",
    "python": "3.12",
    "torch": "2.11",
    "triton": "3.6",
    "fcn_kernels": "0",
    "commit": "abc",
    "threads": 1,
    "copy_gb_per_s": 1000.0,
}


def row(name: str, seconds: float, n: int, **facts: Any) -> Row:
    """A row as the benchmarks write it, of one set of n rows of 1,024 bytes."""
    work = facts.get("work", "forward")
    made = {
        **ABOUT,
        "group": "scaling",
        "implementation": name,
        "work": work,
        "clock": "device events",
        "median_s": seconds,
        "q1_s": 0.9 * seconds,
        "q3_s": 1.2 * seconds,
        "samples": 9,
        "sets": 1,
        "rows": n,
        "all_rows": n,
        "dim": 512,
        "k": 3,
        "dtype": "bfloat16",
        "tiers": ["resident"],
        "bytes_moved": 1024 * n,
        "least_bytes": 1024 * n,
        "gb_per_s": 1.0,
        "copy_share": 0.001,
        **facts,
    }
    return Row(**made)


def results(*rows: Row, missing: dict[str, str] | None = None) -> Results:
    return Results(list(rows), missing or {}, "2026-01-02T03:04:05")


def judged(found: Results) -> dict[str, targets.Target]:
    return {t.name: t for t in targets.judge(found)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a quick run of three of the benchmarks."""
    out = tmp_path_factory.mktemp("quick") / "results.json"
    which = [f"benchmarks/test_{name}.py" for name in ("scaling", "memory", "graphs")]
    command = [sys.executable, "-m", "pytest", *which, "--benchmark-only", "--quick", f"--benchmark-json={out}"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_row_of_a_run_says_where_and_how_it_was_measured(quick: Path) -> None:
    found = load(quick)
    for r in found.rows:
        assert all((r.device, r.commit, r.threads >= 1))
        assert r.copy_gb_per_s > 0
    timed = found.of("scaling")
    assert len(timed) == 12  # 3 lengths, 2 implementations, 2 kinds of work
    for r in timed:
        assert 0 < r.q1_s <= r.median_s <= r.q3_s
        if r.implementation == "fused":
            assert r.gb_per_s == pytest.approx(r.bytes_moved / r.median_s / 1e9)
            assert r.copy_share == pytest.approx(r.gb_per_s / r.copy_gb_per_s)
            assert r.bytes_moved >= r.least_bytes


def test_memory_rows_count_what_is_known_exactly(quick: Path) -> None:
    for n in (100, 200):
        ours, theirs = (load(quick).one("memory", rows=n, implementation=name) for name in ("fused", "eager listing"))
        assert ours is not None
        assert theirs is not None
        features = n * 512 * 4
        assert ours.input_bytes == features
        # the unit rows at least; of a row ours keeps two gaps and its norm, and on a CPU three softmaxes
        assert theirs.kept_bytes >= features
        assert n * 12 <= ours.kept_bytes < n * 24 + 200
        assert features <= ours.peak_bytes < theirs.peak_bytes  # the gradient is part of every peak


def test_report_of_a_run_has_its_tables_plots_and_what_is_missing(quick: Path, tmp_path: Path) -> None:
    assert report.main([str(quick), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for heading in ("## Targets", "## Time against the number of rows", "## Memory of a training step"):
        assert heading in text
    assert "## Peak" not in text
    pictures = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    assert set(pictures) == {"time.png", "memory.png"}  # nothing was run that the third would show
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in pictures.values())
    assert all(f"]({name})" in text for name in pictures)
    if load(quick).missing:
        assert "no CUDA device" in text


def test_exponent_is_that_of_the_times_from_the_least_length_on() -> None:
    rows = [row("fused", 1e-9 * n**1.5, n) for n in (10_000, 30_000, 100_000)]
    assert exponent(rows, 10_000) == pytest.approx(1.5)
    assert exponent([row("fused", 1.0, 10), *rows], 10_000) == pytest.approx(1.5)
    assert exponent(rows, 100_000) is None


def test_targets_tell_reached_from_short_from_not_measured() -> None:
    found = judged(
        results(
            row("fused", 8e-6, 20, group="selection", sets=256),
            row("eager listing", 8e-6 * 9, 20, group="selection", sets=256),
            row("compiled listing", 8e-6 * 4, 20, group="selection", sets=256),
        )
    )
    assert found["B = 256, N = 20, forward"].reached
    assert found["B = 256, N = 20, forward"].measured == "8 us"
    assert found["B = 256, N = 20, forward: against the eager listing"].reached is False
    assert found["B = 256, N = 20, forward: against the compiled listing"].reached
    unmeasured = found["B = 1, N = 8,000, forward + backward"]
    assert unmeasured.reached is None
    assert unmeasured.measured == ""


def test_bandwidth_target_counts_the_passes_of_the_promise_not_those_of_the_plan() -> None:
    # 2 reads of 1.024 GB at 1000 GB/s are 2.048 ms; with the backward pass 5 reads and a write are 6.144 ms
    found = judged(
        results(
            row("fused", 2.048e-3 / 0.9, 10**6, bytes_moved=1, group="selection"),
            row("fused", 6.144e-3 / 0.79, 10**6, work="forward + backward", group="selection"),
        )
    )
    share = "B = 1, N = 1,000,000, {}: share of the copy bandwidth at {}"
    assert found[share.format("forward", "K - 1 reads")].measured == "90%"
    assert found[share.format("forward", "K - 1 reads")].reached
    assert found[share.format("forward + backward", "2K - 1 reads and 1 write")].reached is False


def test_many_picks_of_one_large_set_have_a_target() -> None:
    kcenter = {"group": "k-center-greedy", "k": 2000, "dim": 1536}
    found = judged(results(row("fused", 41e-3, 200_000, **kcenter)))
    target = found["k-center-greedy, 2,000 picks of 200,000 x 1,536"]
    assert (target.measured, target.reached) == ("41 ms", False)


def test_exponent_target_wants_the_whole_range() -> None:
    name = "exponent of time against N, 10,000 to 1,000,000, forward"
    lengths = (10_000, 100_000, 1_000_000)
    assert judged(results(*(row("fused", 1e-9 * n, n) for n in lengths)))[name].reached
    assert judged(results(*(row("fused", 1e-9 * n**0.9, n) for n in lengths)))[name].reached is False
    assert judged(results(*(row("fused", 1e-9 * n, n) for n in lengths[:2])))[name].reached is None


def test_clouds_are_held_against_the_fastest_that_gives_the_same_picks() -> None:
    cloud = {"group": "points", "device_type": "cpu", "sets": 8, "k": 256, "dim": 3, "dtype": "float32"}
    times = {"fused": 2e-3, "torch_fps": 9e-3, "torch_cluster": 3e-3, "fpsample, buckets of kdtree": 1e-3}
    found = results(*(row(name, seconds, 1024, **cloud) for name, seconds in times.items()))
    target = judged(found)["8 clouds of 1,024, K = 256: against the fastest sampler"]
    assert (target.measured, target.reached) == ("1.5x", True)
    assert judged(found)["active learning: against skactiveml"].reached is None
    query = {**cloud, "group": "active learning"}
    found = results(row("fused", 2e-3, 4900, **query), row("skactiveml", 8e-3, 4900, **query))
    target = judged(found)["active learning: against skactiveml"]
    assert (target.measured, target.reached) == ("4.0x", False)


def test_a_cpu_is_held_to_its_own_targets() -> None:
    found = judged(results(row("fused", 1.0, 8000, device_type="cpu")))
    assert all("bandwidth" not in name for name in found)
    assert any("B = 64, N = 20" in name for name in found)
    apart = {"group": "apart", "device_type": "cpu", "sets": 64, "rows": 20, "work": "forward + backward"}
    found = results(*(row(name, t, 20, **apart) for name, t in (("fused", 1e-3), ("compiled listing", 2.4e-3))))
    target = judged(found)["B = 64, N = 20, forward + backward, processes of their own: against the compiled listing"]
    assert (target.measured, target.reached) == ("2.4x", False)
    assert "over 9 processes of each" in report.report(found)


def test_searches_in_a_bank_are_held_against_all_scores_at_once() -> None:
    shape = {"group": "neighbors", "device_type": "cpu", "bank": 50_000, "k": 50}
    found = results(
        row("fused", 1.0, 4000, peak_bytes=10, **shape),
        row("fused, float32 alone", 2.0, 4000, **shape),
        row("matmul + topk", 3.6, 4000, peak_bytes=240, **shape),
        row("fused", 1.0, 1024, scaled_by=4.0, **shape | {"bank": 206_000, "rows": 4096}),
    )
    lines = judged(found)
    ratio = lines["fused, N = 4,000, k = 50, forward: against matmul + topk"]
    assert (ratio.measured, ratio.reached) == ("3.60x", True)
    assert lines["fused, float32 alone, N = 4,000, k = 50, forward: against matmul + topk"].measured == "1.80x"
    memory = lines["memory, N = 4,000, k = 50: times less than matmul + topk"]
    assert (memory.measured, memory.reached) == ("24x", False)
    assert lines["fused, N = 1, k = 50, forward: against matmul + topk"].reached is None
    table = report.report(found)
    assert "| 4,000 | 50,000 | 50 | forward | matmul + topk | 3.6 s [3.24, 4.32] | 3.60x |" in table
    assert "| 4,096 by 256 of them | 206,000 |" in table


def test_predictions_stand_beside_what_was_measured_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nowhere else: a call that was not measured has no line, and a CPU has none at all."""
    text = """# Predictions
## Selection
| call | K | work | predicted | share |
|---|---|---|---|---|
| 8,000 rows | 3 | inference | 20 us | 9% |
| 8,000 rows | 3 | sampling | 25 us | 9% |
| 8,000 rows | 3 | backward | 0.1 ms | 9% |
| 100,000 rows | 3 | inference | 85.5 us | 9% |
## The head's attention
| call | work | predicted |
|---|---|---|
| 8,000 rows | inference | 40 us |
"""
    (tmp_path / "table.md").write_text(text)
    known = predictions.load(tmp_path / "table.md")
    assert known[predictions.Key("Selection", "8,000 rows", 3, "backward")] == pytest.approx(1e-4)
    assert len(known) == 5
    monkeypatch.setattr(predictions, "load", lambda: known)
    measured = [
        row("fused", 30e-6, 8000, group="selection"),
        row("fused", 250e-6, 8000, group="selection", work="forward + backward"),
        row("eager listing", 1e-3, 8000, group="selection"),
        row("fused", 60e-6, 8000, group="attention"),
        row("fused", 1.0, 8000, group="attention", work="forward + backward"),  # of which a part is not predicted
        row("fused", 1.0, 8000, group="selection", dtype="float32"),
        row("fused", 1.0, 5000, group="selection"),
    ]
    section = report.report(results(*measured)).partition("## Measured, and predicted")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[-4:] for line in lines] == [
        ["forward", "30 us [27, 36]", "20 us", "1.50x |"],
        ["forward + backward", "250 us [225, 300]", "125 us", "2.00x |"],
        ["forward", "60 us [54, 72]", "40 us", "1.50x |"],
    ]
    assert "85.5" not in section
    on_cpu = [row("fused", 30e-6, 8000, group="selection", device_type="cpu")]
    assert "predicted" not in report.report(results(*on_cpu))


def test_every_call_of_the_model_has_its_committed_prediction() -> None:
    known = predictions.load()
    for call in CALLS:
        assert known[predictions.Key("Selection", call.name, call.k, EVAL)] > 0
        if call.k == 3:
            assert known[predictions.Key("Selection", call.name, 3, BACKWARD)] > 0
        if call.k == 3 and call.all_rows < 1_000_000:
            for work in (EVAL, TRAINING, BACKWARD):
                assert known[predictions.Key("The head's attention", call.name, 3, work)] > 0


def test_selection_table_divides_by_the_fused_time_and_marks_the_scaled_loop() -> None:
    packed = {"rows": "packed", "sets": 4, "group": "selection"}
    text = report.report(
        results(
            row("fused", 2e-6, 8000, group="selection"),
            row("eager listing", 9e-6, 8000, group="selection"),
            row("fused", 1e-6, 50, **packed),
            row("eager listing, set by set", 3e-6, 50, scaled_by=2.0, **packed),
            missing={"benchmarks/test_peers.py::test_peers[a]": "torch_fps is not installed"},
        )
    )
    assert "| 2 us [1.8, 2.4] | 9 us [8.1, 10.8] |  | 4.50x |  |" in text
    assert "| 3 us [2.7, 3.6]\\* |  | 3.00x |" in text
    assert "looped over 2 of the sets" in text
    assert "- torch_fps is not installed: test_peers[a]" in text


def test_times_have_the_digits_that_were_measured() -> None:
    """A median is rounded, and its quartiles are rounded by themselves; 999.6 us is 1 ms."""
    measured = replace(row("fused", 1.0049e-3, 50, group="attention"), q1_s=0.9949e-3, q3_s=1.2451e-3)
    assert "| 1 ms [0.995, 1.25] |" in report.report(results(measured))
    assert [targets.time_of(s) for s in (0.9996e-3, 0.9994e-3, 0.9996, 2e-8)] == ["1 ms", "999 us", "1 s", "20 ns"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "did not finish"), ('{"benchmarks": [], "datetime": ""}', "got none"), ("{", "Expecting")],
)
def test_results_that_are_none_are_refused(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_results_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps(
            {"benchmarks": [{"extra_info": row("fused", 1.0, 7).as_json()}, {"extra_info": {}}], "datetime": "d"}
        )
    )
    found = load(path)
    assert found.rows == [row("fused", 1.0, 7)]
    assert found.one("scaling", rows=7) == found.rows[0]
    assert found.one("scaling", rows=8) is None


def test_the_picture_of_how_it_works_is_drawn(tmp_path: Path) -> None:
    """From a call: quality first, and then picks that are far apart."""
    rows, quality = picture.photos()
    picks = coreset_select(rows, picture.K, quality, 0.5, normalized=True).indices
    assert picks[0] == quality.argmax()
    assert (rows[picks] @ rows[picks].T).triu(1).max() < 0.5
    picture.draw(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
