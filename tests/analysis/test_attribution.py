"""The decompositions of logits: each is compared with the model itself in float64."""

import pytest
import timm
import torch

import sequencer.models  # noqa: F401  # registers the names with timm
from sequencer.analysis.attribution import (
    Part,
    contributions,
    evidence_maps,
    removal_curves,
    split_update,
    sum_by_source,
)
from sequencer.layers import RNN1d, RNN2d
from sequencer.ops import CELLS
from sequencer.variants import VARIANTS

SMALL = {"layers": (1, 2), "patch_sizes": (2, 2), "embed_dims": (8, 16), "hidden_sizes": (4, 8)}


def small_args(name):
    """Arguments that make a named model small, without changing what its name stands for."""
    args = VARIANTS[name].args
    if VARIANTS[name].model == "VSequencer" or not args.get("with_fc", True):
        directions = 1 if not args.get("bidirectional", True) else 2
        directions *= 2 if VARIANTS[name].model == "Sequencer2d" and args.get("union", "cat") == "cat" else 1
        return SMALL | {"hidden_sizes": (8 // directions, 16 // directions)}
    return SMALL


def random_model(name, **kwargs):
    """A small float64 model all of whose parameters are drawn at random; new heads are zero and would prove nothing."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=16, **small_args(name) | kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model, torch.randn(2, model.in_chans, 16, 20, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_both_decompositions_sum_to_the_logits(name):
    model, images = random_model(name)
    with torch.no_grad():
        logits = model(images)
    assert logits.std() > 0.1
    maps = evidence_maps(model, images)
    assert maps.shape == (2, 5, 4, 5)
    torch.testing.assert_close(maps.sum(dim=(2, 3)) + model.head.fc.bias, logits, rtol=0, atol=1e-10)
    found = contributions(model, images)
    torch.testing.assert_close(found.values.sum(dim=1), logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        sum(sum_by_source(found.parts, found.values.unbind(dim=1)).values()), logits, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kwargs", [{}, {"num_rnn_layers": 2}, {"union": "add", "bidirectional": False}])
def test_every_cell_is_decomposed(cell, kwargs):
    model, images = random_model("sequencer2d_t_32", cell=cell, **kwargs)
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(contributions(model, images).values.sum(dim=1), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    ("union", "axes"), [("cat", "vh"), ("add", "vh"), ("vertical", "v"), ("horizontal", "h"), (None, "1")]
)
def test_the_parts_of_an_update_sum_to_it(union, axes, cell, num_layers, bidirectional):
    torch.manual_seed(0)
    size = 8 if bidirectional else 4
    sizes = {"input_size": size, "hidden_size": 4, "cell": cell, "num_layers": num_layers}
    mixer = (
        RNN1d(**sizes, bidirectional=bidirectional)
        if union is None
        else RNN2d(**sizes, bidirectional=bidirectional, union=union)
    )
    mixer = mixer.double().eval()
    x = torch.randn(2, 3, 5, size, dtype=torch.float64)
    parts = split_update(mixer, x)
    names = {"v": ["down", "up"], "h": ["right", "left"], "1": ["forward", "backward"]}
    expected = [name for axis in axes for name in names[axis][: 2 if bidirectional else 1]]
    assert list(parts) == expected + ([] if union is None else ["mixer bias"])
    with torch.no_grad():
        torch.testing.assert_close(sum(parts.values()), mixer(x), rtol=0, atol=1e-12)


def test_a_direction_sees_only_its_side():
    """A change of one token reaches only what a direction scans after it: `down` the tokens below it in its column."""
    torch.manual_seed(0)
    mixer = RNN2d(6, 4).double().eval()
    x = torch.randn(1, 5, 5, 6, dtype=torch.float64)
    changed = x.clone()
    changed[0, 2, 3] += 1
    before, after = split_update(mixer, x), split_update(mixer, changed)
    reached = {name: (before[name] != after[name]).any(dim=-1)[0].nonzero().tolist() for name in before}
    assert reached == {
        "down": [[2, 3], [3, 3], [4, 3]],
        "up": [[0, 3], [1, 3], [2, 3]],
        "right": [[2, 3], [2, 4]],
        "left": [[2, 0], [2, 1], [2, 2], [2, 3]],
        "mixer bias": [],
    }


def test_parts_are_named_by_stage_block_and_source():
    model, images = random_model("sequencer2d_t_32")
    mixer = ("down", "up", "right", "left", "mixer bias", "mlp")
    assert contributions(model, images).parts == [
        Part(None, None, "stem"),
        *(Part(0, 0, source) for source in mixer),
        Part(1, None, "downsampling bias"),
        *(Part(1, block, source) for block in (0, 1) for source in mixer),
        Part(None, None, "norm and head bias"),
    ]


def test_a_direction_without_weights_contributes_nothing():
    model, images = random_model("sequencer2d_t_32")
    with torch.no_grad():
        model.stages[1].blocks[0].rnn_tokens.fc.weight[:, 8:16] = 0  # up
    found = contributions(model, images)
    assert found.values[:, found.parts.index(Part(1, 0, "up"))].abs().max() == 0
    assert found.values[:, found.parts.index(Part(1, 0, "down"))].abs().max() > 1e-3


@pytest.mark.parametrize("function", [evidence_maps, contributions])
def test_models_without_this_identity_are_refused(function):
    model, images = random_model("sequencer2d_t_32")
    with pytest.raises(ValueError, match=r"the model is in training mode; call eval\(\) first"):
        function(model.train(), images)
    model, images = random_model("sequencer2d_t_32", global_pool="max")
    with pytest.raises(ValueError, match="evidence and directions need average pooling, and global_pool is 'max'"):
        function(model, images)
    model.eval().reset_classifier(0, "avg")
    with pytest.raises(ValueError, match="the model has no classes: it returns features"):
        function(model, images)
    with pytest.raises(ValueError, match="evidence and directions are defined for Sequencer models, not for ResNet"):
        function(timm.create_model("resnet10t").eval(), images)


def test_removal_follows_the_order_of_the_map():
    """On a model that counts the bright quarters of an image, curves are known exactly."""

    class Counter(torch.nn.Module):
        def forward(self, x):
            count = torch.nn.functional.max_pool2d(x, 2).sum(dim=(1, 2, 3))
            return torch.stack([count.exp(), torch.ones_like(count)], dim=1).log()

    images = torch.tensor([[[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]])[None]
    maps = torch.tensor([[[4.0, 1.0], [2.0, 3.0]]])
    deletion, insertion = removal_curves(Counter(), images, maps, torch.tensor([0]), steps=4)
    sigmoid = torch.sigmoid(torch.tensor([0.0, 1.0, 2.0]))
    assert deletion[0].tolist() == pytest.approx(sigmoid[[2, 1, 0, 0, 0]].tolist())
    assert insertion[0].tolist() == pytest.approx(sigmoid[[0, 1, 2, 2, 2]].tolist())
    deletion, _ = removal_curves(Counter(), images, -maps, torch.tensor([0]), steps=4)
    assert deletion[0].tolist() == pytest.approx(sigmoid[[2, 2, 2, 1, 0]].tolist())
