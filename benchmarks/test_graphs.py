"""A call captured in a CUDA graph and replayed: its time, with fresh noise at each replay."""

from typing import Any

import pytest
import torch

from benchmarks.conftest import Bench
from benchmarks.harness import Contender
from benchmarks.workloads import BOTH, FORWARD, FUSED, Case, Inputs, make_inputs
from fcn_kernels import coreset_select

REPLAYED = "CUDA graph"


def rows(size: str) -> list[tuple[Case, str]]:
    """The shape of a training batch."""
    case = Case(256, 20, 512, 3, torch.bfloat16)
    return [(case, work) for work in (FORWARD, BOTH)]


def capture(case: Case, work: str, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """The graph, and the indices that a replay writes. Both kinds of work draw noise."""

    def call() -> torch.Tensor:
        coreset = coreset_select(inputs.features, case.k, inputs.quality, inputs.gamma, sample=True)
        if work == BOTH:
            torch.autograd.grad(coreset.features, inputs.leaves, inputs.grad)
        return coreset.indices

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = call()
    return graph, indices


def test_graphs(benchmark: Any, bench: Bench, row: tuple[Case, str]) -> None:
    if bench.device.type != "cuda":
        pytest.skip("no CUDA device")
    case, work = row
    inputs = make_inputs(case, bench.device)
    if work == FORWARD:
        features, quality, gamma = (t.detach() for t in inputs.leaves)
        inputs = inputs._replace(features=features, quality=quality, gamma=gamma)
    graph, indices = capture(case, work, inputs)
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(indices.clone())
    assert not any(torch.equal(a, b) for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2])))

    def build() -> tuple[dict[str, Contender], list[Inputs]]:
        return {REPLAYED: lambda turn: graph.replay()}, [inputs]

    race = bench.race(("graphs", case, work), build)
    bench.record(benchmark, race, REPLAYED, "CUDA graphs", None, work=work, of=FUSED, **case.facts)
