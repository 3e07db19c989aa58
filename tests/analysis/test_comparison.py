"""Compared runs: ranks, settings that differ, states, and what the command prints and writes."""

import json
import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from sequencer.analysis import compare, comparison, find_runs, write_sweep
from sequencer.config.errors import RequestError
from tests.helpers import exit_code, read_csv


def trial(folder: Path, top1: float = 0.5, seed: int = 0, cell: str = "lstm", parameters: int = 100, **extra) -> Path:
    """Writes a finished run; `extra` are sections of its configuration."""
    start_run(folder, seed=seed, model={"kwargs": {"cell": cell}}, **extra)
    summary = {"name": "cells", "model": "m", "slot": "raw", "epochs": 1, "best_epoch": 0, "time/train_s": 60.0}
    summary |= {"parameters": parameters, "test/top1": top1 / 2, "val/top1": top1, "val/loss": 2 * top1}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def start_run(folder: Path, **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"run_dir": str(folder), **config}))  # JSON is YAML
    return folder


def test_a_damaged_summary_is_named(tmp_path):
    path = trial(tmp_path / "seed=0") / "summary.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(RequestError, match=r"seed=0/summary\.json: invalid JSON: .*\nwithout this file, "):
        write_sweep(tmp_path, "cells")


def test_rows_are_ranked_means_over_seeds(tmp_path):
    for cell, values in (("gru", (0.60, 0.66)), ("lstm", (0.70, 0.72))):
        for seed, top1 in enumerate(values):
            trial(tmp_path / f"{cell}{seed}", top1, seed, cell, 100 if cell == "gru" else 130)
    rows = write_sweep(tmp_path, "cells")
    assert [(row.label, row.values("val/top1")) for row in rows] == [
        ("model.kwargs.cell=lstm", [0.70, 0.72]), ("model.kwargs.cell=gru", [0.60, 0.66])
    ]  # fmt: skip
    assert (tmp_path / "sweep.md").read_text().splitlines() == [
        "cells: ranked by val/top1, the highest first; mean ± standard deviation over seeds",
        "",
        "| rank | run | val/top1, % | runs | parameters |",  # times are equal in all rows
        "| ---: | --- | ---: | ---: | ---: |",
        "| 1 | model.kwargs.cell=lstm | 71.00 ± 1.41 | 2 | 130 |",
        "| 2 | model.kwargs.cell=gru | 63.00 ± 4.24 | 2 | 100 |",
    ]
    assert compare(find_runs([tmp_path])).best.folder == tmp_path / "lstm1"


def test_equal_results_keep_the_order_of_numbers(tmp_path):
    for name in ("lstm1997,D=16", "lstm,D=16", "lstm1997,D=8", "lstm,D=8"):
        trial(tmp_path / name, cell=name)
    assert [row.label for row in write_sweep(tmp_path, "sizes")] == [
        f"model.kwargs.cell={name}" for name in ("lstm,D=8", "lstm,D=16", "lstm1997,D=8", "lstm1997,D=16")
    ]  # fmt: skip


def test_a_folder_without_a_finished_trial_has_no_table(tmp_path):
    assert write_sweep(tmp_path, "none") == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("metric", "first"), [("val/loss", "low"), ("val/top1", "high"), ("epoch", "high")])
def test_the_metric_that_the_runs_optimise_ranks_them(metric, first, tmp_path):
    folders = [trial(tmp_path / name, top1, trainer={"best_metric": metric}, optim={"lr": top1})
               for name, top1 in (("low", 0.2), ("high", 0.8))]  # fmt: skip
    found = compare(folders)
    assert found.best.folder == tmp_path / first
    assert found.notes == []


def test_settings_are_keys_that_differ_with_rates_of_four_digits(tmp_path):
    folders = [
        trial(tmp_path / "a", 0.9, optim={"lr": 0.00123456789}, data={"img_size": 8}, name="a"),
        trial(tmp_path / "b", 0.8, optim={"ema_decay": 0.99}, data={"img_size": 16}, logger={"wandb": True}),
    ]
    found = compare(folders)
    assert found.keys == ["data.img_size", "optim.ema_decay", "optim.lr"]
    assert [row.label for row in found.rows] == [
        "data.img_size=8, optim.ema_decay=null, optim.lr=0.001235",
        "data.img_size=16, optim.ema_decay=0.99, optim.lr=0.001",
    ]  # fmt: skip


def test_runs_of_other_metrics_and_images_are_noted(tmp_path):
    folders = [
        trial(tmp_path / "a", 0.9),
        trial(tmp_path / "b", 0.8, data={"val_fraction": 0.3}, trainer={"best_metric": "val/loss"}),
    ]
    found = compare(folders)
    assert found.metric == "val/top1"
    assert found.notes == [
        "the runs optimise different metrics (val/loss, val/top1): they are ranked by val/top1",
        "the runs differ in data.val_fraction: their results may be of different images",
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [({"name": "digits"}, {"name": "mnist"}), ({"name": "filelist", "root": "a"}, {"name": "filelist", "root": "b"})],
)
def test_runs_of_different_data_sets_are_not_ranked(first, second, tmp_path, capsys):
    found = compare([trial(tmp_path / "a", 0.8, data=first), trial(tmp_path / "b", 0.9, data=second)])
    assert found.best is None
    assert found.ranks == ["", ""]
    assert [row.runs[0].folder.name for row in found.rows] == ["a", "b"]
    assert found.notes == ["the runs are of different data sets: they are not ranked"]
    comparison.print_comparison(found)
    shown = capsys.readouterr().out
    assert shown.startswith("run ")
    assert "best by" not in shown
    copies = [trial(tmp_path / root, 0.8, data={"name": "cifar10", "root": root}) for root in ("c", "d")]
    assert compare(copies).ranks == ["1", "2"]


def test_runs_that_have_not_finished_stand_last(tmp_path):
    trial(tmp_path / "done", 0.1)
    rows = "epoch,val/top1,val/loss\n0,0.3,2\n1,0.4,1\n2,,3\n"
    for seed, name in enumerate(("killed", "diverged", "failed", "begun"), start=1):
        start_run(tmp_path / name, seed=seed)
        if name != "begun":
            (tmp_path / name / "metrics.csv").write_text(rows)
    (tmp_path / "diverged" / "divergence.json").touch()
    (tmp_path / "failed.failed").touch()
    rolled_back = start_run(tmp_path / "rolled_back", seed=9)
    (rolled_back / "divergence.json").touch()
    os.utime(rolled_back / "divergence.json", (0, 0))
    (rolled_back / "metrics.csv").write_text(rows)
    found = compare(find_runs([tmp_path]))
    assert [row.is_finished for row in found.rows] == [True] + [False] * 5
    assert {row.runs[0].folder.name: row.runs[0].state for row in found.rows} == {
        "done": "finished",
        "killed": "3 of 10 epochs",
        "diverged": "diverged in epoch 4",
        "failed": "failed after 3 of 10 epochs",
        "begun": "0 of 10 epochs",
        "rolled_back": "3 of 10 epochs",
    }
    assert found.rows[1].values("val/top1") == [0.4]
    assert math.isnan(found.rows[-1].values("val/top1")[0])
    assert found.best.folder == tmp_path / "done"
    (tmp_path / "killed" / "metrics.csv").write_text("epoch,val/top1\n0,damaged\n")
    with pytest.raises(RequestError, match=r"killed/metrics\.csv cannot be read: could not convert string to float"):
        compare(find_runs([tmp_path]))


def test_each_run_is_found_once(tmp_path):
    folders = [trial(tmp_path / "sweep" / f"seed={seed}") for seed in (0, 1, 10, 2)]
    (tmp_path / "sweep" / "seed=3.failed").touch()
    expected = [folders[0], folders[1], folders[3], folders[2]]
    assert find_runs([tmp_path / "sweep", folders[0]]) == expected
    assert find_runs([folders[2], tmp_path / "sweep"])[0] == folders[2]


def test_runs_two_levels_deep_are_found_besides_others(tmp_path):
    dated = trial(tmp_path / "outputs" / "digits" / "2026-01-31")
    direct = trial(tmp_path / "outputs" / "start")
    start_run(direct / "nested")
    assert sorted(find_runs([tmp_path / "outputs"])) == [dated, direct]


def test_many_settings_stand_below_the_table(load_script, tmp_path, capsys):
    script = load_script("compare")
    for name, value in (("a", 0.2), ("b", 0.3)):
        trial(tmp_path / name, value, optim={"lr": value, "weight_decay": value, "warmup_epochs": value})
    trial(tmp_path / "c", 0.4, 1, optim={"lr": 0.3, "weight_decay": 0.3, "warmup_epochs": 0.3})
    assert exit_code(script, ["a", "b", "c"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rank  run             val/top1, %   runs",
        "   1  b and 1 more   35.00 ± 7.07      2",
        "   2  a                     20.00      1",
        "best by val/top1: c",
        "   1  b",
        "   1  c",
        "        optim.lr=0.3",
        "        optim.warmup_epochs=0.3",
        "        optim.weight_decay=0.3",
        "   2  a",
        "        optim.lr=0.2",
        "        optim.warmup_epochs=0.2",
        "        optim.weight_decay=0.2",
    ]


def test_the_command(load_script, tmp_path, capsys):
    script = load_script("compare")
    trial(tmp_path / "runs" / "a", 0.75, optim={"lr": 1e-3})
    trial(tmp_path / "runs" / "b", 0.5, optim={"lr": 2e-3})
    start_run(tmp_path / "c", optim={"lr": 3e-3}, model={"kwargs": {"cell": "lstm"}})
    assert exit_code(script, ["runs", "c"]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "rank  run                               val/top1, %",
        "   1  optim.lr=0.001                          75.00",
        "   2  optim.lr=0.002                          50.00",
        "      optim.lr=0.003 (0 of 10 epochs)",
        "best by val/top1: runs/a",
        "   1  runs/a",
        "   2  runs/b",
        "      c",
    ]
    assert exit_code(script, ["runs", "c", "--test", "--output", "new/table.csv"]) == 0
    assert "   1  optim.lr=0.001                          75.00          37.50\n" in capsys.readouterr().out
    rows = read_csv(Path("new/table.csv"))
    assert [(row["rank"], row["run"], row["state"], row["optim.lr"], row["test/top1"]) for row in rows] == [
        ("1", "runs/a", "finished", "0.001", "0.375"),
        ("2", "runs/b", "finished", "0.002", "0.25"),
        ("", "c", "0 of 10 epochs", "0.003", ""),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere is no file or folder; a timm model needs a data set, with --data NAME\n"),
        (["empty"], "error: empty holds no run: there is no config.yaml in it or up to two levels below\n"),
        (["run", "--output", "empty"], "error: --output empty is a folder; name a file\n"),
        (["damaged"], "error: damaged/config.yaml is damaged or of another version: "),
        ([], "error: the following arguments are required: MODEL\n"),
    ],
    ids=lambda value: value[-1] if value and isinstance(value, list) else "",
)
def test_wrong_requests(arguments, message, load_script, tmp_path, capsys):
    script = load_script("compare")
    (tmp_path / "empty").mkdir()
    trial(tmp_path / "run")
    start_run(tmp_path / "damaged", nokey=1)
    assert exit_code(script, arguments) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_narrow_terminal_loses_columns_and_no_words(load_script, tmp_path, capsys, monkeypatch):
    script = load_script("compare")
    for number in range(4):
        trial(tmp_path / "runs" / str(number), 0.1, number // 2, "gru" * (1 + number % 2), 100 + number,
              trainer={"best_metric": "val/loss"}, optim={"lr": 0.001 + number % 2})  # fmt: skip
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(comparison, "CONSOLE", Console())
    for isatty, last in ((True, "test/top1, %"), (False, "parameters")):
        monkeypatch.setattr("sys.stdout.isatty", lambda isatty=isatty: isatty)
        assert exit_code(script, ["runs", "--test"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith(f"  {last}")
        assert lines[2].startswith("   2  model.kwargs.cell=grugru, optim.lr=1.001   ")
        assert (max(map(len, lines)) <= 100) is isatty
