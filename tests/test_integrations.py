"""The authors' checkpoints and model. The model here is a stand-in with their names and formulas, not their code."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fcn_kernels import CoresetAggregator
from fcn_kernels.integrations.facecoresetnet import build_head, convert_state_dict, load_state_dict, patch, unpatch
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


def _prefixed(state, *prefixes):
    return {prefix + key: value for key, value in state.items() for prefix in prefixes}


WRAPPINGS = {
    "DDP": lambda model: _prefixed(model.state_dict(), "module."),
    "compiled": lambda model: _prefixed(model.state_dict(), "_orig_mod."),
    "compiled DDP": lambda model: _prefixed(model.state_dict(), "module._orig_mod."),
    "DDP, compiled": lambda model: _prefixed(model.state_dict(), "_orig_mod.module."),
    "within": lambda model: _prefixed(model.aggregate_model.state_dict(), "aggregate_model.module._orig_mod."),
    "a layer": lambda model: {
        key.replace("norm1.", "norm1._orig_mod."): value for key, value in model.state_dict().items()
    },
    "deeper": lambda model: _prefixed(model.state_dict(), "net.module."),
    "bare": lambda model: _prefixed(model.aggregate_model.state_dict(), "module."),
    "our own": lambda model: _prefixed(convert_state_dict(model.state_dict()), "_orig_mod.module."),
}


@pytest.mark.parametrize("lightning", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_wrappers_put_before_the_names_is_stripped(wrapping, lightning):
    model = _model()
    state = WRAPPINGS[wrapping](model)
    got = convert_state_dict({"state_dict": state} if lightning else state)
    expected = convert_state_dict(model.state_dict())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_two_aggregation_modules_are_not_taken_for_one():
    state = _prefixed(_model().aggregate_model.state_dict(), "teacher.aggregate_model.", "student.aggregate_model.")
    with pytest.raises(ValueError, match=r"got two values of gamma, the second as student.aggregate_model.gamma"):
        convert_state_dict(state)


def test_a_model_trained_with_a_fixed_gamma_loads():
    model = _model()
    del model.aggregate_model.gamma
    model.aggregate_model.gamma = torch.tensor(0.25)  # as theirs, in no state dict
    state = model.state_dict()
    assert "aggregate_model.gamma" not in state
    with pytest.raises(ValueError, match=r"missing keys \['gamma'\]"):
        convert_state_dict({"state_dict": state, "hyper_parameters": {"gamma": -1.0}})
    told = {"state_dict": state, "hyper_parameters": {"gamma": 0.25, "coreset_size": 3}}
    for head in (build_head(told, num_heads=4), build_head(state, num_heads=4, gamma=0.25)):
        assert head.gamma.item() == 0.25
        descriptor, *_ = model(*_rows())
        assert (head.double()(*_rows()).descriptor - descriptor).abs().max() <= 1e-7  # parameters were float32 between
    assert build_head(_model().state_dict(), num_heads=4, gamma=7.0).gamma.item() == 7


def test_k_of_the_hyper_parameters_is_used_or_the_difference_said():
    checkpoint = {"state_dict": _model().state_dict(), "hyper_parameters": {"coreset_size": 5, "gamma": -1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = build_head(checkpoint, num_heads=4)
        assert (head.k, head.training, head.dim) == (5, False, 32)
        assert build_head(checkpoint, k=5, num_heads=4).k == 5
        assert build_head(checkpoint["state_dict"], num_heads=4).k == 3
    with pytest.warns(UserWarning, match="trained with k = 5, and is used with k = 2"):
        assert build_head(checkpoint, k=2, num_heads=4).k == 2


def test_parameters_that_are_not_finite_are_named():
    state = _model().state_dict()
    state["aggregate_model.decoder_layer1.norm2.weight"][3] = torch.nan
    state["aggregate_model.quality_measure.weight"].fill_(torch.nan)  # never used
    with pytest.raises(ValueError, match=r"NaN or infinity in \['decoder_layer1.norm2.weight'\]"):
        convert_state_dict(state)


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
    with pytest.raises(ValueError, match="state dict, got list"):
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
    before, theirs = model.state_dict(), vars(model.aggregate_model).copy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    patch(patch(model, attention=attention), attention=attention).train()
    assert list(model.state_dict()) == list(before)
    assert isinstance(model.aggregate_model, Aggregation)
    assert type(model.aggregate_model).__name__ == "Aggregation"
    gamma = model.aggregate_model.gamma.item()
    model(*_rows())[0].cumsum(-1).sum().backward()
    optimizer.step()
    assert model.aggregate_model.gamma.item() != gamma
    assert unpatch(model) is model
    assert type(model.aggregate_model) is Aggregation
    assert type(model) is Model
    assert vars(model.aggregate_model).keys() == theirs.keys()
    calls = model.aggregate_model.calls
    model.eval()(*_rows())
    assert model.aggregate_model.calls == calls + 1
    assert type(unpatch(model).aggregate_model) is Aggregation


def test_patching_again_replaces_the_choice():
    model = _model()
    plain = vars(Aggregation)["aggregate_fps_with_norm_priority"]
    for whole in (True, False):
        patch(model, attention=whole)
        assert (model.aggregate_model.aggregate_fps_with_norm_priority.__func__ is plain) is not whole


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle, protocol 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_patched_model_is_patched_and_uses_its_own_parameters(way, attention):
    model = patch(_model(), attention=attention)
    other = COPIES[way](model)
    assert type(other.aggregate_model) is type(model.aggregate_model)
    assert torch.equal(other(*_rows())[0], model(*_rows())[0])
    assert other.aggregate_model.calls == 0, "their selection ran"
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(*_rows())[0].nan_to_num().sub(model(*_rows())[0]).abs().max() > 0
    assert type(unpatch(other).aggregate_model) is Aggregation
    assert type(model.aggregate_model) is not Aggregation


def test_a_patched_model_goes_through_a_file(tmp_path):
    model = patch(_model(), attention=True)
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other(*_rows())[0], model(*_rows())[0])
    assert other.aggregate_model.calls == 0


class Reduced(Aggregation):
    """With a pickling of its own, that takes arguments."""

    def __reduce__(self):
        return type(self), (32, self.coreset_size), {"extra": 7, **self.__dict__}


def test_a_class_that_pickles_itself_its_own_way_is_copied():
    model = patch(Reduced(coreset_size=2), attention=True).double().eval()
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)
    assert (other.extra, other.coreset_size) == (7, 2)
    assert torch.equal(other(*_rows())[0], model(*_rows())[0])


@pytest.mark.parametrize("attention", [False, True])
def test_a_data_parallel_replica_uses_its_own_parameters(attention):
    model = patch(_model(), attention=attention)
    replica = model.aggregate_model._replicate_for_data_parallel()
    parameters = {name: p.detach().clone() for name, p in model.aggregate_model.named_parameters(recurse=False)}
    for name, value in parameters.items():  # as torch.nn.parallel.replicate sets them
        setattr(replica, name, value)
    rows, norms = _rows()[0] * 7, _rows()[1]
    assert torch.equal(
        replica.differential_farthest_point_sample(rows, 5, norms),
        model.aggregate_model.differential_farthest_point_sample(rows, 5, norms),
    )
    replica.gamma.fill_(-9.0)
    assert not torch.equal(
        replica.differential_farthest_point_sample(rows, 5, norms),
        model.aggregate_model.differential_farthest_point_sample(rows, 5, norms),
    )
    assert replica.aggregate_fps_with_norm_priority.__self__ is replica


@pytest.mark.parametrize("attention", [False, True])
def test_a_patched_model_compiles(attention):
    model = patch(_model(), attention=attention)
    expected = model(*_rows())[0]
    got = torch.compile(model, backend="aot_eager")(*_rows())[0]
    assert (got - expected).abs().max() <= 1e-12


def test_a_method_of_the_module_itself_is_not_passed_over():
    model = _model()
    model.aggregate_model.differential_farthest_point_sample = lambda x, npoint, norms: x[:, :npoint]
    with pytest.raises(ValueError, match="to be a method of Aggregation, got one of the module's own"):
        patch(model)


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
