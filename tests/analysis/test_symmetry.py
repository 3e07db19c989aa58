"""Changes of images, and the accuracy under them."""

import numpy as np
import pytest
import timm
import torch

from sequencer.analysis.symmetry import (
    CONDITIONS,
    PATTERNS,
    SHARES,
    TURNS,
    Condition,
    change,
    cover,
    cover_orders,
    salience,
    shuffle,
    symmetry,
)
from sequencer.models import create_model

SMALL = {"layers": (1, 2), "patch_sizes": (2, 2), "embed_dims": (8, 16), "hidden_sizes": (4, 8)}


def small_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = create_model("sequencer2d_s", num_classes=5, **SMALL | {"img_size": 28} | kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def images_of(number=3, side=28, seed=0):
    return torch.randn(number, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def transposed(model):
    """The same model with rows and columns exchanged: recurrences, their part of the linear layer, and convolutions."""
    other = small_model(seed=1)
    state = {}
    for name, value in model.state_dict().items():
        if "rnn_v" in name or "rnn_h" in name:
            name = name.replace("rnn_v", "?").replace("rnn_h", "rnn_v").replace("?", "rnn_h")
        elif name.endswith("rnn_tokens.fc.weight"):
            value = value.roll(value.shape[1] // 2, dims=1)  # [down, up, right, left] to [right, left, down, up]
        elif value.ndim == 4:
            value = value.transpose(-2, -1)
        state[name] = value
    other.load_state_dict(state)
    return other


def test_a_transposed_model_on_transposed_images_gives_equal_logits():
    model, images = small_model(), images_of()
    indices = torch.arange(3)
    turned = change(images, indices, Condition("turn", "transposition"), {})
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(transposed(model)(turned), expected, rtol=0, atol=1e-9)
        assert (model(turned) - expected).abs().max() > 1e-2
    labels = expected.argmax(1)
    found = symmetry(transposed(model), [(turned, labels, indices)])
    assert found.clean.value == 1
    own = symmetry(model, [(images, labels, indices)])
    for name in ("transposition", "turn by 180°"):
        condition = Condition("turn", name)
        assert found.changes[condition] == own.changes[condition]


@pytest.mark.parametrize("name", TURNS)
def test_turns(name):
    images = images_of()
    times = 4 if name in ("turn by 90°", "turn by 270°") else 2
    turn = TURNS[name]
    x = turn(images)
    assert not torch.equal(x, images)
    for _ in range(times - 1):
        x = turn(x)
    assert torch.equal(x, images)
    by_numpy = {
        "horizontal flip": np.fliplr,
        "vertical flip": np.flipud,
        "transposition": np.transpose,
        "turn by 90°": np.rot90,
        "turn by 180°": lambda x: np.rot90(x, 2),
        "turn by 270°": lambda x: np.rot90(x, 3),
    }
    assert np.array_equal(turn(images)[0, 0].numpy(), by_numpy[name](images[0, 0].numpy()))


@pytest.mark.parametrize(("side", "pixels"), [(32, {1 / 16: 2, 1 / 8: 4, 1 / 4: 8}), (8, {1 / 16: 1, 1 / 8: 1})])
def test_shifts_are_circular(side, pixels):
    images = images_of(side=side)
    for share, moved in pixels.items():
        along_rows = change(images, torch.arange(3), Condition("shift along rows", share), {})
        assert torch.equal(along_rows[..., :, moved:], images[..., :, :-moved])
        assert torch.equal(along_rows[..., :, :moved], images[..., :, -moved:])
        along_columns = change(images, torch.arange(3), Condition("shift along columns", share), {})
        assert torch.equal(along_columns[..., moved:, :], images[..., :-moved, :])


@pytest.mark.parametrize(("side", "patches"), [(28, 14), (8, 8), (56, 14)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_covered_share_is_exact(pattern, side, patches):
    model = small_model(img_size=side)
    images = images_of(side=side)
    order = cover_orders(model, images, torch.arange(3))[pattern]
    assert order.shape == (3, patches, patches)
    assert torch.equal(order.flatten(1).sort(dim=1).values[0], torch.arange(patches**2))
    before = torch.zeros(3, side, side, dtype=torch.bool)
    for share in SHARES:
        covered = cover(images, order, share)
        zero = (covered == 0).all(dim=1)
        expected = round(share * patches**2) * (side // patches) ** 2
        assert zero.sum(dim=(1, 2)).tolist() == [expected] * 3
        assert torch.equal(covered.masked_select(~zero[:, None]), images.masked_select(~zero[:, None]))
        assert (zero | ~before).all()
        before = zero


def test_lines_are_covered_whole():
    images = images_of()
    for pattern, axis in (("rows", 2), ("columns", 1)):
        order = cover_orders(small_model(), images, torch.arange(3))[pattern]
        zero = (cover(images, order, 0.5)[:, 0] == 0).all(dim=axis)
        assert zero.sum(dim=1).tolist() == [14] * 3
        assert len({tuple(row) for row in zero.tolist()}) == 3


def test_random_changes_depend_on_the_index_alone():
    images, model = images_of(6), small_model()
    for pattern in PATTERNS[:3]:
        together = cover_orders(model, images, torch.arange(6))[pattern]
        alone = [cover_orders(model, images[i : i + 1], torch.tensor([i]))[pattern][0] for i in range(6)]
        assert torch.equal(together, torch.stack(alone))
        assert not torch.equal(together[0], together[1])
    together = shuffle(images, torch.arange(6), 4)
    assert torch.equal(together[2:3], shuffle(images[2:3], torch.tensor([2]), 4))


def test_shuffling_permutes_patches():
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    for number in (2, 4, 8):
        found = shuffle(images, torch.tensor([3]), number)
        side = 8 // number
        assert not torch.equal(found, images)
        patches = [x.unfold(2, side, side).unfold(3, side, side).reshape(-1, side**2) for x in (images, found)]
        assert {tuple(row) for row in patches[0].tolist()} == {tuple(row) for row in patches[1].tolist()}
    odd = torch.randn(2, 3, 11, 9)
    found = shuffle(odd, torch.tensor([0, 1]), 4)
    assert torch.equal(found[..., 8:, :], odd[..., 8:, :])
    assert torch.equal(found[..., 8:], odd[..., 8:])
    assert not torch.equal(found, odd)


def test_salience_of_a_linear_model_is_what_covering_takes_from_the_logit():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 28 * 28, 5)).double().eval()
    images = images_of(2)
    logits, classes = model(images).max(dim=1)
    values = salience(model, images)
    assert values.shape == (2, 14, 14)
    covered = images.clone()
    covered[:, :, 6:8, 10:12] = 0
    fall = logits - model(covered)[torch.arange(2), classes]
    torch.testing.assert_close(values[:, 3, 5], fall, rtol=0, atol=1e-10)
    first = cover_orders(model, images, torch.arange(2))["salient"].flatten(1).argmin(1)
    assert first.tolist() == values.flatten(1).argmax(1).tolist()
    last = cover_orders(model, images, torch.arange(2))["least salient"].flatten(1).argmin(1)
    assert last.tolist() == values.flatten(1).argmin(1).tolist()


@pytest.mark.parametrize("name", [None, pytest.param("resnet10t", marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_batch_size(name):
    """Covers any model of timm too; its parameters keep no gradient."""
    torch.manual_seed(0)
    model = small_model() if name is None else timm.create_model(name, num_classes=5).double().eval()
    images, labels, indices = images_of(9), torch.arange(9) % 5, torch.arange(9)
    whole = symmetry(model, [(images, labels, indices)])
    parts = symmetry(model, list(zip(images.split(2), labels.split(2), indices.split(2), strict=True)))
    assert whole == parts
    assert tuple(whole.changes) == CONDITIONS
    assert len(CONDITIONS) == 6 + 6 + 20 + 3
    assert all(parameter.grad is None for parameter in model.parameters())
