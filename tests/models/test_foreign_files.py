"""Files of models that are no regular files, or whose names mislead."""

import os

import pytest

from sequencer.models import CheckpointError, load_model, read_checkpoint, read_weights
from tests.helpers import refused


def test_a_model_that_is_no_regular_file(tmp_path):
    for name in ("a.onnx", "a.pt2", "a.ckpt", "a.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is neither a regular file nor a folder", trust=True)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_name_that_is_too_long():
    with pytest.raises(CheckpointError, match="neither a file or folder nor a timm model name"):
        load_model("a" * 300)
    with pytest.raises(CheckpointError, match="neither a file or folder nor a timm model name"):
        read_weights("a" * 300)


def test_a_folder_named_like_an_export(folder, tmp_path):
    (tmp_path / "run").rename(tmp_path / "run.onnx")
    assert load_model(tmp_path / "run.onnx").arch == "sequencer2d_t_8"
