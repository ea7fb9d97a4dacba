"""The reference of Cluster and Aggregate against what the authors' modules gave in float64."""

import pytest
import torch
from caface import Golden

from fcn_kernels.integrations.caface import convert_state_dict
from reference.cluster_aggregate import ReferenceClusterAggregate

CASES = ["n3", "n20", "n33_c64_m4_d3_conf1", "n5_m1_d2"]


def reference(golden: Golden) -> ReferenceClusterAggregate:
    head = ReferenceClusterAggregate(**golden.options).double().eval()
    head.load_state_dict(convert_state_dict(golden.model.state_dict()))
    return head


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_authors(name):
    golden = Golden(name)
    head, given = reference(golden), golden.given
    close(head.style(golden.styles), given["single/compressed"])
    ways = {"single": None, **{f"seq{i}": sizes for i, sizes in enumerate(golden.chunkings)}}
    for way, sizes in ways.items():
        with torch.no_grad():
            result = head(golden.features, golden.styles, sizes)
        close(result.aggregate, given[f"{way}/aggregated"])
        close(result.cluster.means, given[f"{way}/mu"])
        close(result.cluster.styles, given[f"{way}/cluster_style"])
        close(result.cluster.masses, given[f"{way}/mass"])
        if way == "single":
            close(result.shares.T, given["single/attn"])
            close(result.confidence, given["single/confidence_weight"])


@pytest.mark.parametrize("way", ["single", "seq"])
@pytest.mark.parametrize("name", ["n20", "n33_c64_m4_d3_conf1"])
def test_gradients_are_the_authors(name, way):
    golden = Golden(name)
    head, given = reference(golden), golden.given
    features, styles = golden.features.requires_grad_(), golden.styles.requires_grad_()
    sizes = golden.chunkings[0] if way == "seq" else None
    (head(features, styles, sizes).aggregate * golden.loss_weight).sum().backward()
    if f"grad_{way}/features" in given:
        close(features.grad, given[f"grad_{way}/features"])
    close(styles.grad[0], given[f"grad_{way}/styles_row0"])
    rows = styles.grad.flatten(1)
    close(torch.stack([rows.sum(-1), rows.abs().sum(-1)]), given[f"grad_{way}/styles_rows"], 1e-11)
    close(golden.sums(golden.gradients_of(head)), given[f"grad_{way}/params"], 1e-8)
