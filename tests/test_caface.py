"""Checkpoints and models of the authors of Cluster and Aggregate: converted, patched, and as they were."""

import copy
import pickle

import pytest
import torch
from caface import Golden, Theirs
from torch import nn

from fcn_kernels import ClusterAggregate
from fcn_kernels.integrations.caface import build_head, convert_state_dict, load_state_dict, patch, unpatch

F64 = torch.float64


class Holder(nn.Module):
    """A model that holds the aggregator among other things, as their trainer does."""

    def __init__(self, **options):
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.aggregator = Theirs(**options)


def checkpoint(prefix="aggregator.", **options):
    state = {prefix + name: value for name, value in Theirs(**options).state_dict().items()}
    return {"state_dict": state | {"model.weight": torch.zeros(1), "center.weight": torch.zeros(1)}, "epoch": 3}


def test_a_checkpoint_has_the_authors_names():
    state = Theirs().state_dict()
    assert len(state) == 74
    assert sum(p.numel() for p in Theirs().parameters()) == 786_524


def test_checkpoints_convert_whatever_holds_them(tmp_path):
    plain = Theirs().state_dict()
    expected = convert_state_dict(plain)
    wrapped = checkpoint("module.aggregator._orig_mod.")
    for given in (checkpoint(), wrapped, {"aggregator." + name: value for name, value in plain.items()}, expected):
        found = convert_state_dict(given)
        assert found.keys() == ClusterAggregate().state_dict().keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    torch.save(checkpoint(), tmp_path / "theirs.ckpt")
    assert load_state_dict(tmp_path / "theirs.ckpt").keys() == expected.keys()
    head = build_head(checkpoint())
    assert not head.training
    again = convert_state_dict({"state_dict": head.state_dict()})
    assert all(torch.equal(value, again[name]) for name, value in head.state_dict().items())


def test_sizes_come_from_shapes():
    head = build_head(checkpoint(dim=64, clusters=8, depth=3))
    assert (head.dim, tuple(head.centers.shape), len(head.blocks), len(head.mixers)) == (64, (8, 128), 3, 3)
    one = build_head(checkpoint(channelwise=False), dim=96)
    assert (one.dim, one.channelwise) == (96, False)
    plain = ClusterAggregate(32, style_dim=0, depth=0)
    assert build_head(plain.state_dict()).style is None
    with pytest.raises(ValueError, match="for C = 96, got one for C = 64"):
        build_head(head.state_dict(), dim=96)


def test_bad_checkpoints_are_named():
    good = Theirs().state_dict()
    for message, change in {
        r"missing keys \['norm_emb.pe'\]": lambda s: s.pop("norm_emb.pe"),
        r"unknown keys \['fusion_net.conf_mlp.7.gate'\]": lambda s: s.update(
            {"fusion_net.conf_mlp.7.gate": torch.zeros(1)}
        ),
        r"NaN or infinity in \['norm_emb.scale'\]": lambda s: s["norm_emb.scale"].fill_(torch.nan),
        "one parameter by two names": lambda s: s.update({"style_maker.cfcs.0": torch.ones(384, 2)}),
        r"group_token of shape \(1, M, d\)": lambda s: s.update(
            {"fusion_net.clustering_layer.group_token": torch.zeros(4, 128)}
        ),
    }.items():
        state = copy.deepcopy(good)
        change(state)
        with pytest.raises(ValueError, match=message):
            convert_state_dict(state)
    state = convert_state_dict(good)
    state["style.linear.bias"] = state["style.linear.bias"][:7]
    with pytest.raises(ValueError, match=r"style.linear.bias \(7,\) instead of \(64,\)"):
        build_head(state)
    with pytest.raises(TypeError, match='mapping under "state_dict"'):
        convert_state_dict({"state_dict": [1]})


def results(model, features, styles, cuts=None):
    """Results of a sequence of chunks, or of one call without memory."""
    model.reset_memory()
    if cuts is None:
        return model(features, styles)
    model.memory_count = 0
    for x, s in zip(features.split(cuts, 1), styles.split(cuts, 1), strict=True):
        result = model(x, s)
    return result | {f"memory {name}": value for name, value in model.memory.items()}


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "attn_dict_list":
            assert_close(found[name][0], value[0], atol)
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("options", [{}, {"dim": 64, "depth": 3, "channelwise": False}, {"clusters": 1}])
def test_patched_and_not_patched_agree(options):
    theirs, golden = Holder(**options), Golden("n20")
    ours = patch(copy.deepcopy(theirs))
    x = torch.randn(3, 20, options.get("dim", 512), dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.5
    styles = theirs.aggregator.compress_intermediate([golden.styles[:, :128], golden.styles[:, 128:]]).detach()
    styles = torch.stack([styles, styles.flip(0), 2 * styles])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for cuts in (None, [7, 1, 12]):
        with torch.no_grad():
            expected, found = (results(m.aggregator, x, styles, cuts) for m in (theirs, ours))
        assert_close(found, expected, 1e-11)
        assert ours.aggregator.memory_count == theirs.aggregator.memory_count
    # in training, without the grid: values, statistics and gradients
    for model in (theirs, ours):
        model.train()
    found = []
    for model in (theirs, ours):
        rows = x.clone().requires_grad_()
        result = results(model.aggregator, rows, styles, [7, 1, 12])
        (result["aggregated"].cumsum(-1).sum() + result["memory attn"].square().sum()).backward()
        grads = {n: p.grad for n, p in model.aggregator.named_parameters() if p.grad is not None}
        found.append((result, {"rows": rows.grad, **grads}, dict(model.named_buffers())))
    assert_close(found[1][0], found[0][0], 1e-12)
    assert_close(found[1][1], found[0][1], 1e-8)
    assert_close(found[1][2], found[0][2], 1e-12)


def test_patched_models_copy_and_pickle_and_are_unpatched():
    model = Holder()
    kind = type(model.aggregator)
    patch(patch(model))
    assert type(model.aggregator) is not kind
    x, styles = torch.randn(1, 5, 512, dtype=F64), torch.randn(1, 5, 64, dtype=F64)
    with torch.no_grad():
        expected = model.aggregator(x, styles)["aggregated"]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other.aggregator) is type(model.aggregator)
            assert torch.equal(other.aggregator(x, styles)["aggregated"], expected)
            other.aggregator.fusion_net.clustering_layer.group_token.mul_(2)
            assert not torch.equal(other.aggregator(x, styles)["aggregated"], expected)
    assert type(unpatch(model).aggregator) is kind
    assert unpatch(model) is model


def test_what_cannot_be_patched_is_named():
    with pytest.raises(ValueError, match="expected a module with style_maker, fusion_net"):
        patch(nn.Linear(2, 2))
    model = Holder()
    model.aggregator.fusion_net.clustering_layer.blocks[0].norm1 = nn.Identity()
    with pytest.raises(ValueError, match="LayerNorms of eps"):
        patch(model)
    model = Holder()
    del model.aggregator.fusion_net.clustering_layer.blocks[1].mlp
    with pytest.raises(ValueError, match=r"where .* no attribute 'mlp'"):
        patch(model)
    model = Holder()
    model.aggregator.input_maker = nn.Linear(128, 128)
    with pytest.raises(ValueError, match="input_maker"):
        patch(model)
