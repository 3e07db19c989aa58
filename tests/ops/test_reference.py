"""The reference against the published equations of each cell, computed unit by unit in float64."""

import math

import pytest
import torch

from sequencer.ops.reference import CELLS, Weights, rnn, scan

N, T, C, D = 2, 4, 3, 2


def random_weights(cell: str, input_size: int = C, hidden_size: int = D, **kwargs) -> Weights:
    kwargs = {"dtype": torch.float64} | kwargs
    return Weights(
        **{name: torch.randn(s, **kwargs) for name, s in CELLS[cell].shapes(input_size, hidden_size).items()}
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def input_sum(w: dict[str, list], row: int, x: list[float]) -> float:
    """Computes one row of W x + b."""
    return sum(weight * value for weight, value in zip(w["weight_ih"][row], x, strict=True)) + w["bias_ih"][row]


def recurrent_sum(w: dict[str, list], row: int, h: list[float]) -> float:
    """Computes one row of U h + b'."""
    total = sum(weight * value for weight, value in zip(w["weight_hh"][row], h, strict=True))
    return total + (w["bias_hh"][row] if w["bias_hh"] else 0)


# Each of these functions returns the new (h, c) of unit k, given the input x of the step and the previous h and c of
# all units. Row g * D + k of a weight belongs to gate g of unit k.


def lstm(w, k, x, h, c):
    i, f, g, o = (input_sum(w, gate * D + k, x) + recurrent_sum(w, gate * D + k, h) for gate in range(4))
    cell = sigmoid(f) * c[k] + sigmoid(i) * math.tanh(g)
    return sigmoid(o) * math.tanh(cell), cell


def peephole_lstm(w, k, x, h, c):
    i, f, g, o = (input_sum(w, gate * D + k, x) + recurrent_sum(w, gate * D + k, h) for gate in range(4))
    i += w["weight_ch"][k] * c[k]
    f += w["weight_ch"][D + k] * c[k]
    cell = sigmoid(f) * c[k] + sigmoid(i) * math.tanh(g)
    o += w["weight_ch"][2 * D + k] * cell
    return sigmoid(o) * math.tanh(cell), cell


def indylstm(w, k, x, h, c):
    i, f, g, o = (input_sum(w, gate * D + k, x) + w["weight_hh"][gate * D + k] * h[k] for gate in range(4))
    cell = sigmoid(f) * c[k] + sigmoid(i) * math.tanh(g)
    return sigmoid(o) * math.tanh(cell), cell


def lstm1997(w, k, x, h, c):
    y_in, g, y_out = (input_sum(w, gate * D + k, x) + recurrent_sum(w, gate * D + k, h) for gate in range(3))
    cell = c[k] + sigmoid(y_in) * (4 / (1 + math.exp(-g)) - 2)
    return sigmoid(y_out) * (2 / (1 + math.exp(-cell)) - 1), cell


def gru(w, k, x, h, c):
    r = sigmoid(input_sum(w, k, x) + recurrent_sum(w, k, h))
    z = sigmoid(input_sum(w, D + k, x) + recurrent_sum(w, D + k, h))
    n = math.tanh(input_sum(w, 2 * D + k, x) + r * recurrent_sum(w, 2 * D + k, h))
    return (1 - z) * n + z * h[k], c[k]


def rnn_tanh(w, k, x, h, c):
    return math.tanh(input_sum(w, k, x) + recurrent_sum(w, k, h)), c[k]


def rnn_relu(w, k, x, h, c):
    return max(0.0, input_sum(w, k, x) + recurrent_sum(w, k, h)), c[k]


EQUATIONS = {
    "lstm": lstm,
    "gru": gru,
    "rnn": rnn_tanh,
    "rnn_relu": rnn_relu,
    "peephole_lstm": peephole_lstm,
    "indylstm": indylstm,
    "lstm1997": lstm1997,
}


def unit_by_unit(cell: str, x: torch.Tensor, weights: Weights, reverse: bool) -> torch.Tensor:
    w = {name: None if value is None else value.tolist() for name, value in weights._asdict().items()}
    outputs = torch.full((x.shape[0], x.shape[1], D), math.nan, dtype=x.dtype)
    for n, sequence in enumerate(x.tolist()):
        h, c = [0.0] * D, [0.0] * D
        for t in range(len(sequence) - 1, -1, -1) if reverse else range(len(sequence)):
            units = [EQUATIONS[cell](w, k, sequence[t], h, c) for k in range(D)]
            h, c = [unit[0] for unit in units], [unit[1] for unit in units]
            outputs[n, t] = torch.tensor(h, dtype=x.dtype)
    return outputs


def test_every_cell_has_equations():
    assert EQUATIONS.keys() == CELLS.keys()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_published_equations(cell, reverse):
    torch.manual_seed(0)
    x, w = torch.randn(N, T, C, dtype=torch.float64), random_weights(cell)
    torch.testing.assert_close(scan(x, w, cell, reverse), unit_by_unit(cell, x, w, reverse), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_layers_and_directions(cell):
    """A layer reads the outputs of both directions of the layer below, the forward direction first."""
    torch.manual_seed(0)
    x = torch.randn(N, T, C, dtype=torch.float64)
    first = random_weights(cell), random_weights(cell)
    second = random_weights(cell, 2 * D), random_weights(cell, 2 * D)
    for layer in (first, second):
        x_below, x = x, torch.cat([unit_by_unit(cell, x, layer[0], False), unit_by_unit(cell, x, layer[1], True)], -1)
        torch.testing.assert_close(rnn(x_below, [layer], cell), x, rtol=1e-12, atol=1e-13)
    torch.manual_seed(0)
    x_bottom = torch.randn(N, T, C, dtype=torch.float64)
    torch.testing.assert_close(rnn(x_bottom, [first, second], cell), x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_first_and_second_derivatives(cell, reverse):
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 2, dtype=torch.float64), random_weights(cell, 2, 2)
    names = [name for name, value in w._asdict().items() if value is not None]

    def outputs(x, *tensors):
        return scan(x, Weights(**dict(zip(names, tensors, strict=True))), cell, reverse)

    inputs = [tensor.requires_grad_() for tensor in (x, *(getattr(w, name) for name in names))]
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_keeps_its_state_in_float32(cell):
    """The error does not grow over many steps: it is that of rounding inputs and outputs once."""
    torch.manual_seed(0)
    x = torch.randn(N, 64, C).bfloat16()
    w = Weights(*(t if t is None else (0.3 * t).bfloat16() for t in random_weights(cell, dtype=torch.float32)))
    exact = scan(x.double(), Weights(*(t if t is None else t.double() for t in w)), cell)
    outputs = scan(x, w, cell)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.double(), exact, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("cell", CELLS)
def test_no_sequences(cell):
    assert scan(torch.zeros(0, T, C, dtype=torch.float64), random_weights(cell), cell).shape == (0, T, D)
