"""Checkpoints that are truncated, altered, carry code or find no room on the disk."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from sequencer.config import RequestError
from sequencer.files import WriteError
from sequencer.training import run
from sequencer.training.checkpoints import SafeCheckpointIO
from sequencer.training.resumption import find_checkpoint
from tests.helpers import SMALL, SMALL_MODEL, STATEFUL, assert_same_run, fail, read_last, run_interrupted, small_config
from tests.processes import Command

SAVE_ALWAYS = "trainer.checkpoint_interval=0"


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The folder of a run that failed in its second epoch, not to be changed."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    run_interrupted(small_config(folder, *STATEFUL, SAVE_ALWAYS), fail, RuntimeError)
    assert read_last(folder)["global_step"] == 2 + 1
    return folder


@pytest.fixture
def folder(broken, tmp_path) -> Path:
    """The checkpoint folder of a copy of that run, which is at `tmp_path / "run"`."""
    shutil.copytree(broken, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    """One bit of a weight, which torch's own reader does not notice."""
    content = bytearray(path.read_bytes())
    weight = next(iter(torch.load(path, weights_only=True)["state_dict"].values()))
    place = content.index(weight.numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    assert torch.load(path, weights_only=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, alter, empty])
def test_a_damaged_checkpoint_is_detected_and_the_one_before_is_used(config, tmp_path, whole, folder, damage):
    damage(folder / "last.ckpt")
    run(config(*STATEFUL, SAVE_ALWAYS), resume=True)
    expected = f"{folder / 'last.ckpt'} is damaged or no checkpoint; resuming from {folder / 'previous.ckpt'}"
    assert f"WARNING {expected}" in (tmp_path / "run" / "train.log").read_text()
    assert_same_run(whole, tmp_path / "run")


def test_the_first_save_survives_a_kill_between_two_renames(folder):
    os.replace(folder / "last.ckpt", folder / "previous.ckpt")
    assert find_checkpoint(folder.parent).path == folder / "previous.ckpt"


def test_a_run_whose_checkpoints_cannot_be_read_is_not_started_over(config, folder):
    cut(folder / "last.ckpt")
    cut(folder / "previous.ckpt")
    best = (folder / "best.ckpt").read_bytes()
    with pytest.raises(RequestError, match="damaged"):
        run(config(*STATEFUL, SAVE_ALWAYS), resume=True)
    assert (folder / "best.ckpt").read_bytes() == best


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload",)


def test_a_checkpoint_that_carries_code_is_refused(config, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (folder / "previous.ckpt").unlink()
    torch.save({"state_dict": {}, "payload": Payload()}, folder / "last.ckpt")
    with pytest.raises(RequestError, match="holds code"):
        run(config(*STATEFUL, SAVE_ALWAYS), resume=True)
    assert not (tmp_path / "payload").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk, tmp_path):
    """The run ends with two lines and can be resumed once there is room."""
    options = [*SMALL, SMALL_MODEL, SAVE_ALWAYS, "trainer.max_epochs=3"]
    (small_disk / "filler").write_bytes(bytes(120 * 1024))
    command = Command([*options, f"run_dir={small_disk / 'run'}"], tmp_path)
    _, errors = command.communicate(60)
    last = small_disk / "run" / "checkpoints" / "last.ckpt"
    assert command.returncode == 1
    assert "could not be written" in errors
    assert f"{last} is the last good checkpoint" in errors
    assert len(errors.splitlines()) == 2
    assert not list(small_disk.rglob("*.partial"))
    updates = read_last(small_disk / "run")["global_step"]
    assert updates > 0
    (small_disk / "filler").unlink()
    shutil.move(small_disk / "run", tmp_path / "moved")
    command = Command([*options, f"run_dir={tmp_path / 'moved'}"], tmp_path)
    _, errors = command.communicate(60)
    assert command.returncode == 0, errors


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(WriteError, match="could not be written"):
        SafeCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")
