"""The lock of a run folder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sequencer.config import RequestError
from sequencer.training import run
from sequencer.training.folder import LOCK, RunFolder
from tests.helpers import SMALL, SMALL_MODEL, read_rows, small_config
from tests.processes import Command, start_function, start_ranks, wait_for

LONG = [*SMALL, SMALL_MODEL, "trainer.max_epochs=30000", "trainer.checkpoint_interval=0"]

# programs that take the lock of a file, and that keep it
LOCK_IT = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
HOLD = f"{LOCK_IT}; print(flush=True); time.sleep(60)"


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    first = Command([*LONG, "run_dir=run"], tmp_path)
    wait_for(tmp_path / "run" / "train.log", " INFO epoch ")
    before = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
    for second in (
        [Command(["resume=run", "trainer.max_epochs=40000"], tmp_path)],
        start_ranks(2, [*LONG, "run_dir=run", "trainer.max_epochs=40000"], tmp_path),
    ):
        errors = [process.communicate(60)[1] for process in second]
        assert [process.returncode for process in second] == [2] * len(second), errors
        assert f"run_dir=run is in use by process {first.pid} on " in errors[0]
        assert [text.count("\n") for text in errors] == [2, 0][: len(second)]  # rank 0 prints
    assert (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == before
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate(60)
    third = Command(["resume=run", f"trainer.max_epochs={len(read_rows(tmp_path / 'run')) + 2}"], tmp_path)
    _, errors = third.communicate(60)
    assert third.returncode == 0, errors


def start_fork_and_die(run_dir: Path) -> None:
    """Starts a run folder and is killed; a child that was forked in between, as a loader worker is, lives on."""
    RunFolder(run_dir).start(small_config(run_dir))
    child = os.fork()
    if child == 0:
        signal.pause()
    (run_dir / "child").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    start_function(start_fork_and_die, tmp_path / "run").join(60)
    child = int((tmp_path / "run" / "child").read_text())
    try:
        os.kill(child, 0)
        assert may_lock(tmp_path / "run" / LOCK)
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_lock_is_released_at_the_end_of_a_run(config, tmp_path):
    run(config("trainer.max_epochs=1"))
    assert may_lock(tmp_path / "run" / LOCK)


def test_a_lock_is_kept_when_the_folder_is_started_again(config, tmp_path):
    """A rollback starts the folder of a run a second time."""
    folder = RunFolder(tmp_path / "run")
    try:
        folder.start(config())
        folder.start(config())
        assert not may_lock(tmp_path / "run" / LOCK)
    finally:
        folder.close()
    assert may_lock(tmp_path / "run" / LOCK)


def may_lock(path: Path) -> bool:
    """Whether another process gets the lock."""
    return subprocess.run([sys.executable, "-c", LOCK_IT, path], capture_output=True).returncode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(config, tmp_path, monkeypatch, number):
    def lockf(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    folder = RunFolder(tmp_path / "run")
    folder.start(config())
    folder.close()
    expected = f"WARNING {tmp_path / 'run'}: this file system has no locks"
    assert expected in (tmp_path / "run" / "train.log").read_text()


def test_what_the_lock_file_says_is_printed_without_control_characters(tmp_path, config):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / LOCK
    path.write_bytes(b"\x1b[31mprocess\xff\n")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(RequestError) as error:
            RunFolder(tmp_path / "run").start(config())
    finally:
        holder.kill()
        holder.communicate()
    assert "\x1b" not in str(error.value)
    assert "is in use by [31mprocess" in str(error.value)
