"""Models that were damaged or written to mislead, as MODEL of every script and as source of weights in training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sequencer.config import RequestError
from sequencer.export import export_graph, save_model_folder
from sequencer.models import create_model, load_model
from sequencer.training import run
from tests.helpers import ARGS, DIGITS, FIGURES, exit_code, save_run

COMMANDS = {
    "predict": ["MODEL", "image.png"],
    "evaluate": ["MODEL"],
    "export": ["MODEL", "--format", "timm", "--output", "out"],
    "average": ["run", "MODEL", "--output", "out"],
}


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory) -> Path:
    """A folder with a run, its export as a program, and an image. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    export_graph(load_model(save_run(folder / "run", DIGITS, list("0123456789"))), folder, "torch_export", 8)
    Image.new("L", (8, 8)).save(folder / "image.png")
    return folder


@pytest.fixture
def work_folder(made_folder, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made_folder, tmp_path, dirs_exist_ok=True))


def edit_config(folder: Path, **entries: object) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_data(folder: Path, **entries: object) -> None:
    data = load_model(folder).data | entries
    edit_config(folder, config={"data": data})


def assert_refused(load_script, capsys, name: str, model: str, said: str) -> None:
    """Runs a script on a model: exit code 2, two lines that name the model, and no file or output."""
    script = load_script(name)
    before = sorted(Path().rglob("*"))
    assert exit_code(script, [model if word == "MODEL" else word for word in COMMANDS[name]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) <= 2
    assert model in printed.err
    assert said in printed.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_misleading_models_are_wrong_requests(load_script, work_folder, capsys, name):
    for folder, entries, said in [
        ("typed", {"architecture": 5}, "config.json: architecture: input should be a valid string"),
        ("named", {"label_names": ["a"]}, "config.json: label_names: 1 names for 10 classes"),
        ("loads", {"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args.checkpoint_path: not an argument"),
        ("shown", {"figures": FIGURES | {"top1": "best"}}, "config.json: figures.top1: input should be a valid number"),
        (
            "drawn",
            {"figures": FIGURES | {"confusion": [[1, 2]]}},
            "config.json: figures: confusion: not a square matrix",
        ),
        ("large", {"model_args": {"embed_dims": [64, 300_000]}}, "a model far larger than the file"),
    ]:
        edit_config(save_run(Path(folder), DIGITS, list("0123456789")), **entries)
        assert_refused(load_script, capsys, name, folder, said)
    torch.save({"config": [1], "class_names": ["a"], "state_dict": {}}, "a.ckpt")
    assert_refused(load_script, capsys, name, "a.ckpt", "a.ckpt: config: input should be")
    exports = name in ("predict", "evaluate")
    said = "which can run any code when it is loaded" if exports else "is an export: name the model that it was made"
    assert_refused(load_script, capsys, name, "model.pt2", said)


def test_a_trusted_program_is_read(load_script, work_folder, capsys):
    for name in ("predict", "evaluate"):
        assert load_script(name).main(["model.pt2", *COMMANDS[name][1:], "--trust"]) == 0
    for name in ("export", "average"):  # also when trusted
        arguments = ["model.pt2" if word == "MODEL" else word for word in COMMANDS[name]]
        assert load_script(name).main([*arguments, "--trust"]) == 2
        assert "model.pt2 is an export" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["predict", "evaluate", "export"])
def test_the_data_section_of_a_model(load_script, work_folder, capsys, name):
    """It describes the preprocessing and the data set of the model."""
    for entries, said in [
        ({"mean": "0.5"}, "config.json: config.data: mean: input should be a valid list"),
        ({"num_workers": "many"}, "config.json: config.data: num_workers: input should be a valid integer"),
        ({"img_size": 0}, "config.json: config.data.img_size=0 is out of range"),
        ({"name": "digit"}, "config.json: config.data.name=digit is not possible"),
    ]:
        edit_data(save_run(Path("edited"), DIGITS, list("0123456789")), **entries)
        assert_refused(load_script, capsys, name, "edited", said)


def test_a_model_without_classes_predicts_none(load_script, work_folder, capsys):
    loaded = load_model("run")
    model = create_model("sequencer2d_t_8", num_classes=0, **ARGS)
    features = replace(loaded, model=model, class_names=None, model_args=dict(ARGS))
    save_model_folder(features, Path("features"))
    assert load_model("features").model(torch.zeros(2, 1, 8, 8)).shape == (2, 16)
    assert_refused(load_script, capsys, "predict", "features", "has no classes")


@pytest.mark.parametrize("key", ["init_from", "optim.distill_from"])
def test_training_does_not_load_a_program(config, work_folder, key):
    said = {"init_from": "is an export: name the model", "optim.distill_from": "name the run or model folder"}[key]
    with pytest.raises(RequestError, match=said) as error:
        run(config(f"{key}=model.pt2", run_dir="new"))
    assert "model.pt2" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not Path("new").exists()


def test_a_misleading_model_starts_no_training(config, work_folder):
    said = json.loads(Path("run/model/config.json").read_text())["config"] | {"model": {"name": "sequencer2d_t_8"}}
    edit_config(Path("run"), model_args={"pretrained": True}, config=said)
    for key in ("init_from", "optim.distill_from"):
        with pytest.raises(RequestError, match=r"model_args\.pretrained: not an argument of the architecture"):
            run(config(f"{key}=run", run_dir="new"))
    assert not Path("new").exists()
