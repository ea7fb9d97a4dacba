"""The check for races between threads of a program, on kernels that have one and that have none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checks.races import Race, races

pytest.importorskip("triton")

KERNEL = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.checks.races import races

@triton.jit
def accumulate(chain_ptr, tile_ptr, out_ptr, steps, BARRIER: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    n, c = tl.arange(0, N), tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for step in range(steps):
        rows = step * N + n
        tile = tl.load(tile_ptr + rows[:, None] * C + c[None, :])
        chain = tl.load(chain_ptr + rows)
        chain += tl.gather(tl.sum(tile, axis=1), n, 0)
        if BARRIER:
            tl.debug_barrier()
        tl.store(chain_ptr + rows, chain)
        total += tl.sum(tile * chain[:, None], axis=0)
    tl.store(out_ptr + c, total)

found = []
for barrier in (False, True):
    signature = {"chain_ptr": "*fp32", "tile_ptr": "*fp32", "out_ptr": "*fp32", "steps": "i32"}
    constants = {"BARRIER": barrier, "N": 8, "C": 512}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=accumulate, signature=signature, constexprs={(4,): barrier, (5,): 8, (6,): 512})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    found.append([race.memory for race in races(compiled.asm["ttgir"])])
print(json.dumps(found))
"""


def test_a_load_made_twice_before_a_store_is_found_in_what_triton_compiles(tmp_path: Path) -> None:
    """The form that the backward kernel of the selection once had, and the same with a barrier."""
    script = tmp_path / "kernel.py"  # Triton reads a kernel's source from its file
    script.write_text(KERNEL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["%chain_ptr"], []]


def block(*lines: str) -> str:
    return "\n".join(("tt.func public @kernel(%a: !tt.ptr<f32>, %b: !tt.ptr<f32>) {", *lines, "}"))


AT = "%p = tt.splat %a : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>, #slow>"
LOAD = "%{0} = tt.load %{1} : tensor<8x!tt.ptr<f32>, #{2}> loc(#loc1)"
STORE = "tt.store %{0}, %x : tensor<8x!tt.ptr<f32>, #{1}> loc(#loc2)"


def test_one_layout_does_not_race_and_two_do() -> None:
    one = block(AT, LOAD.format("x", "p", "slow"), STORE.format("p", "slow"))
    assert races(one) == []
    two = block(AT, LOAD.format("x", "p", "slow"), LOAD.format("y", "p", "fast"), STORE.format("p", "slow"))
    assert races(two) == [Race("%a", "#slow", ("#fast", "#slow"))]


def test_a_barrier_or_another_argument_or_another_block_is_no_race() -> None:
    other = "%q = tt.splat %b : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>, #slow>"
    assert (
        races(block(AT, LOAD.format("y", "p", "fast"), "ttg.barrier all loc(#loc3)", STORE.format("p", "slow"))) == []
    )
    assert races(block(AT, other, LOAD.format("y", "q", "fast"), STORE.format("p", "slow"))) == []
    loop = ("%r = scf.for %i = %c0 to %n step %c1 -> (f32) {", LOAD.format("y", "p", "fast"), "}")
    assert races(block(AT, *loop, STORE.format("p", "slow"))) == []
