"""Receptive fields of whole models: known ones, layouts of tokens, presets, and their measures."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from sequencer.analysis.receptive_field import StageField, measure, receptive_fields, scaled
from sequencer.analysis.receptive_field_plots import plot_receptive_fields


class Convolutions(nn.Module):
    """A linear stack: 3 x 3 with stride 2, then 3 x 5, all weights 1."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(1, 2, 3, stride=2, bias=False), nn.Conv2d(2, 1, (3, 5), padding=(1, 2), bias=False)]
        )
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward_intermediates(self, x, indices=None, *, stop_early, output_fmt, intermediates_only):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs if indices is None else [outputs[index] for index in indices]


def outer(rows, columns, first_row, first_column, size=17):
    """A separable map that is zero besides a rectangle."""
    expected = np.zeros((size, size))
    window = slice(first_row, first_row + len(rows)), slice(first_column, first_column + len(columns))
    expected[window] = np.outer(rows, columns)
    return expected


def test_convolutions_whose_fields_are_known():
    """Stage 0 has 8 x 8 tokens, of which (3, 3) starts at pixel 6; the second layer adds a token and two, weighted."""
    fields = receptive_fields(Convolutions().eval(), [torch.randn(2, 1, 17, 17), torch.randn(1, 1, 17, 17)])
    assert [(field.stage, field.tokens, field.token) for field in fields] == [
        ("stage 0", (8, 8), (3, 3)),
        ("stage 1", (8, 8), (3, 3)),
    ]
    np.testing.assert_allclose(fields[0].contribution, 3 * 2 * outer([1, 1, 1], [1, 1, 1], 6, 6))
    rows, columns = [1, 1, 2, 1, 2, 1, 1], [1, 1, 2, 1, 2, 1, 2, 1, 2, 1, 1]
    np.testing.assert_allclose(fields[1].contribution, 3 * 2 * outer(rows, columns, 4, 2))
    found = measure(fields[1])
    assert (found.rows[-1], found.columns[-1]) == (range(4, 11), range(2, 13))


def test_replknet_takes_the_next_token_its_positive_channels_and_the_mean():
    model = Convolutions().eval()
    with torch.no_grad():
        model.layers[0].weight[1] = -2  # of the two channels, one is positive wherever the other is negative
    bright, dark = torch.ones(1, 1, 17, 17), -torch.ones(1, 1, 17, 17)
    (first, *_) = receptive_fields(model, [bright, dark, bright], "replknet")
    assert first.token == (4, 4)
    # bright: channel 0 with gradient 1; dark: channel 1, whose gradient is negative
    np.testing.assert_allclose(first.contribution, outer([1, 1, 1], [2 / 3] * 3, 8, 8))


FOUR = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "options", "stages", "tokens"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}, 2, (8, 4)),
        ("deit_tiny_patch16_224", {"embed_dim": 8, "depth": 6, "num_heads": 1}, 4, (4, 2)),
        ("convnext_atto", {"depths": FOUR, "dims": (8, 8, 8, 8), "ls_init_value": None}, 4, (2, 1)),
        ("resnet18", {"layers": FOUR, "channels": (4, 4, 4, 4), "stem_width": 4}, 5, (2, 1)),
        (
            "sequencer2d_t_32",
            {"layers": (1,), "patch_sizes": (8,), "embed_dims": (8,), "hidden_sizes": (4,)},
            1,
            (8, 4),
        ),
    ],
)
def test_architectures(name, options, stages, tokens):
    torch.manual_seed(0)
    size = {} if name.startswith(("convnext", "resnet")) else {"img_size": (64, 32)}
    model = timm.create_model(name, pretrained=False, num_classes=3, **size, **options).eval()
    fields = receptive_fields(model, [torch.randn(2, 3, 64, 32)])
    assert (len(fields), fields[-1].tokens) == (stages, tokens)
    assert (fields[0].stage, fields[-1].stage) == tuple(model.feature_info[i]["module"] for i in (0, -1))
    assert fields[-1].contribution.shape == (64, 32)
    assert all((field.contribution > 0).any() for field in fields)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "patch"),
    [
        ("deit_tiny_patch16_224", {"embed_dim": 8, "depth": 4, "num_heads": 1}, 16),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (2,), "num_heads": (1,)}, 4),
    ],
)
def test_tokens_of_transformers_keep_their_place(name, options, patch):
    """Without attention a token depends on its own patch alone; a class token has none."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, img_size=(64, 32), **options).eval()
    for module in model.modules():
        if hasattr(module, "qkv"):
            nn.init.zeros_(module.proj.weight)
    for field in receptive_fields(model, [torch.randn(2, 3, 64, 32)]):
        assert field.token == (32 // patch - 1, 16 // patch - 1)
        seen = np.zeros((64, 32), bool)
        seen[32 - patch : 32, 16 - patch : 16] = True
        assert (field.contribution[seen] > 0).mean() > 0.7  # a gradient may be negative in all colours
        assert not field.contribution[~seen].any()


def test_batches_do_not_matter():
    model, images = Convolutions().eval(), torch.randn(6, 1, 17, 17)
    (whole, _), (split, _) = (receptive_fields(model, batches) for batches in ([images], images.split(1)))
    np.testing.assert_allclose(whole.contribution, split.contribution)


def test_measures_of_a_made_map():
    """Ten columns of 1 and 20 rows, of which one has half of all, in an image of 40 x 20 pixels."""
    contribution = np.zeros((40, 20))
    contribution[10:30, 5:15] = 1
    contribution[12, 5:15] = 19
    found = measure(StageField("stage", (4, 2), (1, 0), contribution))
    assert [len(span) for span in found.columns] == [2, 3, 5, 10]
    assert found.columns[-1] == range(5, 15)
    assert [len(span) for span in found.rows] == [1, 1, 1, 20]
    assert found.rows[:3] == [range(12, 13)] * 3
    assert found.rows[-1] == range(10, 30)
    even = np.ones((10, 10))  # squares of 1, 3, 5, ... pixels around row 5 and column 5
    assert measure(StageField("stage", (1, 1), (0, 0), even)).area == [0.25, 0.49, 0.81, 1.0]


def test_a_field_without_gradient():
    nothing = StageField("stage", (1, 1), (0, 0), np.zeros((4, 4)))
    found = measure(nothing)
    assert [*found.columns, *found.rows] == [range(0)] * 8
    assert np.isnan(found.area).all()
    assert not scaled([nothing], "sequencer")[0].any()
    assert not scaled([nothing], "replknet")[0].any()


def test_scales():
    small, large = (StageField("stage", (1, 1), (0, 0), np.array([[9.0, value]])) for value in (99, 999))
    np.testing.assert_allclose(scaled([small, large], "sequencer"), [[[0, 0.5]], [[0, 1]]])
    np.testing.assert_allclose(scaled([small, large], "replknet"), [[[0.5, 1]], [[1 / 3, 1]]])


def test_a_model_without_stages():
    with pytest.raises(ValueError, match=r"^Linear has no forward_intermediates, which gives the outputs of stages$"):
        receptive_fields(nn.Linear(1, 1).eval(), [])


@pytest.mark.parametrize("preset", ["sequencer", "replknet"])
def test_picture(preset, tmp_path):
    fields = receptive_fields(Convolutions().eval(), [torch.ones(1, 1, 17, 17)], preset)
    figure = plot_receptive_fields({"one": fields, "two": fields[:1]}, preset, "1 image", tmp_path / "field.png")
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title("left") for axes in drawn[:2]] == [
        "stage 0, 8 x 8 tokens\n50%: 2 x 2 px",
        "stage 1, 8 x 8 tokens\n50%: 5 x 3 px",
    ]
    assert len(drawn) == 3
    assert (tmp_path / "field.png").stat().st_size > 1000
