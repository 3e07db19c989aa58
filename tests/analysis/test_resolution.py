"""Accuracy, speed and states across input sizes."""

import math

import numpy as np
import pytest
import timm
import torch

from sequencer.analysis import resolution
from sequencer.analysis.resolution import AtSize, compare_sizes, default_sizes, measure_size, measure_states
from sequencer.models import create_model
from sequencer.ops import CELLS, Weights, trace

SMALL = {"layers": (2, 1), "patch_sizes": (2, 2), "embed_dims": (8, 16), "hidden_sizes": (4, 8)}


def small_model(name="sequencer2d_s", **kwargs):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **SMALL | {"img_size": 16} | kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def labelled(number=11, size=4, side=16):
    images = torch.randn(number, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = (images, torch.arange(number) % 5, torch.arange(number))
    return list(zip(*(part.split(size) for part in parts), strict=True))


def test_default_sizes_are_multiples_of_the_total_stride():
    assert default_sizes(create_model("sequencer2d_t_8", img_size=8), 8) == [4, 6, 8, 10, 12, 16]
    assert default_sizes(small_model(), 16) == [8, 12, 16, 20, 24, 32]
    assert default_sizes(timm.create_model("test_resnet"), 224) == [128, 160, 224, 288, 352, 448]
    assert default_sizes(timm.create_model("test_vit"), 160) == [80, 128, 160, 208, 240, 320]
    assert default_sizes(torch.nn.Linear(1, 1), 10) == [5, 8, 10, 13, 15, 20]


def test_the_speed_is_the_median_over_full_batches_without_the_warm_up(monkeypatch):
    clock = iter(range(1000))
    seconds = iter([100.0, 8.0, 2.0, 4.0, 1.0])  # the first batch twice, two more, and one of three images
    now = [0.0]

    def classify(images):
        next(clock)
        now[0] += next(seconds)
        return torch.zeros(len(images), 5)

    monkeypatch.setattr(resolution.time, "perf_counter", lambda: now[0])
    found = measure_size(Model(classify), labelled(15))
    assert found.images_per_s == 4 / 4.0
    assert next(clock) == 5


class Model(torch.nn.Module):
    """Calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_results_do_not_depend_on_the_batch_size():
    model = small_model()
    whole, parts = (measure_size(model, labelled(11, size)) for size in (11, 3))
    assert whole.indices.tolist() == parts.indices.tolist() == list(range(11))
    assert whole.right.tolist() == parts.right.tolist()
    for a, b in zip(whole.states, parts.states, strict=True):
        assert (a.stage, a.steps) == (b.stage, b.steps)
        assert a.state_rms == pytest.approx(b.state_rms)
        assert a.saturated == pytest.approx(b.saturated)
    assert [(entry.stage, entry.steps) for entry in whole.states] == [("stages.0", 8), ("stages.1", 4)]


def test_states_of_an_lstm_are_those_of_torch():
    model = small_model("v_sequencer_s", layers=(1,), patch_sizes=(2,), embed_dims=(8,), hidden_sizes=(4,))
    images = labelled()[0][0]
    block = model.stages[0].blocks[0]
    rnn = block.rnn_tokens.rnn
    lstm = torch.nn.LSTM(8, 4, bidirectional=True, batch_first=True).double()
    lstm.load_state_dict(rnn.state_dict())
    with torch.no_grad():
        tokens = block.norm1(model.stages[0].downsample(model.forward_embed(images)))
        cells = lstm(tokens.flatten(1, 2))[1][1]
    (found,) = measure_states(model, images)
    assert found[:2] == ("stages.0", 64)
    assert found.state_rms == pytest.approx(cells.square().mean(dim=-1).sqrt().mean().item())


@pytest.mark.parametrize("cell", CELLS)
def test_the_state_of_a_trace(cell):
    shapes = CELLS[cell].shapes(3, 4)
    generator = torch.Generator().manual_seed(0)
    w = Weights(**{name: torch.randn(s, generator=generator, dtype=torch.double) for name, s in shapes.items()})
    found = trace(torch.randn(2, 5, 3, generator=generator, dtype=torch.double), w, cell)
    if cell in ("gru", "rnn", "rnn_relu"):
        assert torch.equal(found.state, found.hidden)
    else:
        squashed = 2 * found.state.sigmoid() - 1 if cell == "lstm1997" else found.state.tanh()
        torch.testing.assert_close(found.gates["output"] * squashed, found.hidden)


def test_saturated_gates_and_stages():
    model = small_model(layers=(1, 1))
    mixer = model.stages[0].blocks[0].rnn_tokens
    with torch.no_grad():
        for rnn in (mixer.rnn_v, mixer.rnn_h):
            for parameter in rnn.parameters():
                parameter.zero_()
            for bias in (rnn.bias_ih_l0, rnn.bias_ih_l0_reverse):
                bias[:4] = -3  # input gates of 0.05, forget gates of 0.95; output gates of 0.5
                bias[4:8] = 3
    first, second = measure_states(model, labelled(side=20)[0][0])
    assert first == ("stages.0", 10, 0, pytest.approx(2 / 3))
    assert second[:2] == ("stages.1", 5)
    assert second.state_rms > 0
    assert 0 < second.saturated < 1
    plain = measure_states(small_model(cell="rnn"), labelled()[0][0])
    assert all(math.isnan(entry.saturated) and entry.state_rms > 0 for entry in plain)
    assert measure_states(timm.create_model("test_resnet").double().eval(), labelled(side=32)[0][0]) == []


def test_changes_from_the_own_size():
    right = np.array([1, 1, 1, 0, 0, 1, 1, 0], dtype=bool)
    smaller = np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=bool)
    indices = np.arange(8)
    found = compare_sizes(
        16,
        {
            16: AtSize(indices, right, 5.0, []),
            8: AtSize(indices, smaller, 9.0, []),
            32: AtSize(indices[1:], right[1:], 1.0, []),  # an image is too large to be read
        },
    )
    assert found.images == 7
    assert list(found.top1) == [8, 16, 32]
    assert {size: round(7 * top1.value) for size, top1 in found.top1.items()} == {8: 3, 16: 4, 32: 4}
    assert list(found.changes) == [8, 32]
    change = found.changes[8]
    assert (change.comparison.only_first, change.comparison.only_second) == (1, 2)
    assert change.p_holm == 1
    assert found.changes[32].comparison.difference.value == 0
    assert found.images_per_s == {8: 9.0, 16: 5.0, 32: 1.0}
    alone = compare_sizes(16, {16: AtSize(indices, right, 5.0, [])})
    assert (alone.images, alone.changes) == (8, {})
