"""The size of every registered model, and timm's interface."""

from copy import deepcopy

import pytest
import timm
import torch
from timm.models import group_parameters
from torch._subclasses import FakeTensorMode

from sequencer.variants import VARIANTS

S = 27_651_688
PARAMETERS = {  # at 1,000 classes and three channels; counted on models built by the code of the paper
    "sequencer2d_s": S,
    "sequencer2d_m": 38_307_688,
    "sequencer2d_l": 54_298_216,
    "sequencer2d_s_392": S,
    "sequencer2d_m_392": 38_307_688,
    "sequencer2d_l_392": 54_298_216,
    "sequencer2d_l_d4_3x": 96_252_392,
    "sequencer2d_s_unidirectional": 20_991_592,
    "sequencer2d_s_add": 26_545_768,
    "sequencer2d_s_h2x": 45_395_560,
    "sequencer2d_s_without_fc": 25_433_704,
    "sequencer2d_vertical": 27_645_544,
    "sequencer2d_s_horizontal": 27_645_544,
    "gru_sequencer2d_s": 24_874_600,
    "rnn_sequencer2d_s": 19_320_424,
    "v_sequencer_s": 33_016_552,
    "v_sequencer_s_h": 27_645_544,
    "v_sequencer_s_pe": 33_114_856,
    # models that the paper does not have, from S: four directions in 4 blocks with D = 48 and in 14 blocks with D = 96
    "indylstm_sequencer2d_s": S
    - 4 * (4 * 4 * 48**2 + 14 * 4 * 96**2),  # D x D weights become vectors, one bias is dropped
    "peephole_sequencer2d_s": S + 4 * (4 * 3 * 48 + 14 * 3 * 96),
    "lstm1997_sequencer2d_s": S  # rows of the forget gate are dropped, and the second bias
    - 4 * (4 * (48 * (192 + 48 + 2) + 3 * 48) + 14 * (96 * (384 + 96 + 2) + 3 * 96)),
}
SMALL = {"sequencer2d_p4_32": 32, "sequencer2d_t_8": 8, "sequencer2d_t_32": 32, "sequencer2d_t_64": 64}
STRIDES = {
    "sequencer2d_p4_32": (4,),
    "sequencer2d_t_8": (1, 2),
    "sequencer2d_t_32": (2, 4),
    "sequencer2d_t_64": (4, 8),
} | dict.fromkeys(("v_sequencer_s", "v_sequencer_s_pe"), (14, 14, 14, 14))


def distinct(*ignored: str) -> list[str]:
    """Returns one name of each architecture, whatever the image size and the arguments in `ignored`."""
    found: dict[str, str] = {}
    for name, variant in VARIANTS.items():
        args = {key: value for key, value in variant.args.items() if key not in ignored}
        found.setdefault(f"{variant.model} {args}", name)
    return list(found.values())


def strides(name: str) -> tuple[int, ...]:
    return STRIDES.get(name, (7, 14, 14, 14))


def narrow(name: str) -> dict[str, list[int]]:
    """Returns a quarter of the model's widths, so that building it takes little time."""
    return {key: [width // 4 for width in VARIANTS[name].args[key]] for key in ("embed_dims", "hidden_sizes")}


def create(name: str, **kwargs) -> torch.nn.Module:
    """Builds a narrow model with one block in each stage."""
    return timm.create_model(name, **{"layers": (1,) * len(strides(name))} | narrow(name) | kwargs)


def build(name: str, **kwargs) -> torch.nn.Module:
    """Builds a narrow model with one block in each stage and ten classes, in eval mode."""
    torch.manual_seed(0)
    model = create(name, num_classes=10, **kwargs).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    return model


def image(name: str, in_chans: int | None = None, batch: int = 2) -> torch.Tensor:
    """Draws images of the smallest size at which every recurrence has at least two steps, wider than high."""
    return torch.randn(batch, in_chans or VARIANTS[name].in_chans, 2 * strides(name)[-1], 3 * strides(name)[-1])


ARCHITECTURES = distinct("layers")  # `create` builds one block in each stage


def test_every_variant_is_tested():
    assert VARIANTS.keys() == PARAMETERS.keys() | SMALL.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert timm.get_pretrained_cfg(name).input_size == (3, *[392 if "392" in name else 224] * 2)


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name):
    model = timm.create_model(name, num_classes=10)
    size, parameters = SMALL[name], sum(parameter.numel() for parameter in model.parameters())
    assert model.pretrained_cfg["input_size"][1:] == (size, size)
    assert 100_000 < parameters < 2_500_000
    assert model(torch.randn(2, model.in_chans, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", distinct())
def test_smallest_size_forward_and_backward(name):
    """At full depth, with an image of one total stride, so that the last stage has a single token."""
    model = build(name, layers=VARIANTS[name].args["layers"]).train()
    assert model.total_stride == strides(name)[-1]
    logits = model(torch.randn(1, model.in_chans, model.total_stride, model.total_stride))
    assert logits.shape == (1, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features(name):
    model, x = build(name), image(name)
    dims = narrow(name)["embed_dims"]
    shapes = [(2, x.shape[2] // s, x.shape[3] // s, dim) for s, dim in zip(strides(name), dims, strict=True)]
    features = model.forward_features(x)
    assert features.shape == shapes[-1]
    assert model.num_features == model.head_hidden_size == dims[-1]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == list(
        zip(dims, strides(name), strict=True)
    )
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((1, 2)))
    torch.testing.assert_close(model.forward_head(features), model.head.fc(pooled))

    final, maps = model.forward_intermediates(x, output_fmt="NHWC")
    assert [m.shape for m in maps] == shapes
    assert torch.equal(final, features)
    assert torch.equal(model.norm(maps[-1]), features)
    normed = model.forward_intermediates(x, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(normed[-1], features)
    assert all(map(torch.equal, normed[:-1], maps[:-1]))  # the last one alone is normed
    channels_first = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(channels_first, maps, strict=True))
    (last,) = model.forward_intermediates(x, 1, intermediates_only=True, output_fmt="NHWC")
    assert torch.equal(last, maps[-1])
    if len(maps) > 1:
        early, (first,) = model.forward_intermediates(x, [-2], stop_early=True, output_fmt="NHWC")
        assert torch.equal(early, maps[-2])
        assert torch.equal(first, maps[-2])
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC, not 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_only(name):
    reference, x = build(name), image(name)
    model = create(name, features_only=True).eval()
    assert model.feature_info.channels() == narrow(name)["embed_dims"]
    assert model.feature_info.reduction() == list(strides(name))
    reference.norm, reference.head = torch.nn.Identity(), torch.nn.Identity()
    model.model.load_state_dict(reference.state_dict())
    expected = reference.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))

    first = create(name, features_only=True, out_indices=[0])
    assert len(first.model.stages) == 1
    assert first.model.num_features == narrow(name)["embed_dims"][0]
    assert [m.shape[-1] for m in first(x)] == first.feature_info.channels()


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook"])
@pytest.mark.parametrize("name", ["sequencer2d_s", "v_sequencer_s"])
def test_features_of_a_model_that_timm_rebuilds(name, feature_cls):
    reference = create(name, features_only=True).eval()
    model = create(name, features_only=True, feature_cls=feature_cls).eval()
    weights = {key.removeprefix("model.").replace("stages.", "stages_"): value
               for key, value in reference.state_dict().items()}  # fmt: skip
    assert not model.load_state_dict(weights, strict=False).missing_keys
    x = image(name)
    outputs = model(x)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(x), strict=True))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook"])
def test_a_position_embedding_is_not_left_out_of_features(feature_cls):
    """timm rebuilds the model from its child modules, and the embedding is a parameter."""
    with pytest.raises(ValueError, match=f"feature_cls='{feature_cls}' leaves out ape and shuffle"):
        timm.create_model("v_sequencer_s_pe", features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_states_the_token_map(name):
    model = create(name)
    with torch.no_grad():
        tokens = model.forward_features(torch.zeros(1, *model.pretrained_cfg["input_size"]))
    assert tokens.shape[1:3] == model.pretrained_cfg["pool_size"]


@pytest.mark.parametrize("name", ["sequencer2d_t_8", "v_sequencer_s_pe"])
def test_device_and_dtype(name):
    """A model is built on a device and in a dtype, and a new head joins it there, in the model's mode."""
    model = timm.create_model(name, device="meta", dtype=torch.float64)
    assert {(tensor.device.type, tensor.dtype) for tensor in model.state_dict().values()} == {("meta", torch.float64)}
    model = build(name).bfloat16()
    model.reset_classifier(7, "max")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


def test_models_are_built_of_fake_tensors():
    with FakeTensorMode():
        model = timm.create_model("sequencer2d_t_8", num_classes=5)
        with torch.no_grad():
            assert model(torch.randn(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reset_classifier(name):
    model, x = build(name), image(name)
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert torch.equal(model(x), torch.zeros(2, 7))  # a new head is initialised to zero
    assert model.get_classifier() is model.head.fc
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.mean((1, 2)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(5, "max")
    assert model.global_pool == "max"
    assert model(x).shape == (2, 5)

    headless = create(name, num_classes=0, global_pool="")
    assert headless(x).shape == features.shape


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_and_weight_decay(name):
    model = build(name)
    names = [parameter for parameter, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sorted(name for group in groups.values() for name in group) == sorted(names)
        layer = group_parameters(model, model.group_matcher(coarse), reverse=True)
        stages = len(model.stages)
        assert layer["stem.proj.weight"] == 0
        per_stage = [{layer[n] for n in names if n.startswith(f"stages.{i}.blocks")} for i in range(stages)]
        assert per_stage == [{i + 1} for i in range(stages)]
        assert layer["norm.weight"] == layer["head.fc.weight"] - 1 == stages
    assert model.no_weight_decay() & set(names) == ({"absolute_pos_embed"} if name == "v_sequencer_s_pe" else set())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing(name):
    model = build(name, drop_path_rate=0.3).train()
    other = deepcopy(model)
    other.set_grad_checkpointing()
    x, upstream = image(name), torch.randn(2, 10)
    gradients = []
    for m in (model, other):
        torch.manual_seed(1)
        logits = m(x)
        gradients.append([logits, *torch.autograd.grad(logits, list(m.parameters()), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    other.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in other.stages)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_channels_and_batches(name):
    model = build(name, in_chans=2)
    x = image(name, in_chans=2, batch=3)
    logits = model(x)
    assert logits.shape == (3, 10)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(deepcopy(model)(x), logits)
    assert model(x[:0]).shape == (0, 10)
