"""Arguments of architectures that a file names: none loads weights, and none takes memory that the file has not."""

from typing import Any

import pytest
import timm
import torch

from sequencer.models import CheckpointError, create_model, load_model
from sequencer.models.arguments import ArgumentError, check_model_args
from sequencer.variants import VARIANTS
from tests.helpers import ARGS, edit, refused

HUGE = 2**20  # the largest integer that is accepted
LOADING = ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"]
LOADING += ["exportable", "no_jit", "pretrained_strict", "pretrained_filter_fn", "features_only", "pruned", "device"]


@pytest.mark.parametrize("name", [*LOADING, "file", "url", "token_mixer", "self", "backbone"])
def test_an_argument_that_is_not_of_the_architecture(folder, name):
    edit(folder, model_args=ARGS | {name: "/etc/passwd"})
    refused(folder, f"config.json: model_args.{name}: not an argument of the architecture sequencer2d_t_8")


@pytest.mark.parametrize("name", LOADING)
def test_no_architecture_of_timm_takes_arguments_that_load(name):
    with pytest.raises(CheckpointError, match=f"{name}: not an argument of the architecture resnet18"):
        create_model("resnet18.a1_in1k", **{name: "/etc/passwd"}) if name != "pretrained" else _from_file(name)


def _from_file(name: str) -> None:
    """Checks the argument as that of a file, where it does not mean the argument of `create_model`."""
    try:
        check_model_args("resnet18.a1_in1k", {name: True})
    except ArgumentError as error:
        raise CheckpointError(str(error)) from error


def test_arguments_of_the_architecture_are_accepted():
    for name, variant in VARIANTS.items():
        check_model_args(name, variant.args | {"drop_path_rate": 0.1, "num_classes": 3, "img_size": 8})
    check_model_args("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg", "img_size": [32, 32]})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"layers": [10**9]}, "layers.0: an integer beyond 1,048,576"),
        ({"embed_dims": [16] * 10_001}, "embed_dims: the arguments have more than 10,000 values"),
        ({"drop_rate": float("nan")}, "drop_rate: not a finite number"),
        ({"a\n\x1b[31m" * 100: 1}, "'a\\n\\x1b[31m"),
        ({"cel": "gru"}, "cel: not an argument of the architecture sequencer2d_t_8; did you mean cell?"),
        ({"cell": "x" * 1001}, "cell: text of more than 1,000 characters"),
    ],
)
def test_extreme_values_of_arguments(folder, args, said):
    edit(folder, model_args=ARGS | args)
    refused(folder, f"config.json: model_args.{said}")


def test_a_list_of_itself_as_an_argument():
    endless: list[Any] = []
    endless += [endless, endless]
    with pytest.raises(ArgumentError, match="more than 10,000 values"):
        check_model_args("sequencer2d_s", {"layers": endless})


@pytest.mark.parametrize(
    "args",
    [
        {"embed_dims": [HUGE]},
        {"embed_dims": [200_000]},
        {"hidden_sizes": [HUGE]},
        {"layers": [HUGE]},
        {"mlp_ratios": [1e9]},
        {"num_rnn_layers": HUGE, "hidden_sizes": [4096]},
    ],
)
def test_a_model_that_is_larger_than_its_weights_takes_no_memory(folder, args, monkeypatch):
    built: list[torch.device] = []
    create = timm.create_model

    def record(*arguments: Any, **keywords: Any) -> torch.nn.Module:
        built.append(torch.get_default_device())
        return create(*arguments, **keywords)

    monkeypatch.setattr("timm.create_model", record)
    edit(folder, model_args=ARGS | args)
    message = refused(folder / ".." / "model")
    assert "a model far larger than the file" in message or "cannot be built" in message
    assert set(built) == {torch.device("meta")} or "cannot be built" in message


def test_an_architecture_that_is_larger_than_its_weights(folder):
    edit(folder, architecture="vit_giant_patch14_224", model_args={}, label_names=None)
    refused(folder, "a model far larger than the file")


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "local-dir:folder", "resnet18.hf-hub:a/b", "resnet18.local"])
def test_only_names_of_timms_registry_are_models(name):
    with pytest.raises(CheckpointError):
        load_model(name)
    with pytest.raises(CheckpointError):
        create_model(name)
