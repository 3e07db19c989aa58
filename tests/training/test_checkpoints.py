"""Checkpoints that are cut short, altered, carry code or find no room: never a silent loss."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sequencer.models import CheckpointError, read_checkpoint
from sequencer.training import run
from sequencer.training.checkpoints import SafeCheckpointIO, SaveError, find_checkpoint
from tests.training.conftest import SMALL, SMALL_MODEL
from tests.training.test_run import EMA, RANDOM, assert_same_run, fail, interrupted

TRAIN = Path(__file__).parents[2] / "train.py"


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
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(config, tmp_path, monkeypatch, capsys, damage):
    options = [*RANDOM, *EMA, "trainer.max_epochs=3", "trainer.checkpoint_interval=0"]
    run(config(*options, run_dir="whole"))
    interrupted(config(*options, run_dir="broken"), monkeypatch, fail, RuntimeError)
    folder = tmp_path / "broken" / "checkpoints"
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 4 + 2
    assert read_checkpoint(folder / "previous.ckpt")["global_step"] == 4 + 1
    damage(folder / "last.ckpt")
    run(config(*options, run_dir="broken"), resume=True)
    expected = f"{folder / 'last.ckpt'} is damaged or no checkpoint; going on from {folder / 'previous.ckpt'}"
    assert f"WARNING {expected}" in (tmp_path / "broken" / "train.log").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_first_save_survives_a_kill_between_two_renames(config, tmp_path, monkeypatch):
    interrupted(config(), monkeypatch, fail, RuntimeError)
    folder = tmp_path / "run" / "checkpoints"
    os.replace(folder / "last.ckpt", folder / "previous.ckpt")
    assert find_checkpoint(folder) == folder / "previous.ckpt"


def test_nothing_is_started_over_where_no_checkpoint_can_be_read(config, tmp_path, monkeypatch):
    interrupted(config(), monkeypatch, fail, RuntimeError)
    cut(tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match="damaged"):
        run(config(), resume=True)
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload",)


def test_a_checkpoint_that_carries_code_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(config(), monkeypatch, fail, RuntimeError)
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match="holds code"):
        run(config(), resume=True)
    assert not (tmp_path / "payload").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk, tmp_path):
    """The run ends in two lines and, once there is room, goes on from where it was."""
    command = [sys.executable, TRAIN, *SMALL, SMALL_MODEL, "trainer.checkpoint_interval=0", "trainer.max_epochs=3"]
    command += [f"run_dir={small_disk / 'run'}"]
    (small_disk / "filler").write_bytes(bytes(120 * 1024))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    last = small_disk / "run" / "checkpoints" / "last.ckpt"
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert f"{last} is the last good one" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert not list(small_disk.rglob("*.partial"))
    updates = read_checkpoint(last)["global_step"]
    assert updates > 0
    (small_disk / "filler").unlink()
    shutil.move(small_disk / "run", tmp_path / "moved")
    done = subprocess.run(
        [*command[:-1], f"run_dir={tmp_path / 'moved'}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(SaveError, match="could not be written"):
        SafeCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")
