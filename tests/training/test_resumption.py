"""Run folders, checkpoints and data that have changed between a run and its resumption."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from sequencer import distributed
from sequencer.config import RequestError
from sequencer.config.command import parse_command
from sequencer.config.request import describe_differences, request, resume_request
from sequencer.models import load_model, read_checkpoint
from sequencer.training import run
from sequencer.training.resumption import find_checkpoint
from tests.helpers import STATEFUL, assert_same_run, fail, read_rows, run_interrupted, small_config

FOLDER = ["data=imagefolder", "data.img_size=8", "model.name=sequencer2d_t_8", "data.batch_size=4"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The folder of a run of three epochs that failed in its second one, not to be changed."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    run_interrupted(small_config(folder, *STATEFUL, "trainer.checkpoint_interval=0"), fail, RuntimeError)
    return folder


@pytest.fixture
def folder(broken, tmp_path) -> Path:
    """A copy of the folder of that run."""
    return Path(shutil.copytree(broken, tmp_path / "run"))


@pytest.fixture
def result(finished, tmp_path) -> Path:
    """A copy of the folder of a finished run of two epochs."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def resume(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Runs `python train.py resume=RUN_DIR OVERRIDES...` in this process."""
    wanted = resume_request(parse_command([f"resume={run_dir}", *overrides]))
    return run(wanted.config, resume=wanted.resume)


def refuse(run_dir: Path, *overrides: str) -> str:
    """Resumes a run, which has to be refused in at most two lines before anything is written; returns the message."""
    before = content(run_dir)
    with pytest.raises(RequestError) as error:
        resume(run_dir, *overrides)
    assert content(run_dir) == before
    assert str(error.value).count("\n") <= 1
    return str(error.value)


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time of the last change and content of every file."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def edit_checkpoint(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    checkpoint = read_checkpoint(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def edit_config(run_dir: Path, **values: Any) -> None:
    config = OmegaConf.load(run_dir / "config.yaml")
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    OmegaConf.save(config, run_dir / "config.yaml")


def test_a_configuration_that_was_edited_is_refused(folder):
    edit_config(folder, optim__lr=0.5)
    message = refuse(folder)
    assert f"{folder}/checkpoints/last.ckpt and {folder}/config.yaml are not of the same run: optim.lr (" in message
    assert " there, 0.5 here)" in message
    edit_config(folder, optim__lr="nonsense")
    assert "config.yaml is damaged or of another version: " in refuse(folder)


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_checkpoint_of_another_run_is_refused(folder, name):
    edit_checkpoint(folder / "checkpoints" / name, lambda checkpoint: checkpoint["config"].update(seed=7))
    assert f"{name} and {folder}/config.yaml are not of the same run: seed (7 there, 0 here)" in refuse(folder)


def test_one_batch_and_all_batches_are_different_limits():
    assert describe_differences({"limit": 1}, {"limit": 1.0}) == "limit (1 there, 1.0 here)"
    assert describe_differences({"a": float("nan")}, {"a": float("nan")}) == ""
    assert describe_differences({"a": 1, "b": 1, "c": 1, "d": 1}, {}).count("None here") == 3


NO_CHECKPOINTS: list[Any] = [
    {},
    {"state_dict": {"weight": torch.zeros(2)}},
    [1, 2],
    "text",
    {"config": 5},
]


@pytest.mark.parametrize("value", NO_CHECKPOINTS, ids=str)
def test_a_file_that_is_no_checkpoint_of_a_run_is_passed_over(folder, value):
    last, previous = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "previous.ckpt"
    torch.save(value, last)
    saved = find_checkpoint(folder)
    assert saved.path == previous
    assert saved.warnings[0].startswith(f"{last}")
    assert saved.warnings[0].endswith(f"; resuming from {previous}")


def test_the_run_goes_on_from_the_checkpoint_before_one_that_is_none(folder, whole):
    last, previous = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "previous.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, last)
    resume(folder)
    assert f"resuming from {previous}" in (folder / "train.log").read_text()
    assert_same_run(whole, folder)


def test_a_run_without_a_checkpoint_of_a_run_is_refused(folder):
    last, previous = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "previous.ckpt"
    edit_checkpoint(last, lambda checkpoint: checkpoint.update(class_names=5))
    torch.save({}, previous)
    message = refuse(folder)
    assert message.startswith(f"{last}: class_names: input should be a valid list")
    assert "no intact checkpoint" in message


def test_a_run_that_has_lost_its_best_checkpoint_is_refused(folder):
    best = folder / "checkpoints" / "best.ckpt"
    best.unlink()
    assert refuse(folder).startswith(f"no checkpoint at {best}\nit held the best weights so far")


def test_a_result_without_checkpoints_is_not_overwritten(result):
    shutil.rmtree(result / "checkpoints")
    assert "holds the result of a run, but no checkpoint to resume from" in refuse(result, "trainer.max_epochs=3")
    assert resume(result)["epochs"] == 2


def test_checkpoints_of_version_0_1_0_are_resumed_with_a_warning(folder, whole):
    last = folder / "checkpoints" / "last.ckpt"
    edit_checkpoint(last, lambda checkpoint: checkpoint["DataModule"].pop("fingerprints"))
    resume(folder)
    assert f"WARNING {last} has no fingerprints of the data" in (folder / "train.log").read_text()
    assert_same_run(whole, folder)


def test_fewer_epochs_than_the_run_has_begun_are_refused(folder):
    assert "trainer.max_epochs=1, but " in (message := refuse(folder, "trainer.max_epochs=1"))
    assert "last.ckpt is in epoch 2: set trainer.max_epochs to 2 or more" in message
    assert resume(folder)["epochs"] == 3


def test_fewer_epochs_than_a_run_without_summary_has_done_are_refused(result):
    (result / "summary.json").unlink()
    assert "trainer.max_epochs to 2 or more" in refuse(result, "trainer.max_epochs=1")
    assert resume(result)["epochs"] == 2


def test_a_finished_run_that_is_killed_in_further_epochs_goes_on(result, monkeypatch):
    lifecycle = importlib.import_module("sequencer.training.lifecycle")
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "_fit", lambda *arguments: fail())
        with pytest.raises(RuntimeError, match="power failure"):
            resume(result, "trainer.max_epochs=4")
    assert not (result / "summary.json").exists()
    assert resume(result)["epochs"] == 4
    assert len(read_rows(result)) == 4


def test_more_epochs_written_into_the_configuration_by_hand_are_trained(result):
    edit_config(result, trainer__max_epochs=3)
    assert resume(result)["epochs"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "invalid JSON"),
        (lambda text: "", "invalid JSON"),
        (lambda text: "[]", "input should be an object"),
        (lambda text: text.replace('"epochs": 2', '"epochs": "two"'), "epochs: input should be a valid integer"),
    ],
    ids=["cut", "empty", "list", "type"],
)
def test_a_damaged_summary_is_refused(result, change, message):
    path = result / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(change(path.read_text()))
    assert refuse(result).startswith(f"{path}: {message}")
    path.unlink()  # as the second line says
    assert resume(result) == summary


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("epoch,step\nzero,")])
def test_metrics_that_were_deleted_or_edited_are_written_again(result, change):
    rows = read_rows(result)
    (result / "summary.json").unlink()
    change(result / "metrics.csv")
    resume(result)
    assert read_rows(result) == rows


def test_a_run_is_not_started_over(result, finished):
    """`run` as a function does what train.py does."""
    before = content(result)
    config = small_config(result)
    with pytest.raises(RequestError, match=r"run holds this run: run\(config, resume=True\) resumes it; "):
        run(config)
    assert run(config, resume=True) == finished[1]
    config.optim.lr = 0.5
    with pytest.raises(RequestError, match=r"run holds another run: optim.lr \("):
        run(config, resume=True)
    assert content(result) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_not_written(config, tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("of another")
    with pytest.raises(RequestError, match=r"run is not empty and holds no run: choose another"):
        run(config(), resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_folder_with_hidden_files_only_holds_no_run(config, tmp_path):
    """A run that is killed as it starts leaves such a folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.yaml.partial").touch()
    assert not request(config()).resume


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory) -> Path:
    """The folder of a run that failed in its second epoch, beside its images; not to be changed.

    The folder of images has four of each of two classes in train/ and val/.
    """
    folder, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for place in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (folder / "data" / place).mkdir(parents=True)
        for index in range(4):
            image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(folder / "data" / place / f"{index}.png")
    config = small_config(folder / "run", *FOLDER, f"data.root={folder / 'data'}")
    config.trainer.checkpoint_interval = 0.0
    config.trainer.limit_train_batches = None
    config.data.batch_size = 2
    run_interrupted(config, fail, RuntimeError)
    return folder / "run"


@pytest.fixture
def photographs(photo_run, tmp_path) -> Path:
    """A copy of the images of that run."""
    return Path(shutil.copytree(photo_run.with_name("data"), tmp_path / "data"))


def rename_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "wasp")


def add_image(data: Path) -> None:
    shutil.copy(data / "train" / "ant" / "0.png", data / "train" / "ant" / "new.png")


def lose_image(data: Path) -> None:
    (data / "val" / "bee" / "2.png").unlink()


def relabel_image(data: Path) -> None:
    (data / "train" / "ant" / "3.png").rename(data / "train" / "bee" / "4.png")


def rename_image(data: Path) -> None:
    (data / "train" / "ant" / "0.png").rename(data / "train" / "ant" / "9.png")


def add_test_split(data: Path) -> None:
    shutil.copytree(data / "val", data / "test")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (rename_class, "class 0 ('ant' there, 'bee' here), class 1 ('bee' there, 'wasp' here), train split (8 images "),
        (add_image, "train split (8 images "),
        (lose_image, "val split (8 images "),
        (relabel_image, "train split (8 images "),
        (rename_image, "train split (8 images "),
        (add_test_split, "test split (None there, 8 images "),
    ],
)
def test_data_that_have_changed_are_refused(photographs, photo_run, change, difference):
    change(photographs)
    message = refuse(photo_run, f"data.root={photographs}")
    assert f"data=imagefolder has changed since {photo_run}/checkpoints/last.ckpt was saved: {difference}" in message


def test_data_that_were_moved_are_accepted_where_they_are(photographs, photo_run, tmp_path):
    folder = Path(shutil.copytree(photo_run, tmp_path / "run"))
    edit_config(folder, data__root=str(tmp_path / "nowhere"))
    assert "no complete set" in refuse(folder)
    assert resume(folder, f"data.root={photographs}")["epochs"] == 2


def test_ranks_with_different_data_are_refused(config, tmp_path, monkeypatch):
    def gather(value: Any) -> list[Any]:
        other = value | {"train": "5 images 0123456789ab"} if isinstance(value, dict) and "train" in value else value
        return [value, other]

    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(RequestError, match=r"the data of rank 1 differ .*: train \(.* here\)"):
        run(config())
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_has_changed_is_refused(finished, tmp_path):
    """As when the run that it names is trained further, or another one takes its folder."""
    teacher = Path(shutil.copytree(finished[0], tmp_path / "teacher"))
    weights = teacher / "model" / "model.safetensors"
    options = [f"optim.distill_from={teacher}", "trainer.checkpoint_interval=0"]
    run_interrupted(small_config(tmp_path / "run", *options), fail, RuntimeError)
    original = load_file(weights)
    save_file(original | {"head.fc.bias": original["head.fc.bias"] + 1e-3}, weights)
    message = refuse(tmp_path / "run")
    assert f"optim.distill_from={teacher} has changed since {tmp_path}/run/checkpoints/last.ckpt was saved: " in message
    save_file(original, weights)
    assert resume(tmp_path / "run")["epochs"] == 2


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}])
def test_several_machines_that_nothing_has_started_are_refused(config, tmp_path, monkeypatch, environment):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RequestError, match=r"trainer.num_nodes=2, but .* on 1: start torchrun on every machine\n"):
        run(config("trainer.num_nodes=2"))
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_run_is_resumed_without_the_weights_that_it_started_from(tmp_path):
    run(small_config(tmp_path / "first", "trainer.max_epochs=1"))
    options = [f"init_from={tmp_path / 'first'}", "trainer.checkpoint_interval=0"]
    whole = run(small_config(tmp_path / "whole", *options))
    run_interrupted(small_config(tmp_path / "run", *options), fail, RuntimeError)
    shutil.rmtree(tmp_path / "first")
    resumed = resume(tmp_path / "run")
    assert resumed["val/loss"] == whole["val/loss"]
    weights, expected = (load_model(tmp_path / name).model.state_dict() for name in ("run", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
