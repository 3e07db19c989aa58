"""Exported files that were damaged, or written to mislead, are refused with an error that names file and entry."""

import json
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from sequencer.export import export_graph
from sequencer.models import CheckpointError, load_model, read_weights
from tests.helpers import DIGITS, refused, save_run


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def write_graph(path: Path, description: Any, weight: TensorProto | None = None, **changes: Any) -> Path:
    """Writes an ONNX graph that maps grey images of 8 x 8 pixels to 10 logits."""
    sizes = {"inputs": [["image", "batch", 1, 8, 8]], "classes": 10, "nodes": []} | changes
    inputs = [helper.make_tensor_value_info(name, 1, shape) for name, *shape in sizes["inputs"]]
    output = helper.make_tensor_value_info("logits", 1, ["batch", sizes["classes"]])
    classes = sizes["classes"]
    weight = weight or helper.make_tensor("weight", 1, [64, classes], [0.1] * 64 * classes)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(sizes["nodes"] or nodes, "graph", inputs, [output], [weight])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("evil", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    text = description if isinstance(description, str) else json.dumps(description)
    helper.set_model_props(model, {"sequencer.json": text})
    onnx.save(model, path)
    return path


DESCRIPTION = {
    "arch": "sequencer2d_t_8",
    "num_classes": 10,
    "label_names": list("0123456789"),
    "pretrained_cfg": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5]},
}


def test_a_description_may_lack_optional_entries(tmp_path):
    loaded = load_model(write_graph(tmp_path / "a.onnx", DESCRIPTION))
    assert (loaded.slot, loaded.about, loaded.model_args) == ("raw", {}, {})
    assert loaded.model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("{", "is damaged: its description is not JSON"),
        ({}, "num_classes: field required"),
        ([], "input should be"),
        (DESCRIPTION | {"label_names": 5}, "label_names: input should be"),
        (DESCRIPTION | {"label_names": ["a"]}, "label_names: 1 names for 10 classes"),
        (DESCRIPTION | {"num_classes": 7, "label_names": None}, "returns values of the shape (2, 10) for 2 images"),
        (DESCRIPTION | {"arch": None}, "arch: input should be a valid string"),
        (DESCRIPTION | {"about": {"config": [1]}}, "about.config: input should be a valid dictionary"),
        (DESCRIPTION | {"preprocessing": True}, "the inputs of its graph have the sizes [[1, 8, 8]]"),
        (
            DESCRIPTION | {"pretrained_cfg": {"input_size": [3, 8, 8]}},
            "the inputs of its graph have the sizes [[1, 8, 8]], its description [3, 8, 8]",
        ),
    ],
)
def test_a_graph_whose_description_is_not_its_own(tmp_path, description, said):
    refused(write_graph(tmp_path / "a.onnx", description), said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": [["image", "batch", 1, 8, 8], ["other", 5]]}, "the inputs of its graph have the sizes"),
        ({"inputs": [["image", 1, 1, 8, 8]]}, "cannot be run as its description says"),
        ({"nodes": [helper.make_node("Run", ["image"], ["logits"], domain="evil")]}, "damaged or no ONNX file"),
    ],
)
def test_a_graph_that_is_not_a_classifier(tmp_path, changes, said):
    refused(write_graph(tmp_path / "a.onnx", DESCRIPTION, **changes), said)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/passwd"])
def test_a_graph_with_weights_in_other_files(tmp_path, location):
    """onnxruntime itself reads such a file in the graph's folder."""
    weight = TensorProto(name="weight", data_type=1, dims=[64, 10], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path, tmp_path / "folder"):
        (folder / "weights.bin").write_bytes(bytes(2560))
    refused(write_graph(tmp_path / "folder" / "a.onnx", DESCRIPTION, weight), "refers to weights in other files")


def test_a_class_called_location(tmp_path):
    names = ["location", *"123456789"]
    loaded = load_model(write_graph(tmp_path / "a.onnx", DESCRIPTION | {"label_names": names}))
    assert loaded.class_names == tuple(names)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """An exported program."""
    folder = tmp_path_factory.mktemp("program")
    loaded = load_model(save_run(folder / "run", DIGITS, list("0123456789")))
    export_graph(loaded, folder, "torch_export", 8)
    return folder / "model.pt2"


def with_code(program: Path, path: Path, mark: Path) -> Path:
    """A copy of a program with an object in place of a weight that creates the file `mark` when it is unpickled."""
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("model_weights_config.json"):
                config = json.loads(content)
                weight = next(iter(config["config"].values()))
                weight["use_pickle"] = True
                content = json.dumps(config).encode()
            elif name.endswith("weights/weight_0"):
                content = pickle.dumps(Evil(mark))
            copy.writestr(name, content)
    return path


def test_a_program_is_code_and_loads_only_if_it_is_trusted(program, tmp_path):
    evil = with_code(program, tmp_path / "evil.pt2", tmp_path / "code was run")
    for path in (evil, program):
        refused(path, "is a torch.export program, which can run any code when it is loaded\n", "--trust")
        with pytest.raises(CheckpointError, match="is an export: name the model that it was made from"):
            read_weights(path)
    assert not (tmp_path / "code was run").exists()
    assert load_model(program, trust=True).arch == "sequencer2d_t_8"
    with pytest.raises(CheckpointError):
        load_model(evil, trust=True)
    assert (tmp_path / "code was run").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"text", lambda b: b""])
def test_a_damaged_program_logs_nothing(program, damage, tmp_path, caplog, capfd):
    (tmp_path / "a.pt2").write_bytes(damage(program.read_bytes()))
    refused(tmp_path / "a.pt2", "is damaged or no torch.export program", trust=True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")
