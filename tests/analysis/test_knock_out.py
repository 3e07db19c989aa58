"""Knock-out of scan directions, compared with a forward hook on the closing linear layer."""

import re

import pytest
import torch
from scipy.stats import binomtest

from sequencer.analysis.knock_out import Place, check_scanning, direction_means, knock_out, knocked_out_logits
from sequencer.models import create_model

SMALL = {"layers": (1, 2), "patch_sizes": (2, 2), "embed_dims": (8, 16), "hidden_sizes": (4, 8)}


def small_model(name="sequencer2d_s", **kwargs):
    torch.manual_seed(0)
    args = SMALL | {"num_classes": 5, "img_size": 16} | kwargs
    model = create_model(name, **args).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def labelled(number=11, size=4):
    images = torch.randn(number, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = (images, torch.arange(number) % 5, torch.arange(number))
    return list(zip(*(part.split(size) for part in parts), strict=True)), images


@pytest.mark.parametrize(
    ("kwargs", "directions"),
    [
        ({}, "down up right left"),
        ({"bidirectional": False}, "down right"),
        ({"union": "vertical"}, "down up"),
        ({"union": "horizontal", "num_rnn_layers": 2}, "right left"),
        ({"cell": "gru", "with_fc": False, "hidden_sizes": (2, 4)}, "down up right left"),
    ],
)
def test_logits_equal_those_with_a_forward_hook(kwargs, directions):
    model = small_model(**kwargs)
    batches, images = labelled()
    means = direction_means(model, (images for images, *_ in batches))
    names = directions.split()
    blocks = [(0, 0), (1, 0), (1, 1)]
    assert list(means) == [Place(*block, name) for block in blocks for name in names]
    *found, (_, whole) = knocked_out_logits(model, images, means)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(images), rtol=0, atol=1e-9)
    for place, logits in found:
        fc = model.stages[place.stage].blocks[place.block].rnn_tokens.fc
        size = (SMALL | kwargs)["hidden_sizes"][place.stage]
        start = names.index(place.direction) * size

        def replace(module, inputs, start=start, size=size):
            y = inputs[0].clone()
            y[..., start : start + size] = y[..., start : start + size].mean(dim=0)
            return (y,)

        hook = fc.register_forward_pre_hook(replace)
        with torch.no_grad():
            expected = model(images)
        hook.remove()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        assert (logits - model(images)).abs().max() > 1e-3


def test_union_of_sums():
    """The mean of one direction replaces its output in the sum of both axes."""
    model = small_model(union="add", layers=(1,), patch_sizes=(2,), embed_dims=(8,), hidden_sizes=(4,))
    _, images = labelled(6)
    mixer = model.stages[0].blocks[0].rnn_tokens
    with torch.no_grad():
        x = model.stages[0].blocks[0].norm1(model.forward_embed(images))
        rows = mixer.rnn_h(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        columns = mixer.rnn_v(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
        left = rows[..., 4:].mean(dim=0).expand_as(rows[..., 4:])
        update = mixer.fc(columns + torch.cat([rows[..., :4], left], dim=-1))
        hook = mixer.register_forward_hook(lambda *_: update)
        expected = model(images)
        hook.remove()
    found = dict(knocked_out_logits(model, images, direction_means(model, [images])))
    torch.testing.assert_close(found[Place(0, 0, "left")], expected, rtol=0, atol=1e-9)


def test_one_sequence():
    model = small_model("v_sequencer_s", hidden_sizes=(4, 8))
    batches, _ = labelled()
    found = knock_out(model, batches)
    assert {place.direction for place in found.changes} == {"forward", "backward"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_without_outgoing_weights_changes_nothing(dtype):
    model = small_model().to(dtype)
    batches, images = labelled()
    batches = [(images.to(dtype), labels, indices) for images, labels, indices in batches]
    place = Place(1, 0, "up")
    with torch.no_grad():
        model.stages[1].blocks[0].rnn_tokens.fc.weight[:, 8:16] = 0
    means = direction_means(model, [images.to(dtype)])
    for images, *_ in batches:
        with torch.inference_mode():
            logits = model(images)
        found = dict(knocked_out_logits(model, images, means))
        assert torch.equal(found[place], logits)
        assert not torch.equal(found[Place(1, 0, "down")], logits)
    change = knock_out(model, batches).changes[place]
    assert (change.comparison.only_first, change.comparison.only_second) == (0, 0)
    assert (change.comparison.difference.value, change.comparison.p_value, change.p_holm) == (0, 1, 1)


def test_changes_are_those_of_the_predictions():
    model = small_model()
    batches, images = labelled(40)
    with torch.no_grad():
        for stage in model.stages:
            for block in stage.blocks:
                block.rnn_tokens.fc.weight *= 10  # so that predictions need the directions
        model.head.fc.bias.zero_()
        predicted = model(images).argmax(1)
    labels = predicted.where(torch.arange(40) % 3 > 0, 4)
    batches = [(x, labels[indices], indices) for x, _, indices in batches]
    clean = predicted == labels
    found = knock_out(model, batches)
    assert found.images == 40
    assert found.clean.value == pytest.approx(clean.float().mean().item())
    changed = dict(knocked_out_logits(model, images, direction_means(model, [images])))
    assert [*found.changes, None] == list(changed)
    discordant = 0
    for place, change in found.changes.items():
        right = changed[place].argmax(1) == labels
        wins, losses = int((right & ~clean).sum()), int((clean & ~right).sum())
        assert change.top1.value == pytest.approx(right.float().mean().item())
        assert (change.comparison.only_first, change.comparison.only_second) == (wins, losses)
        assert change.comparison.difference.value == pytest.approx((wins - losses) / 40)
        p_value = binomtest(wins, wins + losses).pvalue if wins + losses else 1
        assert change.comparison.p_value == pytest.approx(p_value)
        assert p_value <= change.p_holm <= 1
        discordant += wins + losses
    assert discordant


def test_batches_are_let_go():
    """The images of a batch are not kept: at most two batches are alive while ten are read."""
    import weakref

    model = small_model(layers=(1, 1))
    alive, most = [], []

    class Batches:
        def __iter__(self):
            for seed in range(10):
                images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                alive.append(weakref.ref(images))
                most.append(sum(reference() is not None for reference in alive))
                yield images, torch.tensor([0, 1]), torch.tensor([0, 1])
                del images

    assert knock_out(model, Batches()).images == 20
    assert len(most) == 20
    assert max(most) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.train(), "the model is in training mode; call eval() first"),
        (lambda model: model.reset_classifier(0), "the model has no classes: it returns features"),
        (
            lambda model: setattr(model.stages[0].blocks[0], "rnn_tokens", torch.nn.Identity()),
            "knock-out needs scan directions, and Identity has none",
        ),
    ],
)
def test_refused_models(change, message):
    model = small_model()
    change(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_scanning(model)
    with pytest.raises(ValueError, match=r"^knock-out is defined for Sequencer models, not for Linear$"):
        check_scanning(torch.nn.Linear(1, 1))
