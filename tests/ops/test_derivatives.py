"""Derivatives by torch.func and in forward mode, which the fused kernels do not have, are those of the reference."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from sequencer.layers import RNN2d
from sequencer.ops import rnn2d

# torch scripts its own decompositions for forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["lstm", "peephole_lstm", "indylstm", "lstm1997", "gru"])
def layer(request) -> nn.Module:
    torch.manual_seed(0)
    return RNN2d(3, 4, request.param).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 4, 3, generator=torch.Generator().manual_seed(1))


def by_differences(f, x: torch.Tensor, tangent: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """The directional derivative by central differences, in float64."""
    return (f(x + step * tangent) - f(x - step * tangent)) / (2 * step)


def test_jvp(layer, x):
    tangent = torch.randn_like(x)
    y, derivative = jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(y, layer(x), **TOLERANCE)
    expected = by_differences(layer.double(), x.double(), tangent.double())
    torch.testing.assert_close(derivative, expected.float(), **TOLERANCE)


@pytest.mark.parametrize("part", ["input", "weight"])
def test_dual_numbers(layer, x, part):
    target = x if part == "input" else layer.rnn_v.weight_hh_l0.detach()
    tangent = torch.randn_like(target)

    def f(layer, x, value):
        return layer(value) if part == "input" else functional_call(layer, {"rnn_v.weight_hh_l0": value}, (x,))

    for context in (torch.no_grad, torch.enable_grad):
        with context(), forward_ad.dual_level():
            derivative = forward_ad.unpack_dual(f(layer, x, forward_ad.make_dual(target, tangent))).tangent
        assert derivative is not None
    double = layer.double()
    expected = by_differences(lambda value: f(double, x.double(), value), target.double(), tangent.double())
    torch.testing.assert_close(derivative, expected.float(), **TOLERANCE)


def test_jacobians(layer, x):
    small = x[:1, :2, :2]
    forward, reverse = (jacobian(lambda x: layer(x).sum((1, 2)))(small) for jacobian in (jacfwd, jacrev))
    torch.testing.assert_close(forward, reverse, **TOLERANCE)
    assert reverse.abs().max() > 1e-3


def test_hessian(layer, x):
    small = x[:1, :2, :2].flatten()
    second = hessian(lambda x: layer(x.view(1, 2, 2, 3)).square().sum())(small)
    torch.testing.assert_close(second, second.T, **TOLERANCE)
    assert second.abs().max() > 1e-3


def test_gradients_of_each_sample(layer, x):
    parameters = dict(layer.named_parameters())

    def loss(parameters, image):
        return functional_call(layer, parameters, (image[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, image in enumerate(x):
        expected = torch.autograd.grad(layer(image[None]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(each[name][index], gradient, **TOLERANCE)


def test_a_backend_that_must_be_used_is_refused(x):
    weights = RNN2d(3, 4).rnn_v.weights()
    with pytest.raises(ValueError, match=r"the torch backend does not support torch\.func and forward-mode"):
        jvp(lambda x: rnn2d(x, weights, None, backend="torch"), (x,), (torch.ones_like(x),))
