"""Attacks, corrupted pieces and their errors."""

import numpy as np
import pytest
import torch
from torch import nn

from sequencer.analysis.corrupted_images import (
    CifarC,
    Clean,
    ImageNetC,
    StoredSplit,
    piece_loader,
    read_stored_labels,
    stored_corruptions,
)
from sequencer.analysis.pieces import Ledger
from sequencer.analysis.robustness import (
    ALEXNET_ERRORS,
    EPSILON,
    Normalised,
    attacked,
    classifier,
    corruption_errors,
    mean_corruption_error,
    predict_classes,
)
from sequencer.config import DataConfig, RequestError
from sequencer.data import MemorySplit, eval_transform
from tests.helpers import DIGITS

CPU = torch.device("cpu")
RGB = DataConfig(name="cifar10", num_classes=3, img_size=8, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
LETTERS = list("abc")


@pytest.fixture
def linear():
    """A linear classifier of three classes, of images `3 8 8`, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()


def images_and_labels():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    images[0, :, 0], images[1, :, 0] = 0, 1  # where the attack is cut off
    return images, torch.tensor([0, 1, 2, 0, 1])


def seen_by(model, images, labels, attack):
    """The images that an attack makes of others: the last input of the model."""
    inputs = []
    hook = model.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    with hook:
        attacked(model, attack, 0)(images.clone(), labels)
    return inputs


def test_fgsm_against_a_hand_computation(linear):
    pytest.importorskip("captum")
    model = Normalised(linear, RGB).double()
    images, labels = images_and_labels()
    # d loss / d logits = softmax - onehot; the normalisation divides by std
    normalised = (images - torch.tensor(RGB.mean).view(3, 1, 1)) / torch.tensor(RGB.std).view(3, 1, 1)
    delta = linear(normalised).softmax(dim=1) - torch.eye(3)[labels]
    gradient = (delta @ linear[1].weight).view(5, 3, 8, 8) / torch.tensor(RGB.std).view(3, 1, 1)
    expected = (images + gradient.sign() / 255).clamp(0, 1)
    torch.testing.assert_close(seen_by(model, images, labels, "fgsm")[-1], expected.detach(), rtol=0, atol=1e-12)


def test_gradients_of_surely_classified_images_are_followed(linear):
    pytest.importorskip("captum")
    with torch.no_grad():
        linear[1].bias += torch.tensor([30.0, 0, 0])  # gradients of the order of 1e-13
    model = Normalised(linear, RGB).double()
    images, labels = images_and_labels()
    change = seen_by(model, images, torch.zeros_like(labels), "fgsm")[-1] - images
    assert (change[2:].abs() > 0.99 * EPSILON).float().mean() > 0.9


def test_pgd_takes_five_steps_within_the_ball(linear):
    pytest.importorskip("captum")
    model = Normalised(linear, RGB).double()
    images, labels = images_and_labels()
    state = torch.random.get_rng_state()
    inputs = seen_by(model, images, labels, "pgd")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(inputs) == 6  # five gradients and the result
    start = inputs[0] - images
    assert 0 < start.abs().max() <= EPSILON
    assert start.std() > 0.4 * EPSILON  # uniform on an interval: 0.577 epsilon, less where it is cut off
    for made in inputs:
        assert (made - images).abs().max() <= EPSILON * (1 + 1e-9)
        assert made.min() >= 0
        assert made.max() <= 1
    assert torch.equal(seen_by(model, images, labels, "pgd")[-1], inputs[-1])

    def loss(x):
        return nn.functional.cross_entropy(model(x), labels).item()

    assert loss(inputs[-1]) > loss(images)


def test_attacked_recurrences():
    pytest.importorskip("captum")
    from sequencer.models import create_model
    from tests.helpers import ARGS

    model = Normalised(create_model("sequencer2d_t_8", num_classes=3, img_size=8, in_chans=3, **ARGS).eval(), RGB)
    nn.init.normal_(model.model.get_classifier().weight)
    images, labels = images_and_labels()
    for attack in ("fgsm", "pgd"):
        assert attacked(model, attack, 0)(images.float(), labels).shape == (5, 3)
    assert all(parameter.grad is None for parameter in model.parameters())


def made_split(side=8, number=6):
    data = np.random.RandomState(0).randint(256, size=(number, side, side, 3), dtype=np.uint8)
    return MemorySplit(data, np.arange(number) % 3, LETTERS, "made")


def test_clean_images_are_those_of_evaluation(linear):
    split = made_split()
    model = Normalised(linear.float(), RGB)
    found = predict_classes(classifier(model), piece_loader(split, Clean(RGB), 4, 0), CPU)
    transform = eval_transform(RGB)
    expected = linear(torch.stack([transform(split.load(i)) for i in range(6)])).argmax(dim=1)
    assert found.classes.tolist() == expected.tolist()
    assert found.indices.tolist() == list(range(6))
    assert found.hits == (expected == torch.arange(6) % 3).sum()


def test_predictions_among_some_classes(linear):
    loader = piece_loader(made_split(), Clean(RGB), 4, 0)
    model = Normalised(linear.float(), RGB)
    assert set(predict_classes(classifier(model), loader, CPU, classes=[1]).classes) == {1}
    everything = predict_classes(classifier(model), loader, CPU)
    same = predict_classes(classifier(model), loader, CPU, classes=[0, 1, 2])
    assert same.classes.tolist() == everything.classes.tolist()
    nan = predict_classes(lambda images, labels: model(images) * float("nan"), loader, CPU)
    assert set(nan.classes) == {-1}
    assert nan.hits == 0


@pytest.mark.parametrize("side", [8, 20])
def test_corrupted_images_do_not_depend_on_their_batch(side):
    split = made_split(side)
    pieces = {}
    for size in (1, 4):
        loader = piece_loader(split, CifarC(RGB, "gaussian_noise", 3, 0), size, 0)
        pieces[size] = torch.cat([images for images, _, _ in loader])
    assert torch.equal(pieces[1], pieces[4])
    assert pieces[1].shape == (6, 3, 8, 8)
    assert pieces[1].min() >= 0
    clean = torch.cat([images for images, _, _ in piece_loader(split, Clean(RGB), 6, 0)])
    assert 0.02 < (pieces[1] - clean).std() < 0.1


def test_the_digits_are_corrupted_as_grey_images():
    made = CifarC(DIGITS, "contrast", 5, 0)(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)), 0)
    assert made.shape == (1, 8, 8)
    assert made.std() < 0.1


def test_stored_arrays(tmp_path):
    arrays = np.random.RandomState(0).randint(256, size=(10, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 1] * 5, np.uint8)
    for name in ("snow", "zebra", "gaussian_noise"):
        np.save(tmp_path / f"{name}.npy", arrays)
    np.save(tmp_path / "labels.npy", labels)
    assert stored_corruptions(tmp_path) == ["gaussian_noise", "snow", "zebra"]
    read = read_stored_labels(tmp_path)
    split = StoredSplit(tmp_path / "snow.npy", read, 3, LETTERS)
    ((images, found, indices),) = piece_loader(split, Clean(RGB), 8, 0)
    expected = torch.from_numpy(arrays[4:6]).permute(0, 3, 1, 2) / 255
    assert torch.equal(images, expected)
    assert found.tolist() == [0, 1]
    assert indices.tolist() == [0, 1]
    assert len(StoredSplit(tmp_path / "snow.npy", read, 5, LETTERS, limit=1)) == 1
    for content, message in (
        (arrays[:5], r"it has 5 images, and labels\.npy has 10 labels"),
        (arrays.astype(float), r"it holds float64 of shape \(10, 8, 8, 3\), not uint8 N H W 3"),
    ):
        np.save(tmp_path / "snow.npy", content)
        with pytest.raises(RequestError, match=message):
            StoredSplit(tmp_path / "snow.npy", read, 1, LETTERS)
    with pytest.raises(RequestError, match=r"its labels go from 0 to 1, and it has 1 classes"):
        StoredSplit(tmp_path / "zebra.npy", read, 1, ["a"])


def test_corruption_errors_by_hand():
    top1 = {(name, severity): 0.5 for name in ALEXNET_ERRORS for severity in range(1, 6)}
    top1["fog", 1] = 1.0
    errors = corruption_errors(top1)
    assert errors["jpeg_compression"] == pytest.approx(0.5 / 0.6065)
    assert errors["fog"] == pytest.approx(0.4 / 0.819324)
    assert mean_corruption_error(errors) == pytest.approx(100 * np.mean(list(errors.values())))
    del top1["fog", 1]
    assert "fog" not in corruption_errors(top1)
    assert mean_corruption_error(corruption_errors(top1)) is None


def test_alexnet_has_an_mce_of_100():
    top1 = {(name, severity): 1 - error for name, error in ALEXNET_ERRORS.items() for severity in range(1, 6)}
    assert mean_corruption_error(corruption_errors(top1)) == pytest.approx(100)


@pytest.mark.parametrize(
    "name", ["impulse_noise", pytest.param("glass_blur", marks=pytest.mark.slow), "frost", "gaussian_noise"]
)
def test_corruptions_of_imagenet_c(name):
    """The first two draw from generators of their own, frost reads photographs."""
    pytest.importorskip("imagecorruptions")
    image = made_split(300, 1).load(0)
    state = np.random.get_state()[1].copy()
    made = [ImageNetC(RGB, name, severity, 0)(image, 3) for severity in (1, 2, 1)]
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], ImageNetC(RGB, name, 1, 1)(image, 3))
    assert not torch.equal(made[0], ImageNetC(RGB, name, 1, 0)(image, 4))


def test_a_ledger_computes_each_piece_once(tmp_path):
    path, model = tmp_path / "pieces.json", {"arch": "a", "weights": "1"}
    wanted = {name: {"seed": 0} for name in ("one", "two", "three")}
    done = []

    def compute(name, description):
        if name == "three" and len(done) == 2:
            raise KeyboardInterrupt
        done.append((name, description))
        return 10, 4, 1

    with pytest.raises(KeyboardInterrupt):
        Ledger(path, model).complete(wanted, compute)
    Ledger(path, model).complete(wanted, lambda name, description: (done.append((name, description)), (8, 2, 0))[1])
    assert done == [("one", "one (1 of 3)"), ("two", "two (2 of 3)"), ("three", "three (1 of 1)")]
    ledger = Ledger(path, model)
    assert {name: piece.top1 for name, piece in ledger.pieces.items()} == {"one": 0.4, "two": 0.4, "three": 0.25}
    assert ledger.missing(wanted | {"four": {}}) == ["four"]
    with pytest.raises(RequestError, match=r"holds other results: seed \(0 there, 1 here\)\nname another folder"):
        ledger.complete({"one": {"seed": 1}}, compute)
    with pytest.raises(RequestError, match=r"holds other results: weights \(1 there, 2 here\)"):
        Ledger(path, model | {"weights": "2"})
    path.write_text("{")
    with pytest.raises(RequestError, match=r"pieces\.json: invalid JSON.*\nremove it, or name another folder"):
        Ledger(path, model)
