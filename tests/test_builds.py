"""What the compiler makes of the launches for GPUs that need not be here: no spills, and 16-byte loads of the rows.

`python -m benchmarks.checks.builds` prints the whole table; here a part of it stands for each tier, dtype and width.
Each launch is built for one target in turn, each label and each kernel for all of them: every pair, not every product.
"""

import ast
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from benchmarks.checks.builds import ATTENTION_KERNELS, CHUNK_KERNELS, NEIGHBORS_KERNELS, SUMS_KERNELS

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("builds")
ROOT = Path(__file__).parents[1]
NVIDIA = ["sm_80", "sm_90", "sm_100"]
# a program a set; split at barriers; programs of one and of four warps by length; split by launches
LAUNCHES = [
    "bfloat16 tiny sets (256, 20, 512) K=3",
    "bfloat16 one set (1, 4000, 512) K=3",
    "float32 ragged (1000, packed, 512) K=3",
    "bfloat16 one set, launches (1, 8000, 512) K=3",
    "bfloat16 squared set (1, 100000, 8) K=64",
    "float32 cosine going on (1, 100000, 512) K=3",
    "bfloat16 attention (4, 1000, 512) H=24 dropout 0.1",
    "bfloat16 attention (4, 20, 512) H=24 dropout 0.1",
    "float32 attention (4, 1000, 512) H=64 dropout 0.1",
    "bfloat16 sums (4, 1000, 512) M=4 keys",
    "float32 sums (4, 1000, 512) M=64",
    "float32 chunks (8, 500, 512) M=4 norms given, dropped",
]
# rows that do not lie a multiple of 16 elements apart, each element an address of its own
ODD = "bfloat16 odd rows (1, 100000, 100) K=3"
# by the k best; the moments of all; what holds all that a filter stored
NEIGHBORS = [
    "bfloat16 neighbors (70, 1000, 512) K=50 ids",
    "bfloat16 neighbors (70, 1000, 512) K=0 ids",
    "bfloat16 neighbors (70, 4000, 512) K=300 ids",
]


def _kernels(label: str) -> tuple[str, ...]:
    if "chunks" in label:
        return *CHUNK_KERNELS, *SUMS_KERNELS
    if "sums" in label:
        return SUMS_KERNELS
    if "attention" in label:  # small sets are in one part
        return ATTENTION_KERNELS if "1000" in label else (ATTENTION_KERNELS[0], ATTENTION_KERNELS[-1])
    return "select_forward", "select_backward"


def _run(*arguments: str) -> str:
    """What Python prints, in a process where the interpreter does not stand in for the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _builds(*arguments: str) -> list[dict]:
    return json.loads(_run("-m", "benchmarks.checks.builds", "--json", *arguments))


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    return _builds("--pairwise", "--targets", *NVIDIA, "--only", *LAUNCHES, ODD, *NEIGHBORS)


def _pairs(builds: list[dict], *names: str) -> set[tuple[str, ...]]:
    return {tuple(b[name] for name in names) for b in builds}


def test_every_launch_was_built(builds):
    labels = [*LAUNCHES, ODD]
    kernels = {(label, kernel) for label in labels for kernel in _kernels(label)}
    assert {(label, k) for label, k in _pairs(builds, "label", "kernel") if label not in NEIGHBORS} == kernels
    assert _pairs(builds, "label", "target") == set(product((*labels, *NEIGHBORS), NVIDIA))
    names = {kernel for _, kernel in kernels} | set(NEIGHBORS_KERNELS)
    assert _pairs(builds, "kernel", "target") == set(product(names, NVIDIA))


def test_nothing_spills(builds):
    assert {(b["label"], b["kernel"], b["target"]): b["spills"] for b in builds if b["spills"]} == {}


def test_rows_are_loaded_16_bytes_at_a_time(builds):
    """And of neighbors, what a filter stored of them."""
    narrow = [b for b in builds if b["label"] != ODD and not any(int(width) >= 128 for width in b["row_loads"])]
    assert narrow == []


def test_no_thread_overwrites_what_another_has_to_load(builds):
    assert {(b["label"], b["kernel"], b["target"]): b["races"] for b in builds if b["races"]} == {}


def test_programs_fit_an_sm(builds):
    """The registers that the plan of a cooperative launch counts on: its programs must all run at once."""
    for b in builds:
        if "launches" in b["label"] or b["label"] in NEIGHBORS:
            continue  # of these no program waits for another
        programs = 2 if b["warps"] <= 4 else 1
        if "one set" in b["label"] and b["kernel"] == "select_forward":
            programs = 3
        assert b["registers"] * b["warps"] * 32 * programs <= 65536, b


def test_kernels_of_neighbors_build_for_float32():
    """On the target whose products of float32 are the most unlike the others'."""
    built = _builds("--targets", "sm_100", "--only", NEIGHBORS[0].replace("bfloat16", "float32"))
    assert {b["kernel"] for b in built} == set(NEIGHBORS_KERNELS) - {"sum_moments"}
    assert [b for b in built if b["spills"] or b["races"]] == []
    assert [b for b in built if not any(int(width) >= 128 for width in b["row_loads"])] == []


def test_the_kernel_that_leaves_out_rows_sums_them_in_the_same_order():
    """Its picks are those of the other to the bit, if each thread has the same elements of what is summed."""
    built = _builds("--targets", *NVIDIA, "--only", "bfloat16 many picks (1, 400000, 1536) K=64")
    assert [b for b in built if b["spills"] or b["races"] or not any(int(w) >= 128 for w in b["row_loads"])] == []
    for target in NVIDIA:
        orders = {b["kernel"]: {name: order for name, *order in b["sums"]} for b in built if b["target"] == target}
        all_rows, some_rows = orders["select_forward"], orders["select_lazily"]
        assert some_rows["meet_picks"] == all_rows["multiply_rows"]
        for name in ("scaled_norms", "multiply_extreme_rows"):
            assert some_rows[name] == all_rows[name]


ORDERS = """
import torch
from benchmarks.checks import builds
from benchmarks.checks.orders import along_rows, sums
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.problem import Problem

OF_ROWS = ("norm_of", "scaled_norms", "multiply_rows", "multiply_extreme_rows")
OF_PARTS = ("reduce_best", "first_pick", "admit_rows", "look_first", "load_partials", "forward_set")

def orders(features, cu_seqlens=None):
    total = features.shape[:-1].numel()
    p = Problem(features, torch.empty(total), torch.tensor(0.5), cu_seqlens=cu_seqlens, k=3)
    with builds.as_if_on(132):
        specs = builds.record("", launch, ("select_forward",), lambda: launch.forward(p, False), "sm_90")
    for spec in specs:
        found = sums(builds.compiled(spec, "sm_90").asm["ttgir"])
        assert {s.function for s in found} <= {*OF_ROWS, *OF_PARTS}, found
        yield along_rows(s for s in found if s.function in OF_ROWS)

rows = torch.empty(256, 2, 512, dtype=torch.bfloat16)
(held,) = orders(rows)
long, short = orders(rows.flatten(0, 1), torch.empty(257, dtype=torch.int32))
assert set(long) == set(short) == set(OF_ROWS) == {*held, "norm_of"}
assert len({order for made in (held, long, short) for orders in made.values() for order in orders}) == 1
"""


def test_a_row_is_summed_in_one_order_by_programs_of_any_size():
    """Padded sets of 2 rows, held in registers, and packed ones with programs of four warps and of one: else the last
    bits of norms and products, and what is picked, would depend on the launch."""
    _run("-c", ORDERS)


TENSOR_CORES = """
from benchmarks.checks.builds import build, chunks_specs

first, wide = {}, {}
for spec in chunks_specs("sm_90"):
    (wide if "one head" in spec.label else first).setdefault((spec.label.split()[0], spec.kernel), spec)
small = ("blocks_of_small_chunks", "blocks_of_small_chunks_backward")
for kernel in (*small, "linear", "attend", "attend_queries", "attend_keys", "linear_weights"):
    made = build(first["bfloat16", kernel], "sm_90")
    assert made.tensor_cores > 0, kernel
    assert made.spills == 0, kernel
    assert made.races == [], kernel
assert build(first["float32", "attend"], "sm_90").tensor_cores == 0
for kernel in ("attend", "attend_queries", "attend_keys"):  # heads of 128 channels
    assert build(wide["float32", kernel], "sm_90").spills == 0, kernel
"""


def test_clusterings_blocks_of_bfloat16_rows_run_on_tensor_cores_and_wide_heads_do_not_spill():
    _run("-c", TENSOR_CORES)


def test_amd_builds():
    built = _builds("--targets", "gfx942", "--only", LAUNCHES[0], LAUNCHES[6], LAUNCHES[9])
    assert {b["kernel"] for b in built} == {k for i in (0, 6, 9) for k in _kernels(LAUNCHES[i])}
    assert all(b["registers"] > 0 for b in built)


CAPTURED = """
from benchmarks.checks import builds
from fcn_kernels.attention.kernels import launch as attention_launch
from fcn_kernels.selection.kernels import launch

def specs():
    return [*builds.selection_specs("sm_90"), *builds.attention_specs("sm_90")]

called = specs()
launch.seed_argument = attention_launch.seed_argument = lambda seed, _: (seed, 0 if seed is None else -1)
captured = specs()
assert any(spec.signature["seed_ptr"] == "*i64" for spec in called)
assert captured == called
"""


def test_a_captured_call_needs_no_kernel_of_its_own():
    """While a CUDA graph is captured the seed is on the device, and nothing can be compiled."""
    _run("-c", CAPTURED)


ONE_KERNEL = """
import torch
from benchmarks.checks import builds
from fcn_kernels.device.splits import LAUNCHES, WHOLE
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.kernels.plans import Plan
from fcn_kernels.selection.problem import Problem

def built(rows, k, split=WHOLE.value):
    plan = Plan(32, 64, 1, 4, 3, split)
    problem = Problem(torch.empty(2, rows, 64), torch.empty(2 * rows), torch.tensor(0.5), k=k)
    specs = builds.record("", launch, ("select_forward",), lambda: launch.forward(problem, True, (plan,)), "sm_90")
    return {str(spec) for spec in specs}

assert built(33, 3) == built(48, 3) == built(48, 16)
assert len(built(33, 3, LAUNCHES.value)) == 1
assert built(33, 3) != built(33, 3, LAUNCHES.value)
"""


def test_sizes_that_change_from_call_to_call_do_not_compile_anew():
    """Rows, picks, and which launch of several it is."""
    _run("-c", ONE_KERNEL)


def device_functions(text: str) -> list[ast.FunctionDef]:
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)]


def optional_fields(functions: list[ast.FunctionDef]) -> set[str]:
    """Fields of bundles that device functions ask whether they are None."""
    compared = (node for f in functions for node in ast.walk(f) if isinstance(node, ast.Compare))
    asked = (node.left for node in compared if ast.unparse(node.comparators[0]) == "None")
    return {left.attr for left in asked if isinstance(left, ast.Attribute)}


def returned_with_none(functions: list[ast.FunctionDef], optional: set[str]) -> list[str]:
    """Bundles that are returned with a field that may be None."""

    def may_be_none(value: ast.expr) -> bool:
        is_optional = isinstance(value, ast.Attribute) and value.attr in optional
        return (
            is_optional or ast.unparse(value) == "None" or (isinstance(value, ast.Name) and value.id.endswith("_ptr"))
        )

    returned = [
        (f, node.value) for f in functions for node in ast.walk(f) if isinstance(node, ast.Return) and node.value
    ]
    calls = [(f, call) for f, value in returned for call in ast.walk(value) if isinstance(call, ast.Call)]
    bundles = [(f, call) for f, call in calls if isinstance(call.func, ast.Name) and call.func.id[0].isupper()]
    return [f"{f.name}: {ast.unparse(call)}" for f, call in bundles if any(map(may_be_none, call.args))]


def test_no_device_function_returns_a_bundle_with_none() -> None:
    """Triton 3.7 takes a None out of a function, and 3.6, which other machines have, refuses it."""
    paths = [path for path in (ROOT / "fcn_kernels").rglob("*.py") if {"kernels", "device"} & set(path.parts)]
    functions = [function for path in paths for function in device_functions(path.read_text())]
    optional = optional_fields(functions)
    assert {"quality", "noise", "mask"} <= optional
    assert returned_with_none(functions, optional) == []
    bad = device_functions(
        "@triton.jit\ndef a(low, barrier_ptr):\n    return Part(low, barrier_ptr), low\n"
        "@triton.jit\ndef b(given):\n    return Rows(given.C, given.quality)\n"
    )
    assert returned_with_none(bad, optional) == ["a: Part(low, barrier_ptr)", "b: Rows(given.C, given.quality)"]
