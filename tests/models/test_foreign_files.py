"""Files of models that were damaged, or written to mislead: each is refused with an error that names file and entry."""

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from sequencer.export import export_graph
from sequencer.models import (
    CheckpointError,
    create_model,
    load_model,
    load_weights,
    read_checkpoint,
    read_weights,
    select_weights,
)
from sequencer.models.arguments import ArgumentError, check_model_args
from sequencer.models.declarations import Preprocessing
from sequencer.variants import VARIANTS
from tests.helpers import ARGS, DIGITS, save_run

HUGE = 2**20  # the largest integer that is accepted


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder."""
    return save_run(tmp_path / "run", DIGITS, list("0123456789")) / "model"


def refused(source: Path, *said: str, **options) -> str:
    """The message with which a model is refused, in at most two lines that contain all texts of `said`."""
    with pytest.raises(CheckpointError) as error:
        load_model(source, **options)
    message = str(error.value)
    assert len(message.splitlines()) <= 2
    for text in (str(source), *said):
        assert text in message
    return message


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# ---- model folders


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


# ---- arguments of the architecture

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


# ---- checkpoints of runs


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


# ---- exported files


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


# ---- the file itself


def test_a_model_that_is_no_regular_file(tmp_path):
    for name in ("a.onnx", "a.pt2", "a.ckpt", "a.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is neither a regular file nor a folder", trust=True)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_folder_whose_weights_are_no_regular_file(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "no checkpoint at")


def test_a_name_that_is_too_long():
    with pytest.raises(CheckpointError, match="neither a file or folder nor a timm model name"):
        load_model("a" * 300)
    with pytest.raises(CheckpointError, match="neither a file or folder nor a timm model name"):
        read_weights("a" * 300)


def test_a_folder_named_like_an_export(folder, tmp_path):
    (tmp_path / "run").rename(tmp_path / "run.onnx")
    assert load_model(tmp_path / "run.onnx").arch == "sequencer2d_t_8"


def test_weights_of_another_kind_in_a_model_folder(folder):
    weights = load_model(folder).model.state_dict()
    save_file(weights | {"norm.bias": torch.zeros(3)}, folder / "model.safetensors")
    refused(folder, "1 of another shape: norm.bias (3,) for (16,)")
