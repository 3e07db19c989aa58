"""Shapes, initialisation and errors of the token mixers."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from sequencer.layers import RNN, UNIONS, RNN1d, RNN2d
from sequencer.ops import CELLS

GATES = {"lstm": 4, "gru": 3, "rnn": 1, "rnn_relu": 1, "peephole_lstm": 4, "indylstm": 4, "lstm1997": 3}


@pytest.mark.parametrize("with_fc", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("union", UNIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_rnn2d_keeps_the_shape(cell, union, bidirectional, with_fc):
    torch.manual_seed(0)  # units of a ReLU can be dead
    channels = 4 * (2 if bidirectional else 1) * (2 if union == "cat" else 1)
    mixer = RNN2d(channels, 4, cell, num_layers=2, bidirectional=bidirectional, union=union, with_fc=with_fc)
    x = torch.randn(2, 3, 5, channels)
    y = mixer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mixer.parameters())
    axes = {"vertical": {"rnn_v"}, "horizontal": {"rnn_h"}}.get(union, {"rnn_v", "rnn_h"})
    assert {name.split(".")[0] for name in mixer.state_dict()} == axes | ({"fc"} if with_fc else set())


def test_rnn2d_applies_its_linear_layer_last():
    mixer = RNN2d(6, 4)
    nn.init.zeros_(mixer.fc.weight)
    nn.init.constant_(mixer.fc.bias, 3.0)
    assert torch.equal(mixer(torch.randn(1, 2, 3, 6)), torch.full((1, 2, 3, 6), 3.0))


@pytest.mark.parametrize("cell", CELLS)
def test_rnn1d_reads_the_map_row_by_row(cell):
    torch.manual_seed(0)
    mixer, x = RNN1d(6, 3, cell), torch.randn(2, 3, 4, 6)
    sequence = torch.stack([x[:, row, column] for row in range(3) for column in range(4)], dim=1)
    torch.testing.assert_close(mixer(x), mixer.rnn(sequence).reshape(2, 3, 4, 6))


@pytest.mark.parametrize("cell", CELLS)
def test_forward_direction_does_not_depend_on_later_steps(cell):
    torch.manual_seed(0)
    layer, x = RNN(3, 4, cell, bidirectional=False), torch.randn(2, 6, 3)
    changed = x.clone()
    changed[:, 3] += 1
    same = (layer(x) == layer(changed)).all(dim=-1).all(dim=0)
    assert same[:4].tolist() == [True, True, True, False]


@pytest.mark.parametrize("cell", CELLS)
def test_initialisation(cell):
    torch.manual_seed(0)
    size, bound = 64, 1 / math.sqrt(64)
    for name, parameter in RNN(32, size, cell).named_parameters():
        gates = list(parameter.split(size))
        if cell == "indylstm" and name.startswith("bias"):
            assert torch.equal(gates.pop(1), torch.ones(size))
        for values in gates:
            assert values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)
            assert values.abs().max() > 0.9 * bound


@pytest.mark.parametrize("cell", CELLS)
def test_parameter_counts(cell):
    """One layer with both directions has the number of parameters that the formulas of the papers give."""
    C, D = 7, 5
    gates = GATES[cell]
    per_direction = {
        "indylstm": 4 * (C * D + 2 * D),
        "lstm1997": 3 * (C * D + D * D + D),
        "peephole_lstm": 4 * (C * D + D * D + 2 * D) + 3 * D,
    }.get(cell, gates * (C * D + D * D + 2 * D))
    assert sum(parameter.numel() for parameter in RNN(C, D, cell).parameters()) == 2 * per_direction


@pytest.mark.parametrize("union", UNIONS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_hooks_and_wrappers_of_the_recurrences_run(union, bidirectional):
    torch.manual_seed(0)
    mixer, x = RNN2d(6, 4, bidirectional=bidirectional, union=union), torch.randn(2, 3, 5, 6)
    expected, shapes = mixer(x), []
    for name in ("rnn_v", "rnn_h"):
        if (rnn := getattr(mixer, name)) is not None:
            rnn.register_forward_hook(lambda rnn, inputs, output: shapes.append(tuple(inputs[0].shape)))
    torch.testing.assert_close(mixer(x), expected)
    axes = {"vertical": [(10, 3, 6)], "horizontal": [(6, 5, 6)]}
    assert shapes == axes.get(union, [(10, 3, 6), (6, 5, 6)])
    if union == "cat":
        mixer.rnn_v = nn.Sequential(mixer.rnn_v, nn.Dropout(0.0))
        torch.testing.assert_close(mixer(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("how", [lambda *a: prune.l1_unstructured(*a, amount=0.5), weight_norm, spectral_norm])
def test_weights_that_a_hook_computes_are_trained(how):
    """The hooks of `torch.nn.utils` set a weight before each call of the module that has it."""
    torch.manual_seed(0)
    mixer, x = RNN2d(6, 4), torch.randn(2, 3, 5, 6)
    how(mixer.rnn_h, "weight_hh_l0")
    optimizer, losses = torch.optim.SGD(mixer.parameters(), lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(mixer(x).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="unknown cell 'lstmm'; there are lstm, gru"):
        RNN(4, 4, "lstmm")
    with pytest.raises(ValueError, match="unknown cell"):
        RNN2d(4, 4, "lstmm")
    with pytest.raises(ValueError, match="unknown union 'concat'; there are cat, add, vertical, horizontal"):
        RNN2d(4, 4, union="concat")
    with pytest.raises(ValueError, match=r"the 16 channels of the recurrences must equal the 8 of the input"):
        RNN2d(8, 4, with_fc=False)
    with pytest.raises(ValueError, match=r"the 8 channels of the recurrence must equal the 4 of the input"):
        RNN1d(4, 4)
    for sizes in ({"input_size": 0}, {"hidden_size": 0}, {"num_layers": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))}=0"):
            RNN(**{"input_size": 4, "hidden_size": 4} | sizes)


def test_repr():
    assert "cell=gru, hidden_size=4, output_size=8" in str(RNN(4, 4, "gru"))
