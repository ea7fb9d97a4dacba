"""Faults of clustering, alignment and their heads that were found by attack, each as a test that failed before."""

import pytest
import torch
from test_cluster_aggregate import make_head, rows, run
from test_clustering import chunks

from fcn_kernels import cluster_sums
from fcn_kernels.clustering import op

WRONG = {  # offsets or lengths that lead out of 11 rows, and what is left of them
    "long": ({"lengths": [4, 1, 0, 600]}, {}),
    "negative": ({"lengths": [-4, 1, 0, 6]}, {"lengths": [0, 1, 0, 6]}),
    "far": ({"offsets": [-5, 4, 5, 5, 2**40]}, {}),
    "falling": ({"offsets": [0, 4, 2**40, 5, 11]}, {"lengths": [4, 1, 0, 0], "offsets": [0, 4, 11, 11, 11]}),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_chunks_stay_inside_the_tensors_whatever_offsets_and_lengths_say(backend, name):
    given, meant = ({n: torch.tensor(v) for n, v in values.items()} for values in WRONG[name])

    def results(**replaced):
        p = chunks(dtype=torch.float32)._replace(**replaced)
        p = p._replace(features=p.features.clone().requires_grad_(), styles=p.styles.clone().requires_grad_())
        out = op.cluster_chunks(p, backend)
        loss = out.sums.square().sum() + out.key_sums.cumsum(-1).sum()
        return *out[:5], *torch.autograd.grad(loss, (p.features, p.styles))

    if name == "falling":  # where sets overlap, only that nothing is read beyond the rows is promised
        assert results(**given)[4].sum() <= 2 * 11
        return
    assert all(torch.equal(a, b) for a, b in zip(results(**given), results(**meant), strict=True))


def test_compiled_calls_stay_inside_the_tensors_whatever_lengths_say():
    head, (x, styles) = make_head(style_channels=0), rows(2, 5)
    wrong, meant = torch.tensor([5, 10**6]), torch.tensor([5, 5])

    def fused(lengths, **options):
        return head(x, styles, lengths=lengths, **options).means

    def sums(lengths):
        return cluster_sums(x, head.centers[:, :1].expand(-1, 24), lengths=lengths).sums

    for call in (fused, lambda lengths: fused(lengths, chunk=2), sums):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, wrong), run(call, meant))
    for wrong in ([0, 3, 10**6], [-7, 3, 10]):
        packed = torch.compile(
            lambda offsets: head(x[0], styles[0], cu_seqlens=offsets, chunk=2), fullgraph=True, backend="aot_eager"
        )
        assert run(packed, torch.tensor(wrong)).counts.tolist() == [3, 2]
