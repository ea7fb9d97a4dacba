"""Losses of Cluster and Aggregate: the packed step against one call for each prefix and chunk, and a short training."""

import pytest
import torch
from torch.nn import functional as F

from fcn_kernels import ClusterAggregate
from fcn_kernels.training.cluster import cluster_losses, cosine_distance

F64 = torch.float64


def make_head(**options):
    torch.manual_seed(0)
    small = {"dim": 12, "style_dim": 8, "norm_dim": 8, "num_heads": 4, "style_channels": 6, "drop_path": 0.0}
    head = ClusterAggregate(**(small | options)).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    head.norm_code.norm.running_mean.fill_(4)
    return head


def distance(fused, other):
    """As the authors' loss has it, of aggregates that are not made unit."""
    a = fused.descriptor * fused.norm[:, None]
    return 1 - (a * other).sum(-1) / ((a.norm(dim=-1) + 1e-5) * (other.norm(dim=-1) + 1e-5))


def one_call_each(head, features, styles, centers):
    """19 calls at n = 16: 8 prefixes of two groups, the sequence, and one shot."""
    losses, states = [], []
    for group in range(2):
        x, s = features[:, group], styles[:, group]
        each = [head(x[:, :k], s[:, :k]) for k in range(2, x.shape[1] + 1, 2)]
        losses.append(torch.stack([distance(f, centers) for f in each]).mean())
        states.append(head.update(x, s))
    sequence, single = head.finish(states[0] + states[1]), head(features.flatten(1, 2), styles.flatten(1, 2))
    losses += [distance(f, centers).mean() for f in (sequence, single)]
    return torch.stack(losses).mean(), distance(sequence, single.descriptor * single.norm[:, None]).mean()


def test_the_packed_step_is_one_call_for_each_set():
    head = make_head().train()
    head.norm_code.eval()
    head.style.eval()
    torch.manual_seed(1)
    x, styles = torch.randn(3, 2, 6, 12, dtype=F64), torch.randn(3, 2, 6, 6, 2, dtype=F64)
    centers = 5 * torch.randn(3, 12, dtype=F64)
    found = []
    for losses in (cluster_losses(head, x, styles, centers), one_call_each(head, x, styles, centers)):
        head.zero_grad()
        (losses[0] + 3 * losses[1]).backward()
        found.append([losses[0], losses[1], *(p.grad for p in head.parameters() if p.grad is not None)])
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).abs().max() <= 1e-10 * plain.abs().max() + 1e-12


def test_distances():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]])
    assert cosine_distance(a, b).tolist() == pytest.approx([0, 1, 1], abs=1e-5)


def test_a_short_training_brings_the_center_loss_down():
    """Ten identities, two thirds of their images spoiled, which their norms tell: the head weighs them down."""
    torch.manual_seed(0)
    head = ClusterAggregate(12, style_dim=0, norm_dim=16, num_heads=4).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    centers, history = F.normalize(torch.randn(10, 12), dim=-1), []
    for _ in range(40):
        spoiled = (torch.rand(10, 2, 8) < 0.66)[..., None]
        unit = F.normalize(torch.where(spoiled, torch.randn(10, 2, 8, 12), 4 * centers[:, None, None]), dim=-1)
        quality = torch.where(spoiled, 1.0, 4.0) * (1 + 0.1 * torch.rand(10, 2, 8, 1))
        losses = cluster_losses(head, unit, None, centers, quality[..., 0])
        optimizer.zero_grad()
        (losses.center + losses.memory / 10).backward()
        optimizer.step()
        history.append((losses.center.item(), losses.memory.item()))
    first, last = (torch.tensor(part).mean(0) for part in (history[:5], history[-5:]))
    assert last[0] < 0.6 * first[0]


def test_bad_calls_say_what_was_expected():
    head, x = make_head().train(), torch.randn(3, 2, 6, 12, dtype=F64)
    for message, call in {
        r"shape \(B, 2, n, C\)": lambda: cluster_losses(head, x[:, 0], None, x[:, 0, 0]),
        "step to divide the n = 6": lambda: cluster_losses(head, x, None, x[:, 0, 0], step=4),
        r"class_centers of shape \(3, 12\)": lambda: cluster_losses(head, x, None, x[0, 0, 0]),
        # longer than the features', these would be given to rows that are not theirs
        r"styles of shape \(3, 2, 6\) and more, got \(3, 2, 7, 8\)": lambda: cluster_losses(
            head, x, torch.randn(3, 2, 7, 8, dtype=F64), x[:, 0, 0]
        ),
        r"quality of shape \(3, 2, 6\) and more, got \(3, 6\)": lambda: cluster_losses(
            head, x, torch.randn(3, 2, 6, 8, dtype=F64), x[:, 0, 0], x[:, 0, :, 0]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"step to be an integer of at least 1, got 2\.0"):
        cluster_losses(head, x, torch.randn(3, 2, 6, 8, dtype=F64), x[:, 0, 0], step=2.0)
