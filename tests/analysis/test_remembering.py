"""Memory of recurrences: Jacobians by finite differences, known curves, products of gates, layout of maps."""

import math

import numpy as np
import pytest
import torch

from sequencer.analysis.memory import forget_products, half_distance, jacobian_squares, mean_curves, measure_memory
from sequencer.layers import RNN, RNN1d
from sequencer.models import create_model
from sequencer.ops import CELLS, Weights, trace
from sequencer.ops.reference import scan
from tests.helpers import ARGS

N, T, C, D = 2, 5, 3, 4


def draw(cell, steps=T, scale=1.0, seed=0):
    """Inputs and parameters of one direction, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = CELLS[cell].shapes(C, D)
    w = Weights(**{name: scale * torch.randn(s, generator=generator, dtype=torch.double) for name, s in shapes.items()})
    return torch.randn(N, steps, C, generator=generator, dtype=torch.double), w


def norms(x, w, cell):
    """Frobenius norms by the unit vectors as probes, `N T`."""
    units = torch.eye(D, dtype=torch.double)[:, None].expand(-1, len(x), -1)
    return jacobian_squares(x, w, cell, units)[0].sum(dim=0).sqrt()


def build(name="sequencer2d_t_8", img_size=8, **kwargs):
    torch.manual_seed(0)
    return create_model(name, num_classes=3, in_chans=1, img_size=img_size, **ARGS | kwargs).eval()


@pytest.mark.parametrize("cell", CELLS)
def test_norms_are_those_of_finite_differences(cell):
    x, w = draw(cell)
    differences = torch.zeros(N, T, D, C, dtype=torch.double)
    for t in range(T):
        for c in range(C):
            step = torch.zeros_like(x)
            step[:, t, c] = 1e-6
            change = scan(x + step, w, cell)[:, -1] - scan(x - step, w, cell)[:, -1]
            differences[:, T - 1 - t, :, c] = change / 2e-6
    torch.testing.assert_close(norms(x, w, cell), differences.flatten(2).norm(dim=-1), rtol=1e-6, atol=1e-8)


def test_random_probes_estimate_the_norm():
    x, w = draw("lstm")
    probes = torch.randn(20_000, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    found = jacobian_squares(x, w, "lstm", probes)[0].mean(dim=0).sqrt()
    torch.testing.assert_close(found, norms(x, w, "lstm"), rtol=0.03, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_a_trace_has_the_outputs_of_the_scan(cell):
    x, w = draw(cell)
    found = trace(x, w, cell)
    torch.testing.assert_close(found.hidden, scan(x, w, cell), rtol=0, atol=0)
    assert all(gate.shape == (N, T, D) and gate.min() >= 0 and gate.max() <= 1 for gate in found.gates.values())


def test_the_plain_rnn_forgets_and_the_carousel_does_not():
    curves = {}
    for cell in ("rnn", "lstm1997"):
        x, w = draw(cell, steps=64, scale=0.1)
        curves[cell] = norms(x, w, cell)[0].numpy()
    assert half_distance(curves["rnn"]) < 1
    assert curves["rnn"][-1] < 1e-30 * curves["rnn"][0]
    assert curves["lstm1997"][1:].min() > 0.9 * curves["lstm1997"][1]  # at 0 there is the path by the output gate too


def test_products_of_forget_gates_by_hand():
    w = Weights(*(torch.zeros(shape, dtype=torch.double) for shape in CELLS["lstm"].shapes(1, 1).values()))
    w.weight_ih[1] = 1.0  # the forget gate is the sigmoid of the input
    gates = torch.tensor([[0.9, 0.2, 0.5, 0.8]], dtype=torch.double)
    found = forget_products(trace(gates.logit()[..., None], w, "lstm"))
    torch.testing.assert_close(found[..., 0], torch.tensor([[1, 0.8, 0.4, 0.08]], dtype=torch.double))


def test_cells_without_a_forget_gate():
    x, w = draw("lstm1997")
    assert (forget_products(trace(x, w, "lstm1997")) == 1).all()
    x, w = draw("rnn")
    assert forget_products(trace(x, w, "rnn")) is None
    x, w = draw("gru")
    found = trace(x, w, "gru")
    torch.testing.assert_close(forget_products(found)[:, 1], found.gates["update"][:, -1])


def test_half_distances():
    assert half_distance(np.array([4.0, 3.0, 1.0, 0.0])) == 1.5
    assert half_distance(np.array([4.0, 3.0, 2.5])) == math.inf
    assert math.isnan(half_distance(np.zeros(3)))


def test_maps_have_the_layout_of_the_image():
    model = build(img_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    images = torch.randn(2, 1, 16, 12)
    found = {scan.direction: scan for scan in measure_memory(model, [images])}
    block = model.stages[0].blocks[0]
    tokens = block.norm1(model.stages[0].downsample(model.forward_embed(images)))[0]  # 8 x 6
    mixer = block.rnn_tokens
    down, up = mixer.rnn_v(tokens.transpose(0, 1)).transpose(0, 1).split(4, dim=-1)
    right, left = mixer.rnn_h(tokens).split(4, dim=-1)
    for direction, y in {"down": down, "up": up, "right": right, "left": left}.items():
        expected = y.square().mean(dim=-1).sqrt().detach().double().numpy()
        np.testing.assert_allclose(found[direction].maps["hidden"], expected, atol=1e-6)
        assert found[direction].maps["forget"].shape == (8, 6)
    assert [len(found[name].jacobian) for name in ("down", "up", "right", "left")] == [8, 8, 6, 6]


def test_one_sequence_in_both_directions_and_two_layers():
    model = build("v_sequencer_s", cell="gru", num_rnn_layers=2, hidden_sizes=[8])
    images = torch.randn(3, 1, 8, 8)
    found = measure_memory(model, [images])
    assert [(scan.layer, scan.direction) for scan in found] == [
        (layer, direction) for layer in (0, 1) for direction in ("forward", "backward")
    ]
    mixer = model.stages[0].blocks[0].rnn_tokens
    assert isinstance(mixer, RNN1d)
    tokens = model.stages[0].blocks[0].norm1(model.stages[0].downsample(model.forward_embed(images)))
    y = mixer(tokens)[0, ..., 8:].square().mean(dim=-1).sqrt()
    np.testing.assert_allclose(found[-1].maps["hidden"], y.detach().double().numpy(), atol=1e-6)


def test_results_do_not_depend_on_the_batches():
    """Curves of norms do in the draws of their probes, whose number is the same."""
    model, images = build(), torch.randn(6, 1, 8, 8)
    whole, parts = measure_memory(model, [images]), measure_memory(model, images.split(2))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a.carried, b.carried)
        np.testing.assert_allclose(list(a.saturated.values()), list(b.saturated.values()))
        np.testing.assert_array_equal(a.maps["hidden"], b.maps["hidden"])
        np.testing.assert_allclose(a.jacobian, b.jacobian, rtol=0.3)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_saturated_gates_are_counted():
    model = build()
    rnn = model.stages[0].blocks[0].rnn_tokens.rnn_v
    assert isinstance(rnn, RNN)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.bias_ih_l0[:4] = -3  # input gates of 0.05, forget gates of 0.95
        rnn.bias_ih_l0[4:8] = 3
    found = measure_memory(model, [torch.randn(1, 1, 8, 8)])[0]
    assert found.saturated == {"input": (1.0, 0.0), "forget": (0.0, 1.0), "output": (0.0, 0.0)}


def test_means_over_scans_of_equal_length():
    model = build(img_size=16)
    found = measure_memory(model, [torch.randn(1, 1, 16, 12)])
    curves = mean_curves(found)
    assert list(curves) == [8, 6]
    np.testing.assert_allclose(
        curves[6][0], (found[2].jacobian / found[2].jacobian[0] + found[3].jacobian / found[3].jacobian[0]) / 2
    )


def test_models_without_recurrence_are_refused():
    with pytest.raises(ValueError, match=r"^the model has no recurrent layers of this package$"):
        measure_memory(torch.nn.Linear(1, 1).eval(), [])
    with pytest.raises(ValueError, match=r"^the model is in training mode; call eval\(\) first$"):
        measure_memory(build().train(), [])
    with pytest.raises(ValueError, match=r"^there are no images$"):
        measure_memory(build(), [])
