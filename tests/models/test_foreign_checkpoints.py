"""Checkpoints that were damaged, or written to mislead, are refused with an error that names file and entry."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sequencer.models import CheckpointError, create_model, load_model, load_weights, read_checkpoint, select_weights
from tests.helpers import ARGS, refused


@pytest.fixture
def checkpoint(folder) -> dict[str, Any]:
    """The entries of a run's checkpoint that describe its model."""
    loaded = load_model(folder)
    config = {
        "model": {"name": "sequencer2d_t_8", "in_chans": 1, "img_size": 8, "kwargs": dict(ARGS)},
        "data": loaded.data,
        "trainer": {"slot": "raw"},
    }
    weights = {f"model.{name}": tensor for name, tensor in loaded.model.state_dict().items()}
    return {"state_dict": weights, "config": config, "class_names": list("0123456789")}


def write(checkpoint: dict[str, Any], tmp_path: Path) -> Path:
    torch.save(checkpoint, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(config=5), "config: input should be"),
        (lambda c: c.update(config=[1]), "config: input should be"),
        (lambda c: c.update(class_names=5), "class_names: input should be"),
        (lambda c: c.update(class_names=[]), "class_names: "),
        (lambda c: c.update(class_names=[1, 2]), "class_names.0: input should be a valid string"),
        (lambda c: c["config"].pop("model"), "config.model: field required"),
        (lambda c: c["config"]["model"].update(name=5), "config.model.name: input should be a valid string"),
        (lambda c: c["config"]["model"].update(img_size=10**9), "config.model.img_size: input should be less"),
        (lambda c: c["config"]["model"].update(in_chans=0), "config.model.in_chans: input should be greater"),
        (lambda c: c["config"]["model"].update(kwargs=[]), "config.model.kwargs: input should be a valid dictionary"),
        (
            lambda c: c["config"]["model"]["kwargs"].update(checkpoint_path="/etc/passwd"),
            "config.model: kwargs.checkpoint_path: not an argument of the architecture",
        ),
        (lambda c: c["config"]["model"]["kwargs"].update(pretrained=True), "kwargs.pretrained: not an argument"),
        (lambda c: c["config"]["model"]["kwargs"].update(embed_dims=[100_000]), "a model far larger than the file"),
        (lambda c: c["config"]["data"].update(mean=None), "config.data.mean: input should be"),
        (lambda c: c["config"]["data"].update(std=[1.0, 1.0]), "config.data: std: 2 values for images of 1 channels"),
        (lambda c: c["config"]["trainer"].update(slot="best"), "config.trainer.slot: input should be 'raw' or 'ema'"),
    ],
)
def test_a_checkpoint_whose_description_is_none(checkpoint, change, said, tmp_path):
    assert load_model(write(checkpoint, tmp_path)).class_names == tuple("0123456789")
    change(checkpoint)
    refused(write(checkpoint, tmp_path), said)


WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda w: w.to_sparse(),
    "complex": lambda w: w.to(torch.complex64),
    "meta": lambda w: w.to("meta"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_weights_that_are_no_numbers_in_memory(checkpoint, kind, tmp_path):
    name = "model.norm.weight"
    checkpoint["state_dict"][name] = WEIGHTS[kind](checkpoint["state_dict"][name])
    refused(write(checkpoint, tmp_path), "1 not dense real numbers: norm.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_in_place_of_weights(checkpoint, dtype, tmp_path):
    """As in the file of a quantised model, whose scales are elsewhere."""
    name = "model.norm.weight"
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name].to(dtype)
    refused(write(checkpoint, tmp_path), f"1 of another kind: norm.weight {dtype} for torch.float32")


def test_names_that_are_no_text(tmp_path):
    assert select_weights({"state_dict": {1: torch.zeros(1), "w": torch.zeros(1)}}).keys() == {"w"}
    torch.save({1: torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth holds a dictionary with keys other than names"):
        read_checkpoint(tmp_path / "w.pth")
    model = create_model("sequencer2d_t_8", **ARGS)
    weights = model.state_dict() | {"a\x1b[31m\nb": torch.zeros(1), "c" * 10**6: torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, weights)
    assert "'a\\x1b[31m\\nb'" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("shape", [(1,), (1, 10**6, 10**6, 16), (1, 4, 4, 8)])
def test_a_position_embedding_that_cannot_be_resampled(shape):
    args = ARGS | {"hidden_sizes": [8], "ape": True, "num_classes": 2, "img_size": 8}
    model = create_model("v_sequencer_s", **args)
    weights = model.state_dict() | {"absolute_pos_embed": torch.zeros(1).expand(shape)}
    with pytest.raises(CheckpointError, match="1 of another shape: absolute_pos_embed"):
        load_weights(model, weights)


def test_a_head_of_a_million_classes(tmp_path):
    weights = create_model("sequencer2d_t_8").state_dict()
    weights["head.fc.weight"] = torch.zeros(1).expand(10**6, 128)
    torch.save(weights, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "a model far larger than the file", arch="sequencer2d_t_8")
    weights["head.fc.weight"] = torch.zeros(())
    torch.save(weights, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "head.fc.weight () for (1000, 128)", arch="sequencer2d_t_8")


def test_a_checkpoint_that_unpacks_to_more_than_its_size(tmp_path):
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "plain.pth")
    plain, packed = tmp_path / "plain.pth", tmp_path / "packed.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as copy:
        for record in source.namelist():
            copy.writestr(record, source.read(record))
    assert packed.stat().st_size < 10**5
    with pytest.raises(CheckpointError, match=r"packed\.pth is damaged"):
        read_checkpoint(packed)
