"""The model that predicts kernels' times: what it counts is right, and what is known comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from side_by_side import side_by_side

from benchmarks.model.lazy_turns import count_turns, gaussian
from benchmarks.model.machine_code import Code, Instruction, parse
from benchmarks.model.machines import A100, B200, CAP, H100
from benchmarks.model.multiprocessor import (
    Operation,
    UnknownInstructionError,
    occupancy,
    operations,
    simulate,
)
from benchmarks.model.walk import UnknownWayError, Way, walk
from fcn_kernels import coreset_select
from fcn_kernels.device.splits import COOPERATIVE
from fcn_kernels.selection.kernels import launch, lazy
from fcn_kernels.selection.kernels.plans import Plan

pytestmark = pytest.mark.xdist_group("builds")
ROOT = Path(__file__).parents[1]

TEXT = """
.text.copy:
	//## File "/a/copy.py", line 7
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0000000402047981 */
                                                                            /* 0x000ea2000c1e1d00 */
.L_x_0:
	//## File "/a/copy.py", line 8
        /*0010*/               @!P0 BRA `(.L_x_0) ;                          /* 0xfffffffc00b8a947 */
                                                                            /* 0x004fea000383ffff */
"""


def _run(script: str) -> list:
    """What a process prints in which the compiler, and not the interpreter, takes the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_instructions_are_read_with_their_control_codes() -> None:
    code = parse(TEXT)
    load, branch = code.instructions
    assert (load.name, load.bytes_of_thread, load.file, load.line, load.stall) == ("LDG", 16, "/a/copy.py", 7, 1)
    assert load.sets == (2, 7)  # its result's scoreboard; none for its operands
    assert (branch.predicate, branch.awaits, branch.stall) == ("@!P0", (2,), 5)
    assert code.targets == {1: 1}


def test_a_wait_names_copies_under_way_and_scoreboards() -> None:
    waits = [Instruction("", "DEPBAR.LE", arguments, "", 0, 0) for arguments in ("SB0, 0x1", "SB5, 0x0, {2}", "SB0")]
    assert [(i.groups, i.awaits) for i in waits] == [(1, ()), (0, (2,)), (0, ())]


def test_a_branch_of_all_threads_has_its_condition_among_its_arguments() -> None:
    uniform = TEXT.replace("@!P0 BRA `(.L_x_0)", "BRA.U !UP2, `(.L_x_0)")
    assert parse(uniform).instructions[1].predicate == "@!UP2"
    parted = TEXT.replace("@!P0 BRA `(.L_x_0)", "BRA.DIV UR4, `(.L_x_0)")
    assert parse(parted).instructions[1].predicate == ""


def _machine_code(tmp_path: Path, *rows: tuple[str, str, int], targets: dict[int, int]) -> Code:
    source = tmp_path / "kernel.py"
    source.write_text("for i in range(n):  # @tiles\n    x = i\nif x > 3:\n    y = 1\nelse:\n    y = 2\n")
    return Code([Instruction(p, name, "", str(source), line, 0) for p, name, line in rows], targets)


def test_loops_turn_as_often_as_is_said(tmp_path: Path) -> None:
    code = _machine_code(
        tmp_path, ("@P0", "BRA", 1), ("", "FADD", 2), ("@P1", "BRA", 1), ("", "EXIT", 2), targets={0: 3, 2: 1}
    )
    for turns in (1, 5):
        names = [code.instructions[e.number].name for e in walk(code, Way({"tiles": turns}, {}))]
        assert names == ["BRA"] + ["FADD", "BRA"] * turns + ["EXIT"]
    assert [e.number for e in walk(code, Way({"tiles": 0}, {}))] == [0, 3]
    for number, to in ((4, 4), (5, 5)):  # what fills the end of the code is no loop
        code.instructions.append(code.instructions[2])
        code.targets[number] = to
    assert len(walk(code, Way({"tiles": 5}, {}))) == 12


def test_a_call_to_a_place_in_the_kernel_leaves_a_loop_and_others_are_refused(tmp_path: Path) -> None:
    """sm_80's code leaves loops so, before a jump back that depends on nothing."""
    rows = [("", "FADD", 2), ("@P0", "CALL", 1), ("", "BRA", 1), ("", "EXIT", 2)]
    code = _machine_code(tmp_path, *rows, targets={1: 3, 2: 0})
    assert [e.number for e in walk(code, Way({"tiles": 2}, {}))] == [0, 1, 2, 0, 1, 3]
    with pytest.raises(UnknownWayError, match="call"):
        walk(code._replace(targets={2: 0}), Way({"tiles": 2}, {}))


def test_what_only_numbers_that_are_not_normal_take_is_gone_around(tmp_path: Path) -> None:
    rows = [("@P0", "BRA", 2), ("", "CALL", 2), ("", "EXIT", 2)]
    code = _machine_code(tmp_path, *rows, targets={0: 2})
    for name, way in (("__cuda_sm20_sqrt_rn_f32_slowpath", [0, 2]), ("__cuda_sm20_other", None)):
        code.instructions[1] = code.instructions[1]._replace(arguments=f"`($__internal_0_${name})")
        if way:
            assert [e.number for e in walk(code, Way({}, {}))] == way
        else:
            with pytest.raises(UnknownWayError):
                walk(code, Way({}, {}))


def test_instructions_that_no_pipe_takes_are_refused(tmp_path: Path) -> None:
    code = _machine_code(tmp_path, ("", "FFMA", 2), ("", "UTCHMMA", 2), ("", "EXIT", 2), targets={})
    trace = walk(code, Way({}, {}))
    with pytest.raises(UnknownInstructionError, match="UTCHMMA"):
        operations(code, trace, lambda i, step: ("l2", 4.0), B200)
    code.instructions[1] = code.instructions[0]
    fast, slow = ([o.width for o in operations(code, trace, lambda i, step: ("l2", 4.0), m)] for m in (H100, A100))
    assert (fast, slow) == ([1, 1, 1], [2, 2, 1])  # 128 multiply-adds a cycle, and 64


def test_conditions_go_the_way_that_is_said(tmp_path: Path) -> None:
    code = _machine_code(
        tmp_path, ("@P0", "BRA", 3), ("", "FADD", 4), ("", "EXIT", 4), ("", "FMUL", 6), ("", "EXIT", 6), targets={0: 3}
    )
    assert [e.number for e in walk(code, Way({}, {"x > 3": True}))] == [0, 1, 2]
    assert [e.number for e in walk(code, Way({}, {"x > 3": False}))] == [0, 3, 4]
    with pytest.raises(UnknownWayError, match="x > 3"):
        walk(code, Way({}, {}))


def test_what_the_first_thread_does_alone_ends_where_all_go_on(tmp_path: Path) -> None:
    """At a barrier, and where a jump leaves it, though it come to a place between by number."""
    source = tmp_path / "kernel.py"
    source.write_text("tl.store(x, 1)\ny = 1\n")

    def alone(*names: str, targets: dict[int, int]) -> list[tuple[int, bool]]:
        rows = (
            Instruction("" if n else "@P0", name, "", str(source), 2 if n else 1, 0) for n, name in enumerate(names)
        )
        return [(e.number, e.by_first_warp) for e in walk(Code([*rows], targets), Way({}, {}))]

    assert alone("BRA", "STG", "BAR", "FADD", "EXIT", targets={0: 4}) == list(
        enumerate((False, True, False, False, False))
    )
    found = alone("BRA", "BRA", "FMUL", "EXIT", "EXIT", "BRA", targets={0: 4, 1: 5, 5: 2})
    assert found == [(0, False), (1, True), (5, False), (2, False), (3, False)]


def test_warps_that_never_end_are_no_prediction() -> None:
    add = Operation("FADD", "fma", 1, 4, (), (7, 7), None, 0, False)
    barrier = add._replace(name="BAR", pipe="others")
    simulate([add, barrier, add], 2, 1, 1, H100)
    with pytest.raises(RuntimeError, match="barrier"):
        simulate([add, barrier._replace(alone=True), add], 2, 1, 1, H100)


def test_what_a_multiprocessor_holds_and_how_it_issues() -> None:
    assert occupancy(168, 1024, 4, H100) == 3
    assert occupancy(255, 1024, 4, H100) == 2
    assert occupancy(32, 100 << 10, 4, H100) == 2
    add = Operation("FADD", "fma", 1, 4, (), (7, 7), None, 0, False)
    assert simulate([add] * 100, 1, 1, 1, H100) == pytest.approx(400, abs=8)  # by the stall count
    assert simulate([add] * 100, 16, 1, 1, H100) == pytest.approx(400, abs=8)  # four warps to a scheduler hide it
    assert simulate([add] * 100, 32, 1, 1, H100) == pytest.approx(800, abs=16)  # one a cycle
    load = add._replace(name="LDG", pipe="memory", holds=(0, 7), access=("dram", 512.0))
    wait = add._replace(awaits=(0,))
    assert simulate([load, wait], 1, 1, 1, H100) > H100.dram


def test_a_grid_barrier_takes_a_fence_a_look_and_the_others_arrival() -> None:
    (found,) = _run(
        "import json; from benchmarks.checks.barriers import assumed\n"
        "from benchmarks.model.machines import H100\n"
        "print(json.dumps([assumed(H100)]))"
    )
    assert H100.arrival + (H100.fence + H100.l2) / H100.ghz / 1e3 < found < 2


def test_known_kernels_come_out_at_the_memorys_cap() -> None:
    found = _run(
        "import json; from benchmarks.model import known; from benchmarks.model.machines import MACHINES\n"
        "print(json.dumps([known.share_of_bandwidth(k, m) for k in ('copy', 'rms_norm') for m in MACHINES.values()]))"
    )
    assert len(found) == 6
    assert all(share >= CAP for share in found), found


def test_rows_are_read_once_a_pass() -> None:
    """Counted in the traces, K - 1 forward, or once where a set is one tile, and K backward, as benchmarks.checks.reads
    counts in the interpreter; on every GPU."""
    script = """
import json
from benchmarks.model.machines import A100, B200, H100
from benchmarks.model.calls import BACKWARD, CALLS, EVAL
from benchmarks.model.predict import kernels_of, rows_read
found = []
for machine, work, call, rows in (
    (H100, EVAL, CALLS[0], 32), (H100, BACKWARD, CALLS[0], 32), (H100, EVAL, CALLS[2], 512),
    (H100, BACKWARD, CALLS[2], 512), (A100, BACKWARD, CALLS[0], 32), (B200, BACKWARD, CALLS[0], 32),
):
    found.append(rows_read(call, kernels_of(call, work, machine)[-1], rows))
print(json.dumps(found))
"""
    assert _run(script) == [1, 3, 2, 3, 3, 3]


def test_attentions_programs_load_their_rows_twice_and_fit() -> None:
    """For the scores, from memory, and for what these are for, from L2."""
    script = """
import json
from benchmarks.model.attention import ATTENTION_CALLS, _access, kernels_of, predict, rows_read
from benchmarks.model.calls import BACKWARD, EVAL
from benchmarks.model.machines import B200, H100
from benchmarks.model.source import function
call = ATTENTION_CALLS[0]
reads = [rows_read(call, kernels_of(call, work, H100)[0][0]) for work in (EVAL, BACKWARD)]
p, _, launches, _ = predict(call, EVAL, H100)
kernel = kernels_of(call, EVAL, B200)[0][0]
access, every = _access(call, kernel, B200), kernel.code.instructions
levels = [access(i, 0)[0] for i in every if i.name[:3] == "LDG" and function(i.file, i.line) == "load_rows"]
print(json.dumps([*reads, p.programs, launches, p.microseconds > p.least > 0, levels]))
"""
    *reads, programs, launches, longer, levels = _run(script)
    assert levels == sorted(levels)  # "dram", then "l2"
    assert len(set(levels)) == 2
    assert reads == pytest.approx([2, 2])
    assert programs >= 1
    assert (launches, longer) == (1, True)


def test_a_loops_way_around_is_no_part_of_a_store(tmp_path: Path) -> None:
    """A compiler may give the branch around a loop the line of what comes behind it."""
    source = tmp_path / "kernel.py"
    source.write_text("for i in range(n):  # @tiles\n    x = i\ntl.store(p, x)\n")
    rows = [("@P0", "BRA", 3), ("", "FADD", 2), ("@P1", "BRA", 1), ("", "EXIT", 3), ("", "BRA", 3)]
    code = Code([Instruction(p, name, "", str(source), line, 0) for p, name, line in rows], {0: 3, 2: 1, 4: 4})
    assert [e[:2] for e in walk(code, Way({"tiles": 2}, {}))] == [
        (0, False), (1, False), (2, False), (1, False), (2, False), (3, False),
    ]  # fmt: skip
    assert [e.number for e in walk(code, Way({"tiles": 0}, {}))] == [0, 3]


def test_turns_are_counted_as_the_kernel_makes_them() -> None:
    """Picks, lists of rows, their tiles and the picks that these meet, beside the kernel's in the interpreter."""
    rows, dim, k, parts, eager, late = 24, 9, 8, 2, 2, 2
    x, lists, meetings = gaussian(rows, dim), [], []
    plan = Plan(late, 16, 1, 1, block_r=64, parts=parts, split=COOPERATIVE.value)
    collect_rows, meet_picks = lazy.collect_rows, lazy.meet_picks

    def collect(*arguments: object) -> object:
        lists.append(arguments)
        return collect_rows(*arguments)

    def meet(*arguments: Any) -> object:
        begin, until = (int(number.handle.data.item()) for number in arguments[6:8])
        meetings.append(until - begin)
        return meet_picks(*arguments)

    with pytest.MonkeyPatch.context() as patch, side_by_side(), torch.no_grad():
        patch.setattr(launch, "forward_plans", lambda *sizes: (plan,))
        for name, value in (("LAZY_PICKS", 3), ("LAZY_BYTES", 1), ("EAGER_PICKS", eager), ("LATE_ROWS", late)):
            patch.setattr(launch, name, value)
        patch.setattr(lazy, "collect_rows", collect)
        patch.setattr(lazy, "meet_picks", meet)
        picked = coreset_select(torch.from_numpy(x)[None], k, torch.ones(1, rows), 1.0, backend="triton")
    turns = count_turns(x, k, parts, late, eager, late)
    assert turns.picks == picked.indices[0].tolist()
    assert len(lists) == turns.collects.sum()
    assert (len(meetings), sum(meetings)) == (turns.tiles.sum(), turns.meetings.sum())
    assert turns.again.any()
    assert turns.meetings.sum() > turns.tiles.sum()  # some tiles meet several picks


def test_the_kernel_that_leaves_out_rows_is_walked_through_all_that_it_does() -> None:
    """A tile loads its rows once, and each pick once for all of them, but the last twice, as loads run ahead.

    A turn more is a barrier of all parts more."""
    script = """
import json
from benchmarks.model.calls import Call
from benchmarks.model.lazy import kernel_of, launches_of, trace_of
from benchmarks.model.machines import H100
from benchmarks.model.source import function
call = Call("many picks", 1, 40_000, 1024, 64)
plan, (_, spec) = launches_of(call, H100)
kernel, late = kernel_of(spec, plan, H100), spec.constants["BUILD"].LATE.value

def bytes_of(where, *counts):
    every = (kernel.code.instructions[e.number] for e in trace_of(call, kernel, *counts))
    loads = (i for i in every if i.name == "LDG" and function(i.file, i.line) == where)
    return 32 * kernel.warps * sum(i.bytes_of_thread for i in loads)

def adds(turns):
    return sum(kernel.code.instructions[e.number].name == "REDG" for e in trace_of(call, kernel, turns, 1, 0, 0))

print(json.dumps([
    bytes_of("load_chunk", 3, 1, 2, 3) / (late * 2 * call.dim),
    bytes_of("load_cols", 3, 1, 2, 3) / (4 * call.dim),
    adds(5) - adds(3),
]))
"""
    assert _run(script) == [4, 16, 2]  # two turns with two tiles each, which meet three picks
