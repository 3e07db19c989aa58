"""Every file of conf/ composes, and the request checks hold."""

import dataclasses
import importlib.util
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sequencer.config import compose, conf_dir
from sequencer.config.command import parse_command
from sequencer.config.conf_files import ConfigFiles
from sequencer.config.errors import RequestError
from sequencer.config.overrides import KEYS
from sequencer.config.request import request, resume_request
from sequencer.config.schema import Config

GROUPS = ConfigFiles(conf_dir()).groups


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group, choices in GROUPS.items() for choice in choices]
)
def test_every_choice_composes(group, choice):
    config = compose([f"{group}={choice}"])
    assert group == "experiment" or config.model.name == config.data.default_model
    again = choice.startswith(("ablation_", "overfitting"))  # the same command finds its trials again
    assert config.run_dir.startswith(f"outputs/{config.name}" + ("" if again else f"/{time.strftime('%Y')}"))


@pytest.mark.parametrize("choice", GROUPS["experiment"])
def test_a_recipe_is_a_document(choice):
    text = (Path("conf/experiment") / f"{choice}.yaml").read_text()
    assert "# Command: python train.py" in text
    assert compose([f"experiment={choice}"]).name == choice


def test_every_knob_is_explained():
    def knobs(node: type) -> Iterator[dataclasses.Field]:
        for field in dataclasses.fields(node):
            if dataclasses.is_dataclass(field.type):
                yield from knobs(field.type)
            else:
                yield field

    assert len(list(knobs(Config))) > 60
    assert all(field.metadata["help"] for field in knobs(Config))


def test_the_page_of_knobs_is_current(load_script):
    reference = load_script("reference")
    assert reference.PAGE.read_text() == reference.page(), "python scripts/reference.py writes it anew"


def test_the_default_is_digits():
    config = compose([])
    assert (config.name, config.data.name, config.model.name) == ("digits", "digits", "sequencer2d_t_8")


def test_a_data_set_brings_its_own_recipe_or_none():
    digits, cifar, mnist = (compose(o) for o in ([], ["data=cifar10"], ["data=mnist"]))
    assert cifar.name == "cifar10"
    assert cifar == dataclasses.replace(compose(["experiment=cifar10"]), run_dir=cifar.run_dir)
    assert mnist.name == "mnist"
    assert (mnist.optim.lr, mnist.trainer.max_epochs) == (1e-3, 10)
    assert digits.optim.lr != mnist.optim.lr
    assert compose(["data=mnist", "experiment=digits"]).data.name == "mnist"


def test_data_brings_what_the_model_needs():
    config = compose(["data=cifar100"])
    assert (config.model.num_classes, config.model.in_chans, config.model.img_size) == (100, 3, 32)
    assert compose(["data=cifar100", "data.img_size=64"]).model.img_size == 64


def test_several_loggers():
    logger = compose(["logger=[wandb,tensorboard]"]).logger
    assert logger.wandb
    assert logger.tensorboard
    assert not compose([]).logger.wandb


def test_model_arguments_may_be_added():
    for override in ("model.kwargs.cell=gru", "model.kwargs={cell: gru}", "+model.kwargs.cell=gru"):
        assert compose([override]).model.kwargs == {"cell": "gru"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "unknown key 'optim.lrr': did you mean optim.lr?"),
        (["modell.name=a"], "unknown key 'modell.name': did you mean model.name?"),
        (["lr=1"], "did you mean optim.lr?"),
        (["trainer.epochs=3"], "did you mean trainer.max_epochs?"),
        (["data.augment.mixupp=1"], "did you mean data.augment.mixup?"),
        (["+foo=1"], "unknown key 'foo'"),
        (["data=cifar11"], "did you mean cifar10? There are"),
        (["experiment=digit"], "did you mean digits?"),
        (["logger=[csv,wandbb]"], "did you mean wandb?"),
        (["optim.lr=fast"], "optim.lr: Value 'fast'"),
        (["trainer.max_epochs=2.5"], "trainer.max_epochs: Value '2.5'"),
        (["optim.lr=-1"], "out of range: it must be between 0 and 1000"),
        (["trainer.max_loss=-1"], "out of range: it must be at least 0"),
        (["optim.lr=nan"], "out of range"),
        (["model.drop_rate=1.5"], "between 0 and 0.999"),
        (["data.augment.scale=[-1,1]"], "data.augment.scale=-1.0 is out of range"),
        (["trainer.precision=64"], "There are 32, bf16-mixed, 16-mixed"),
        (["optim.lr"], "overrides are written key=value"),
        (["trainer.slot=ema"], "set optim.ema_decay"),
        (["trainer.best_metric=val_ema/top1"], "set optim.ema_decay"),
        (["trainer.best_metric=epoch", "trainer.early_stopping_patience=2"], "other than epoch"),
        (["data.mean=[0.5,0.5]"], "data.mean has 2 entries"),
        (["model.img_size=16"], "data.img_size=8"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_requests(overrides, message):
    with pytest.raises(RequestError) as error:
        compose(overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def run_dir(tmp_path):
    """A run of two epochs that has written its configuration."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = compose([f"run_dir={folder}", "trainer.max_epochs=2", "optim.lr=0.5"])
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    return folder


def test_resuming_takes_the_runs_own_configuration(run_dir):
    wanted = resume_request(parse_command([f"resume={run_dir}", "trainer.max_epochs=7", "logger=tensorboard"]))
    assert wanted.resume
    assert (wanted.config.optim.lr, wanted.config.trainer.max_epochs) == (0.5, 7)
    assert wanted.config.logger.tensorboard


def test_a_moved_run_is_resumed_where_it_is(run_dir, tmp_path):
    moved = run_dir.rename(tmp_path / "moved")
    wanted = resume_request(parse_command([f"resume={moved}"]))
    assert wanted.config.run_dir == str(moved)


@pytest.mark.parametrize("override", ["optim.lr=1", "data=cifar10", "seed=3", "trainer.precision=bf16-mixed"])
def test_resuming_changes_nothing_else(run_dir, override):
    with pytest.raises(RequestError, match="cannot change when a run is resumed"):
        resume_request(parse_command([f"resume={run_dir}", override]))


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(RequestError, match="not a run folder"):
        resume_request(parse_command([f"resume={tmp_path}"]))
    (tmp_path / "config.yaml").write_text("optim: [broken")
    with pytest.raises(RequestError, match="damaged or of another version"):
        resume_request(parse_command([f"resume={tmp_path}"]))


def test_starting_into_a_run_dir_in_use(run_dir, tmp_path):
    same = [f"run_dir={run_dir}", "optim.lr=0.5"]
    assert request(compose([*same, "trainer.max_epochs=2"])).resume
    assert request(compose([*same, "trainer.max_epochs=9"])).resume
    with pytest.raises(RequestError, match=r"holds another run: optim\.lr \(0\.5 there, 0\.25 here\)"):
        request(compose([f"run_dir={run_dir}", "optim.lr=0.25"]))
    assert not request(compose([f"run_dir={tmp_path / 'new'}"])).resume
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(RequestError, match="not empty and holds no run"):
        request(compose([f"run_dir={tmp_path / 'full'}"]))


def test_keys_are_complete():
    assert {"seed", "optim.lr", "data.augment.mixup", "logger.wandb"} <= set(KEYS)


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["nowhere", "a folder of that name"])
def test_a_logger_that_is_not_installed(monkeypatch, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(RequestError, match=r"^logger\.wandb=true, but wandb is not installed"):
        compose(["logger=wandb"])
    assert not compose([]).logger.wandb
