"""cluster_sums and the head under torch.func: grad, vjp, vmap, gradients per sample; what has no derivative says so."""

import pytest
import torch
from test_cluster_aggregate import make_head, rows
from test_clustering import _draw
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from fcn_kernels import cluster_sums


def _inputs():
    return _draw(3, 7, 6), _draw(5, 4, seed=1), _draw(5, seed=2), _draw(3, 7, 4, seed=3), _draw(3, 7, seed=4).abs()


def _loss(*inputs):
    return sum(t.cumsum(-1).square().sum() for t in cluster_sums(*inputs))


def test_grad_and_vjp_are_backward():
    inputs = [t.requires_grad_() for t in _inputs()]
    expected = torch.autograd.grad(_loss(*inputs), inputs)
    plain = [t.detach() for t in inputs]
    assert all(torch.equal(a, b) for a, b in zip(grad(_loss, tuple(range(5)))(*plain), expected, strict=True))
    _, back = vjp(_loss, *plain)
    assert all(torch.equal(a, b) for a, b in zip(back(torch.ones((), dtype=plain[0].dtype)), expected, strict=True))
    jacobian = jacrev(lambda x: cluster_sums(x, *plain[1:4]).sums[0, :2, 0])(plain[0])
    for at in range(2):
        row = grad(lambda x, at=at: cluster_sums(x, *plain[1:4]).sums[0, at, 0])(plain[0])
        torch.testing.assert_close(jacobian[at], row)


def test_vmap_gives_what_one_call_after_another_gives():
    x, weight, bias, keys, scale = _inputs()
    found = vmap(lambda x, k, s: tuple(cluster_sums(x, weight, bias, k, s)))(x, keys, scale)
    assert all(torch.equal(a, b) for a, b in zip(found, cluster_sums(x, weight, bias, keys, scale), strict=True))
    each = vmap(grad(_loss, (0, 1)), (0, None, None, 0, 0))(x, weight, bias, keys, scale)
    for b in range(3):
        alone = grad(_loss, (0, 1))(x[b], weight, bias, keys[b], scale[b])
        assert all(torch.equal(a[b], one) for a, one in zip(each, alone, strict=True))


def test_gradients_of_a_head_per_sample():
    head, (x, styles) = make_head(style_channels=0), rows(2, 5)
    parameters = {name: t.detach() for name, t in head.named_parameters()}

    def loss(parameters, x, styles):
        return functional_call(head, parameters, (x, styles)).descriptor.cumsum(-1).sum()

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, styles)
    for b in range(2):
        head.zero_grad()
        head(x[b], styles[b]).descriptor.cumsum(-1).sum().backward()
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(found[name][b], parameter.grad, rtol=1e-4, atol=1e-5)
    assert not head._kept


def test_what_has_no_derivative_says_so():
    x, weight, *_ = (t[..., :4] for t in _inputs())
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* Use torch.func.vjp"):
        jvp(lambda x: cluster_sums(x, weight).sums, (x,), (x,))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda x: grad(lambda x: cluster_sums(x, weight).sums.square().sum())(x).sum())(x)
    head, (x, styles) = make_head(), rows(2, 5)
    with forward_ad.dual_level(), torch.no_grad():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            head(forward_ad.make_dual(x, x), styles)
        state = head.update(x, styles)
        dual = forward_ad.make_dual(state.sums, state.sums)
        object.__setattr__(state, "sums", dual)  # descriptors have one
        tangent = forward_ad.unpack_dual(head.finish(state).means).tangent
        assert tangent.abs().max() > 0
