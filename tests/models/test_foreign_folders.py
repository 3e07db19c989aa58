"""Model folders that were damaged, or written to mislead, are refused with an error that names file and entry."""

import json
import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from sequencer.models import CheckpointError, load_model
from sequencer.models.declarations import Preprocessing
from tests.helpers import ARGS, edit, refused

ENTRIES = {
    "architecture": (5, "architecture: input should be a valid string"),
    "num_classes": ("10", "num_classes: input should be a valid integer"),
    "label_names": (5, "label_names: input should be"),
    "pretrained_cfg": ([], "pretrained_cfg: input should be"),
    "slot": ("best", "slot: input should be 'raw' or 'ema'"),
    "config": ([1], "config: input should be a valid dictionary"),
    "metrics": (1, "metrics: input should be a valid dictionary"),
    "versions": ("2", "versions: input should be a valid dictionary"),
    "averaged": (7, "averaged: input should be a valid list"),
    "model_args": ([1], "model_args: input should be a valid dictionary"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_of_a_wrong_type(folder, entry):
    value, said = ENTRIES[entry]
    edit(folder, **{entry: value})
    refused(folder, "config.json", said)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"label_names": list("abc")}, "label_names: 3 names for 10 classes"),
        ({"label_names": [*"012345678", 9]}, "label_names.9: input should be a valid string"),
        ({"num_classes": -1}, "num_classes: input should be greater than or equal to 0"),
        ({"num_classes": 10**12}, "num_classes: input should be less than or equal to"),
        ({"num_classes": 7, "label_names": None}, "num_classes: 7, but model_args has another number of classes"),
        ({"num_classes": 7, "label_names": None, "model_args": ARGS}, "does not fit Sequencer2d"),
        ({"architecture": "sequencer2d"}, "unknown model sequencer2d"),
        ({"architecture": "hf-hub:timm/resnet18"}, "architecture: string should match pattern"),
        ({"architecture": "a\nb"}, "architecture: string should match pattern"),
        ({"config": {"data": 5}}, "config: its entry data should be a dictionary"),
    ],
)
def test_an_entry_that_contradicts_the_model(folder, entries, said):
    edit(folder, **entries)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("input_size", [1, 8], "input_size"),
        ("input_size", [1, 8, 10**9], "input_size: give 1 to 1024 channels"),
        ("input_size", [0, 8, 8], "input_size: give 1 to 1024 channels"),
        ("mean", "0.5", "mean: 'str' instances are not allowed"),
        ("mean", [], "mean: 0 values for images of 1 channels"),
        ("std", [0.0], "std.0: input should be greater than 0"),
        ("std", [float("inf")], "std.0: input should be a finite number"),
        ("crop_pct", 1e-9, "crop_pct: input should be greater than or equal to 0.01"),
        ("interpolation", "sinc", "interpolation: input should be 'nearest'"),
    ],
)
def test_preprocessing_that_cannot_be_applied(folder, entry, value, said):
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edit(folder, pretrained_cfg=cfg | {entry: value})
    refused(folder, "config.json: pretrained_cfg", said)


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"5", b"null", b"\xff", b"[" * 100_000, b"1" * 10_000])
def test_a_configuration_that_is_none(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


def test_optional_entries_may_be_missing(folder):
    config = json.loads((folder / "config.json").read_text())
    required = {name: config[name] for name in ("architecture", "num_classes", "model_args")}
    cfg = {name: config["pretrained_cfg"][name] for name in ("input_size", "mean", "std")}
    (folder / "config.json").write_text(json.dumps(required | {"pretrained_cfg": cfg}))
    loaded = load_model(folder)
    assert (loaded.slot, loaded.class_names, loaded.about, loaded.data) == ("raw", None, {}, None)
    assert (loaded.pretrained_cfg["crop_pct"], loaded.pretrained_cfg["interpolation"]) == (0.875, "bicubic")


def test_class_names_with_bytes_that_are_not_utf_8(folder):
    names = [os.fsdecode(b"caf\xe9"), *"123456789"]
    edit(folder, label_names=names)
    assert load_model(folder).class_names == tuple(names)


def test_every_preprocessing_of_timm_is_accepted():
    for name in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(name).to_dict()
        Preprocessing.model_validate({key: value for key, value in cfg.items() if value is not None}, strict=True)


def test_a_folder_whose_weights_are_no_regular_file(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "no checkpoint at")


def test_weights_of_another_kind_in_a_model_folder(folder):
    weights = load_model(folder).model.state_dict()
    save_file(weights | {"norm.bias": torch.zeros(3)}, folder / "model.safetensors")
    refused(folder, "1 of another shape: norm.bias (3,) for (16,)")
