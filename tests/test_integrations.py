"""The authors' checkpoints and model. The model here is a stand-in with their names and formulas, not their code."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fcn_kernels import CoresetAggregator
from fcn_kernels.integrations.facecoresetnet import convert_state_dict, load_state_dict, patch, unpatch
from reference.head import attention, norm_encoding
from reference.listing import coreset_listing


class Decoder(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        for name in ("self_attn1", "self_attn2", "multihead_attn1", "multihead_attn2", "multihead_attn3"):
            self.add_module(name, nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True))
        for number in range(1, 5):
            self.add_module(f"norm{number}", nn.LayerNorm(dim))
            self.add_module(f"dropout{number}", nn.Dropout(0.1))


class Aggregation(nn.Module):
    """Their module by its names; what it computes is the plain reference."""

    def __init__(self, dim=32, coreset_size=3, heads=4):
        super().__init__()
        self.coreset_size = coreset_size
        self.gamma_base = torch.tensor(0.0)
        self.gamma = nn.Parameter(torch.tensor(0.3))
        self.tau = nn.Parameter(torch.tensor(0.0))
        self.feature_norm_normalizer = nn.Parameter(torch.tensor(0.0))
        self.ur_center = nn.Parameter(torch.zeros(dim))
        self.dist_from_ur_center_norm_size_balance = nn.Parameter(torch.tensor(0.0))
        self.decoder_layer1 = Decoder(dim, heads)
        self.pos_trans_norm = nn.LayerNorm(dim)
        self.quality_measure = nn.Linear(dim, 1)
        self.calls = 0

    def differential_farthest_point_sample(self, x, npoint, norms):
        self.calls += 1
        return coreset_listing(x, norms, int(npoint), self.gamma, distance_scale=0.5).features

    def aggregate_fps_with_norm_priority(self, template_features, template_norms, only_FPS):
        rows = template_norms[..., None] * template_features
        k = torch.tensor(min(self.coreset_size, rows.shape[1]))
        core = self.differential_farthest_point_sample(rows, k, template_norms)
        if only_FPS:
            return core.mean(dim=1), core
        layer, dim = self.decoder_layer1, rows.shape[-1]
        target = core + self.pos_trans_norm(norm_encoding(core.norm(dim=2), dim))
        attended = attention(target, target, target, layer.self_attn1, self.training)
        target = layer.norm1(target + layer.dropout1(attended))
        keys = rows + self.pos_trans_norm(norm_encoding(template_norms, dim))
        attended = attention(target, keys, rows, layer.multihead_attn1, self.training)
        delta = layer.norm2(core + layer.dropout2(attended))
        return (core + delta).mean(dim=1), core

    def forward(self, features, norms, only_FPS=False):
        aggregate, core = self.aggregate_fps_with_norm_priority(features, norms, only_FPS)
        length = aggregate.norm(dim=-1, keepdim=True)
        return aggregate / length, length, core


class Model(nn.Module):
    """A model that holds theirs beside something else."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(4, 4)
        self.aggregate_model = Aggregation()

    def forward(self, features, norms, only_FPS=False):
        return self.aggregate_model(features, norms, only_FPS)


def _model():
    torch.manual_seed(0)
    model = Model().double().eval()
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.3)
    return model


def _rows():
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(2, 9, 32, generator=generator, dtype=torch.float64), dim=-1)
    return features, torch.rand(2, 9, generator=generator, dtype=torch.float64) * 20 + 5


def _results(model, only_FPS):
    features, norms = (t.requires_grad_() for t in _rows())
    descriptor, length, core = model(features, norms, only_FPS)
    loss = descriptor.cumsum(-1).sum() + length.sum() + core.square().sum()
    inputs = [features, norms, *model.parameters()]
    return [descriptor, length, core, *torch.autograd.grad(loss, inputs, materialize_grads=True)]


NESTINGS = {
    "bare": lambda model: model.aggregate_model.state_dict(),
    "in a model": lambda model: model.state_dict(),
    "lightning": lambda model: {"epoch": 3, "state_dict": model.state_dict()},
    "lightning, bare": lambda model: {"state_dict": model.aggregate_model.state_dict()},
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_converted_checkpoint_gives_their_descriptors(nesting, tmp_path):
    model = _model()
    head = CoresetAggregator(32, num_heads=4).double().eval()
    head.load_state_dict(convert_state_dict(NESTINGS[nesting](model)))
    descriptor, length, core = model(*_rows())
    got = head(*_rows())
    assert (got.descriptor - descriptor).abs().max() <= 1e-9
    assert (got.norm - length[:, 0]).abs().max() <= 1e-9
    assert torch.equal(got.coreset.features, core)
    torch.save(NESTINGS[nesting](model), tmp_path / "checkpoint.pt")
    loaded = load_state_dict(tmp_path / "checkpoint.pt")
    assert all(torch.equal(loaded[name], value) for name, value in head.state_dict().items())


def test_unknown_and_missing_keys_are_named():
    state = _model().aggregate_model.state_dict()
    del state["decoder_layer1.norm1.bias"], state["gamma"]
    state["decoder_layer1.linear1.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing keys \['gamma', 'decoder_layer1.norm1.bias'\].*linear1.weight"):
        convert_state_dict(state)
    with pytest.raises(TypeError, match="mapping"):
        convert_state_dict({"state_dict": [1]})


def test_parameters_they_never_use_may_be_missing():
    state = _model().aggregate_model.state_dict()
    for name in ("tau", "ur_center", "quality_measure.weight", "decoder_layer1.norm4.bias"):
        del state[name]
    assert set(convert_state_dict(state)) == set(CoresetAggregator(32, num_heads=4).state_dict())


def test_a_file_that_runs_code_is_not_loaded(tmp_path):
    torch.save({"state_dict": Aggregation}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_state_dict(tmp_path / "bad.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(TypeError, match="state dict, got list"):
        load_state_dict(tmp_path / "list.pt")


@pytest.mark.parametrize("only_FPS", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_a_patched_model_gives_their_results_and_gradients(attention, only_FPS):
    model = _model()
    expected = _results(model, only_FPS)
    calls = model.aggregate_model.calls
    assert patch(model, attention=attention) is model
    for ours, theirs in zip(_results(model, only_FPS), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max().clamp(min=1)
    assert model.aggregate_model.calls == calls, "their selection still ran"


@pytest.mark.parametrize("attention", [False, True])
def test_patching_leaves_parameters_alone_and_is_undone(attention):
    model = _model()
    before = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    patch(patch(model, attention=attention), attention=attention).train()
    assert list(model.state_dict()) == list(before)
    gamma = model.aggregate_model.gamma.item()
    model(*_rows())[0].cumsum(-1).sum().backward()
    optimizer.step()
    assert model.aggregate_model.gamma.item() != gamma
    assert unpatch(model) is model
    assert not {"differential_farthest_point_sample", "aggregate_fps_with_norm_priority"} & set(
        vars(model.aggregate_model)
    )
    calls = model.aggregate_model.calls
    model.eval()(*_rows())
    assert model.aggregate_model.calls == calls + 1


def test_a_copy_of_a_patched_model_uses_its_own_parameters():
    model = patch(_model(), attention=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(*_rows())[0].sub(model(*_rows())[0]).abs().max() > 0
    assert other.aggregate_model.differential_farthest_point_sample.__self__ is other.aggregate_model


def test_patched_training_samples_with_torchs_seed():
    model = patch(_model(), attention=True).train()
    features, norms = _rows()

    def run(seed):
        torch.manual_seed(seed)
        return model(features, norms / 20)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_a_model_without_their_module_is_refused():
    with pytest.raises(ValueError, match="differential_farthest_point_sample and gamma in Linear"):
        patch(nn.Linear(2, 2))
    model = _model()
    del model.aggregate_model.decoder_layer1.norm2
    patch(model)
    with pytest.raises(ValueError, match="norm2"):
        patch(model, attention=True)
