"""What a run takes from the run that `init_from` names, and where the command line says otherwise."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from sequencer.config import RequestError, compose
from sequencer.config.command import parse_command
from sequencer.config.inheritance import inherited_values, warn_of_data
from sequencer.config.overrides import parse_overrides
from sequencer.config.sources import Sources
from sequencer.training import run
from tests.helpers import SMALL, small_config

pytestmark = pytest.mark.usefixtures("unrendered")
KWARGS = {"layers": [1], "patch_sizes": [2], "embed_dims": [8], "hidden_sizes": [2], "cell": "gru"}
MODEL = "model.kwargs={" + ",".join(f"{key}:{value}" for key, value in KWARGS.items()) + "}"
VALUES = {
    "model.name": "sequencer2d_t_8",
    "model.kwargs": KWARGS,
    "data.in_chans": 1,
    "data.img_size": 8,
    "data.mean": [0.25],
    "data.std": [0.5],
}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The folder of a finished run with settings of its own."""
    folder = tmp_path_factory.mktemp("first") / "run"
    run(small_config(folder, MODEL, "data.mean=[0.25]", "data.std=[0.5]", "trainer.max_epochs=1"))
    return folder


@pytest.mark.parametrize("part", ["", "model", "checkpoints/best.ckpt"])
def test_every_form_of_a_run_is_read_without_torch(first, part):
    code = "import sys; from sequencer.config.inheritance import inherited_values as read; print(read(sys.argv[1]))"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(first / part)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{VALUES}\n", "")


def test_a_run_that_starts_from_another_needs_no_repetition(first, tmp_path):
    config = compose([*SMALL, f"init_from={first}", f"run_dir={tmp_path / 'run'}", "trainer.max_epochs=1"])
    assert config.model.kwargs == KWARGS
    assert config.data.mean == [0.25]
    assert compose([f"init_from={first.parent}"]).model.kwargs == KWARGS  # the newest run in a folder of runs
    run(config)
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"weights of {first}; from there model.name, model.kwargs, data.in_chans, data.img_size, data.mean, " in log


def test_another_data_set_that_nothing_chose_is_warned_of(first, capsys):
    config = compose([f"init_from={first}"])
    config.data.name = "mnist"
    warn_of_data(config, [])
    assert capsys.readouterr().err == (
        f"warning: this run trains on data=mnist, and {first} on data=digits:\n"
        "data=digits data.root=... chooses its data\n"
    )
    warn_of_data(config, parse_overrides(["data=mnist"]))
    warn_of_data(compose([f"init_from={first}"]), [])
    assert capsys.readouterr().err == ""


def test_the_command_line_comes_first(first):
    config = compose([f"init_from={first}", "data=mnist", "data.img_size=16", "data.mean=[0.125]"])
    assert (config.data.img_size, config.data.mean, config.data.std, config.model.kwargs) == (
        16,
        [0.125],
        [0.5],
        KWARGS,
    )
    other = compose([f"init_from={first}", "model.name=sequencer2d_t_32", "model.kwargs.cell=lstm"])
    assert (other.model.name, other.model.kwargs) == ("sequencer2d_t_32", {"cell": "lstm"})
    same = compose([f"init_from={first}", "model.name=sequencer2d_t_8", "model.kwargs.bidirectional=false"])
    assert same.model.kwargs == KWARGS | {"bidirectional": False}


def test_the_sources_name_the_run(first):
    sources = Sources(parse_command([f"init_from={first}", "data.img_size=16"]))
    assert sources["model.name"] == sources["model.kwargs.cell"] == sources["data.mean"] == f"init_from={first}"
    assert sources["data.img_size"] == sources["init_from"] == "command line"


def test_a_contradiction_is_refused_and_explained(first, tmp_path):
    config = compose([*SMALL, f"init_from={first}", "model.kwargs.cell=lstm", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(RequestError) as error:
        run(config)
    assert "does not fit Sequencer2d" in str(error.value)
    line = f"its architecture is another one: model.kwargs ({KWARGS} there, {KWARGS | {'cell': 'lstm'}} here)"
    assert str(error.value).splitlines()[1] == line
    assert not (tmp_path / "run").exists()


def test_other_sources_give_nothing(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    (tmp_path / "damaged.ckpt").write_text("no checkpoint")
    for source in (None, "sequencer2d_s", "missing", *map(str, (tmp_path, *tmp_path.iterdir()))):
        assert inherited_values(source) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "${oc.env:HOME}"}, "model.name: string should match pattern"),
        ({"kwargs": {"cell": "${oc.env:HOME}"}}, "model.kwargs.cell: it holds more than numbers and plain text"),
        ({"kwargs": {"a: 1}, x": 1}}, "string should match pattern"),
        ({"kwargs": {"layers": [[[[[[[1]]]]]]]}}, "model.kwargs.layers: it holds more than numbers and plain text"),
        ({"kwargs": [1]}, "model.kwargs: input should be a valid dictionary"),
    ],
)
def test_files_of_others(tmp_path, change, message):
    config = dataclasses.asdict(compose(["data=digits"]))
    config["model"] |= change
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    torch.save({"config": config, "state_dict": {"a": torch.ones(2)}}, tmp_path / "last.ckpt")
    for source in (tmp_path, tmp_path / "last.ckpt"):
        with pytest.raises(RequestError) as error:
            compose([f"init_from={source}"])
        assert str(error.value).startswith(f"init_from={source}: ")
        assert message in str(error.value)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    torch.save({"config": Code()}, tmp_path / "last.ckpt")
    assert inherited_values(str(tmp_path / "last.ckpt")) == {}
    assert not (tmp_path / "run").exists()


def test_a_damaged_configuration_is_an_error(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RequestError, match="its configuration cannot be read: "):
        inherited_values(str(tmp_path))
    OmegaConf.save({"model": 1}, tmp_path / "config.yaml")
    with pytest.raises(RequestError, match="model: input should be"):
        inherited_values(str(tmp_path))


def test_the_folder_of_an_unknown_user_is_no_run():
    assert inherited_values("~nobody-of-this-name/run") == {}
