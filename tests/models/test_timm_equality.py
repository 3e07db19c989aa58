"""sequencer2d_s, _m and _l are equivalent to timm's own models of these names."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import sequencer as theirs

import sequencer
from sequencer.models import Sequencer2d

NAMES = ("sequencer2d_s", "sequencer2d_m", "sequencer2d_l")


@pytest.mark.parametrize(("name", "size"), [*((name, (56, 28)) for name in NAMES), ("sequencer2d_s", (34, 96))])
def test_logits_and_gradients(name, size, randomise):
    with torch.device("meta"):  # without the first weights, which take longer than the rest
        peer, ours = getattr(theirs, name)(num_classes=10), timm.create_model(name, num_classes=10)
    randomise(peer.to_empty(device="cpu"))
    assert isinstance(peer, theirs.Sequencer2d)
    assert isinstance(ours, Sequencer2d)
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.load_state_dict(peer.state_dict(), assign=True)

    x, upstream = torch.randn(2, 3, *size), torch.randn(2, 10)
    expected, actual = peer(x), ours(x)
    assert 0.3 < expected.std() < 3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    gradients = zip(
        torch.autograd.grad(actual, list(ours.parameters()), upstream),
        torch.autograd.grad(expected, list(peer.parameters()), upstream),
        strict=True,
    )
    for (parameter, _), (a, b) in zip(ours.named_parameters(), gradients, strict=True):
        assert b.norm() > 0, parameter
        assert (a - b).norm() <= 1e-4 * b.norm(), parameter


# M and L differ from S in the number of blocks only
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_same_initial_distribution(name):
    """Each tensor has the same mean and standard deviation, up to sampling error; constants are equal."""
    torch.manual_seed(0)
    ours, peer = timm.create_model(name).state_dict(), getattr(theirs, name)().state_dict()
    for key, tensor in peer.items():
        error = tensor.std() / tensor.numel() ** 0.5  # standard error of the mean, close to that of the deviation
        assert (ours[key].mean() - tensor.mean()).abs() <= 8 * error, key
        assert (ours[key].std() - tensor.std()).abs() <= 8 * error, key


def test_timms_three_names_are_replaced():
    for name in NAMES:
        assert timm.model_entrypoint(name).__module__ == "sequencer.variants"
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id == f"timm/{name}.in1k"
        assert cfg.tag == "in1k"
        assert cfg.license == "apache-2.0"
        assert cfg.paper_ids == "arXiv:2205.01972"
        assert cfg.num_classes == 1000
        peer = theirs.default_cfgs[name].default
        for field in ("input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "classifier"):
            assert getattr(cfg, field) == getattr(peer, field), field
    assert timm.list_pretrained("*sequencer*") == sorted(f"{name}.in1k" for name in NAMES)
    assert set(timm.list_models("*sequencer*")) == sequencer.variants.VARIANTS.keys()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("num_classes", [1000, 7])
def test_pretrained(tmp_path, randomise, suffix, num_classes):
    """Weights of timm's own model load with `pretrained=True`, without the head where the classes differ."""
    layers = (1, 1, 1, 1)
    peer = randomise(theirs.sequencer2d_s(layers=layers))
    file = tmp_path / f"model.{suffix}"
    save_file(peer.state_dict(), file) if suffix == "safetensors" else torch.save(peer.state_dict(), file)
    overlay = {"file": str(file)}
    model = timm.create_model(
        "sequencer2d_s", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, layers=layers
    )
    x = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(model.forward_features(x), peer.forward_features(x), rtol=1e-5, atol=1e-5)
    assert model(x).shape == (1, num_classes)
    assert torch.equal(model.head.fc.weight, peer.head.fc.weight) == (num_classes == 1000)
