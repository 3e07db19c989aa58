"""What the console shows: whole lines, tables, the log without its details, and one line for the progress bar."""

import io
import logging
from pathlib import Path
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
from rich.console import Console

from sequencer.console import say, table_lines
from sequencer.tracking.loggers import close_log, log, start_log
from sequencer.training.module import Classifier
from sequencer.training.progress import EpochBar
from sequencer.training.result import describe_result

LONG = "wandb sync " + "/a folder with a name" * 20


def test_lines_are_neither_wrapped_nor_padded_nor_styled(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    say(f"[bold]1.5[/bold]\n{LONG}")
    assert capsys.readouterr().out == f"[bold]1.5[/bold]\n{LONG}\n"


def test_columns_of_a_table_fit_their_widest_cell_without_trailing_blanks():
    assert table_lines(["trial", "top-1"], [["x" * 150, "9%"], ["数", "[98]%"]]) == [
        f"trial{' ' * 145}   top-1",
        f"{'x' * 150}      9%",
        f"数{' ' * 148}   [98]%",
    ]


def test_details_are_in_the_file_alone_with_a_line_for_each_message(capsys, tmp_path):
    start_log(tmp_path / "train.log")
    log.debug("parameter group 0")
    log.info("resume with:\n%s", LONG)
    close_log()
    assert capsys.readouterr().out == f"resume with:\n{LONG}\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["DEBUG parameter group 0", f"INFO resume with: {LONG}"]
    assert logging.getLogger("sequencer").handlers == []


@pytest.mark.parametrize("width", [80, 120])
def test_the_progress_bar_has_one_line(width):
    bar = EpochBar()
    bar._progress.reset(bar._task, total=100_000, description="epoch 299/300", loss="")
    bar._progress.update(bar._task, completed=99_999, loss="loss 123.4567")
    console = Console(width=width, file=io.StringIO())
    console.print(bar._progress.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("epoch 299/300 ━━")
    assert " 99999/100000 " in line
    assert line.rstrip().endswith(" loss 123.4567")


def test_the_progress_bar_of_an_epoch_that_is_resumed_in_its_middle():
    """Lightning calls `on_train_start`, and no `on_train_epoch_start`."""
    bar = EpochBar()
    bar.disable()
    trainer = Mock(pl.Trainer, current_epoch=1, max_epochs=4, max_steps=-1, num_training_batches=39)
    bar._trainer = trainer
    bar.on_train_start(trainer, Mock(Classifier))
    (task,) = bar._progress.tasks
    assert (task.description, task.total) == ("epoch 2/4", 39)


def test_the_closing_lines_fit_80_columns_and_can_be_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = Path("outputs/my run/2026-01-31_12-00-00")
    run_dir.mkdir(parents=True)
    page = "open 'outputs/my run/2026-01-31_12-00-00'/report.html in a browser"
    summary = {"slot": "ema", "best_epoch": 29, "epochs": 30, "time/train_s": 61.4, "remark": "never predicted: a"}
    for split in ("val", "val_ema", "test"):
        summary |= {f"{split}/loss": 0.123456, f"{split}/top1": 0.98333, f"{split}/balanced": 0.5}
    without_page = describe_result(summary, run_dir)
    assert page not in without_page
    (run_dir / "report.html").touch()
    assert describe_result(summary, run_dir) == [
        "                           top-1   balanced     loss",
        "validation, raw weights   98.33%     50.00%   0.1235",
        "validation, EMA weights   98.33%     50.00%   0.1235",
        "test, ema weights         98.33%     50.00%   0.1235",
        "never predicted: a",
        "best epoch: 29 of 30; trained in 61 s",
        "next steps:",
        page,
        "python scripts/evaluate.py 'outputs/my run/2026-01-31_12-00-00'",
        "python scripts/predict.py 'outputs/my run/2026-01-31_12-00-00' IMAGES",
        "python scripts/export.py 'outputs/my run/2026-01-31_12-00-00' \\",
        "    --format onnx --output 'outputs/my run/2026-01-31_12-00-00'/onnx",
    ]
    assert describe_result(summary, Path("run"), next_steps=False)[-1] == "best epoch: 29 of 30; trained in 61 s"
