"""Smoke tests: every part of a run once, for any request, and nothing that is kept."""

from pathlib import Path

import pytest

from sequencer.config import RequestError, compose
from sequencer.config.command import parse_command
from sequencer.config.conf_files import ConfigFiles, conf_dir
from sequencer.training import optim, smoke, smoke_test
from tests.helpers import ARGS

RECIPES = ConfigFiles(conf_dir()).groups["experiment"]
MODEL = "model.kwargs={" + ",".join(f"{key}:{value}" for key, value in ARGS.items()) + "}"


def test_every_part_is_run_and_nothing_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written = []

    def look(source):
        written.extend(sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()))

    monkeypatch.setattr(smoke_test, "load_model", look)
    smoke(compose([MODEL, "optim.ema_decay=0.9", "logger.wandb=true", "trainer.accelerator=cpu"]))
    assert {name for name in written if not name.startswith("report/")} == {
        ".lock",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "confusion.png",
        "curves.png",
        "metrics.csv",
        "model/README.md",
        "model/config.json",
        "model/confusion.png",
        "model/model.safetensors",
        "report.html",
        "summary.json",
        "train.log",
    }
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert printed.startswith("smoke test passed in ")
    assert printed.endswith("checkpoints, pictures and the model folder; nothing was kept\n")
    assert len(printed.splitlines()) == 1


def test_a_smoke_test_fails_as_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RequestError, match="no complete set in"):
        smoke(compose(["data=cifar10", f"data.root={tmp_path}"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_in_one_epoch(recipe):
    """One epoch is legal, and half of it or more is neither warm-up nor cool-down."""
    command = parse_command([f"experiment={recipe}", "trainer.max_epochs=1", "logger=csv"])
    config = compose(command.first_lines)
    assert sum(optim.fit_phases(config.optim, 1)) <= 0.5
    short = smoke_test.shorten(config, Path("run"))
    assert short.data.batch_size == (512 if config.trainer.devices == "auto" else 2)  # 512 can be shared by any devices
    assert (short.trainer.limit_train_batches, short.trainer.limit_test_batches, short.logger.wandb) == (1, 1, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smoke=2"], "smoke=2: it is true or false"),
        (["smoke=true", "plan=true"], "plan=true and smoke=true exclude each other: a plan trains nothing"),
        (["smoke=true", "resume=x"], "smoke=true and resume=RUN exclude each other: a smoke test is made of a new run"),
    ],
)
def test_contradictions(arguments, message):
    with pytest.raises(RequestError, match=message):
        parse_command(arguments)
