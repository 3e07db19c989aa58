"""A disk that is full when a run writes a file: two lines that name the file, and a run that can be resumed."""

from collections.abc import Callable

import pytest

import train
from sequencer.data import Quarantine
from sequencer.evaluation import Evaluation, write_evaluation
from sequencer.files import WriteError
from sequencer.models import read_checkpoint
from sequencer.tracking import loggers
from sequencer.tracking.loggers import EventFiles
from sequencer.training import divergence, folder, result, run
from sequencer.training.checkpoints import SafeCheckpointIO
from sequencer.training.report import EpochReport
from tests.helpers import DIGITS, fill, small_config


@pytest.fixture
def fill_before(small_disk, monkeypatch) -> Callable[..., None]:
    """`fill_before(owner, name, call=1)` fills the disk before that call of the function `owner.name`, and no other."""

    def patch(owner: object, name: str, call: int = 1) -> None:
        original, calls = getattr(owner, name), []

        def filled(*args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                fill(small_disk)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, filled)

    return patch


CASES = {  # file in the run folder: function before whose call the disk is filled, number of that call, overrides
    "config.yaml": (folder, "write_atomically", 1, []),
    "train.log": (folder, "start_log", 1, []),
    "metrics.csv": (EpochReport, "_write", 2, []),
    "checkpoints/last.ckpt": (SafeCheckpointIO, "save_checkpoint", 4, []),
    "checkpoints/best.ckpt": (SafeCheckpointIO, "save_checkpoint", 1, []),
    "divergence.json": (divergence, "write_json", 1, ["trainer.max_loss=1e-9"]),
    "tensorboard": (EventFiles, "finalize", 1, ["logger.tensorboard=true"]),
    "model": (result, "save_model_folder", 1, []),
    "curves.png": (result, "plot_curves", 1, []),
    "confusion.png": (result, "plot_confusion", 1, []),
    "summary.json": (result, "write_json", 1, []),
}


@pytest.mark.parametrize("small_disk", ["4m"], indirect=True, ids=[""])
@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_reported_in_two_lines_and_the_run_resumes(name, fill_before, small_disk, capfd, monkeypatch):
    owner, function, call, overrides = CASES[name]
    if name == "tensorboard":  # more than fits into the last page of its file
        original = EventFiles.finalize
        monkeypatch.setattr(EventFiles, "finalize", lambda self, status: (write_events(self), original(self, status)))
    fill_before(owner, function, call)
    run_dir = small_disk / "run"
    config = small_config(run_dir, "trainer.best_metric=epoch", *overrides)
    with pytest.raises(WriteError) as error:
        run(config)
    assert train.exit_code(error.value) == 1
    reason = "No space left on device"
    if name == "model":
        reason = f"Error while serializing: I/O error: {reason} (os error 28)"
    first, second = capfd.readouterr().err.splitlines()
    assert first == f"train.py: {run_dir / name} could not be written: {reason}"
    assert not list(small_disk.rglob("*.partial"))
    last = run_dir / "checkpoints" / "last.ckpt"
    if last.exists():
        assert second == f"{last} is the last good checkpoint; free disk space and resume with resume={run_dir}"
        read_checkpoint(last)
    else:
        assert second == "no checkpoint has been written; free disk space and repeat the command"
    (small_disk / "filler").unlink()
    if not overrides:
        assert run(config, resume=True)["epochs"] == 2


def write_events(logger: EventFiles) -> None:
    for step in range(200):
        logger.log_metrics({"filler": float(step)}, step)


def test_a_log_record_that_cannot_be_written_raises_once(small_disk, capfd):
    loggers.start_log(small_disk / "train.log")
    try:
        fill(small_disk)
        with pytest.raises(WriteError, match=r"train.log could not be written: No space left on device"):
            loggers.log.info("x" * 5000)
        for _ in range(10):
            loggers.log.info("more")
    finally:
        loggers.close_log()
    assert "Traceback" not in capfd.readouterr().err


def test_the_list_of_unreadable_images(small_disk):
    from sequencer.data.images import UnreadableImage

    fill(small_disk)
    quarantine = Quarantine(small_disk / "bad_samples.csv", "train", 10, 0.5)
    with pytest.raises(WriteError, match=r"bad_samples.csv could not be written: No space left on device"):
        quarantine.report(UnreadableImage("a.png", "damaged"))


def test_the_files_of_an_evaluation(small_disk):
    fill(small_disk)
    evaluation = Evaluation("arch", "raw", DIGITS, "val", False, {}, [], [], [], [], False)
    with pytest.raises(WriteError, match=r"predictions.csv could not be written: No space left on device"):
        write_evaluation(evaluation, small_disk / "evaluation", "model")
