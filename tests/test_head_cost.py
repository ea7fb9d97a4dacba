"""What the head costs: multiply-adds by fvcore against rows and against the projected form.

Its time is measured by ``benchmarks/checks/head_time.py``.
"""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fcn_kernels import CoresetAggregator
from fcn_kernels.attention.op import forward_flops
from fcn_kernels.selection.op import select_flops
from reference.head import ReferenceHead

AUTHORS = 4.240e9  # multiply-adds of the authors' module at N = 8,000, C = 512, K = 3, by fvcore


def _rows(rows):
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(1, rows, 512, generator=generator), dim=-1)
    return features, torch.rand(1, rows, generator=generator) * 20 + 5


def _multiply_adds(rows, training):
    """Of a forward pass, by fvcore, which takes the two operators' own counts."""
    fvcore = pytest.importorskip("fvcore.nn")

    def handle(formula):
        def count(inputs, outputs):
            values = [v.type().sizes() if v.isCompleteTensor() else v.toIValue() for v in inputs]
            return formula(*values) // 2

        return count

    head = CoresetAggregator(512, 3).train(training)
    counted = fvcore.FlopCountAnalysis(head, _rows(rows)).unsupported_ops_warnings(False)
    counted.set_op_handle("fcn_kernels::select", handle(select_flops))
    counted.set_op_handle("fcn_kernels::set_attention", handle(forward_flops))
    by_operator = counted.by_operator()
    assert by_operator["set_attention"] == 2 * 24 * 512 * rows
    assert by_operator["select"] > 0
    return counted.total()


@pytest.mark.parametrize("training", [True, False])
def test_at_most_a_fifteenth_of_the_authors_multiply_adds(training):
    assert _multiply_adds(8000, training) <= AUTHORS / 15


def test_multiply_adds_grow_linearly():
    """The queries cost the same for any set; what is left of the count goes with N to the power of 1."""
    rows = [1000, 2000, 4000, 8000, 16000]
    counts = [_multiply_adds(n, False) for n in rows]
    growth = [(big - small) for small, big in pairwise(counts)]  # over N, 2N, 4N ... more rows
    slope = torch.linalg.lstsq(
        torch.stack((torch.tensor(rows[:-1]).log(), torch.ones(4)), 1), torch.tensor(growth, dtype=torch.float32).log()
    ).solution[0]
    assert slope.item() == pytest.approx(1, abs=0.01)
    fixed = counts[0] - growth[0]
    assert fixed <= 8 * 3 * 512 * 512 + 3 * 3 * 512 * 10, "more than eight products of 3 queries with a C x C matrix"


def test_a_training_step_costs_a_fifteenth_too():
    features, quality = _rows(2000)
    steps = {}
    for head in (ReferenceHead(512, 3), CoresetAggregator(512, 3)):
        inputs = features.clone().requires_grad_(), quality.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            head(*inputs)[0].sum().backward()
        steps[type(head)] = counter.get_total_flops()
    # at N = 2,000 the fixed cost of the queries still counts: at 8,000 the ratio is larger
    assert steps[CoresetAggregator] <= steps[ReferenceHead] / 10
