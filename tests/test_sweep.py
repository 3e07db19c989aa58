"""Sweeps: what is checked before they start, what they leave, and how they go on."""

import csv
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from sequencer.config import conf_dir
from sequencer.config.command import parse_command
from sequencer.config.conf_files import ConfigFiles
from sequencer.config.errors import RequestError
from sequencer.config.request import load_run
from sequencer.config.sweep import Sweep, _folder_name, prepare_sweep
from tests.processes import TRAIN, Command

QUICK = [
    "trainer.accelerator=cpu", "data.num_workers=0", "optim.warmup_epochs=0", "trainer.limit_train_batches=2",
    "trainer.max_epochs=1", "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}",
    "logger.report=false",
]  # fmt: skip
ABLATIONS = [name for name in ConfigFiles(conf_dir()).groups["experiment"] if name.startswith("ablation_")]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, TRAIN, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def sweep(*arguments: str, cwd: Path) -> tuple[int, str]:
    process = start(*arguments, *QUICK, cwd=cwd)
    output, _ = process.communicate()
    return process.returncode, output


def prepare(*arguments: str) -> Sweep:
    command = parse_command(["-m", *arguments])
    return prepare_sweep(command, command.compose())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["seed=1"], False),
        (["experiment=ablation_cell"], True),
        (["experiment=ablation_cell", "hydra.mode=RUN"], False),  # one of its trials
    ],
)
def test_a_recipe_may_be_a_sweep(arguments, expected):
    assert parse_command(arguments).compose().multirun is expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "-m sweeps over nothing: give a key several values, as in seed=0,1,2, or leave out -m"),
        (["seed=1,2", "optim.lr=1e-3,-1"], "optim.lr=-1.0 is out of range"),
        (["data=digits,cifar1"], "did you mean cifar10?"),
        (["trainer.slot=raw,emma"], "did you mean ema?"),
        (["optim.lr=interval(-1,1)"], "optim.lr=-1.0 is out of range"),
        (["experiment=ablation_cell,ablation_union"], "stands alone"),
        (["hydra/sweeper=tune", "seed=1,2", "trainer.best_metric=val/loss"], "add hydra.sweeper.direction=minimize"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_every_value_is_checked_before_a_sweep_starts(overrides, message):
    with pytest.raises(RequestError) as error:
        prepare(*overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_can_start(name):
    wanted = prepare(f"experiment={name}", "data.root=somewhere")
    assert wanted.folder == Path("outputs", name)
    assert f"run_dir='outputs/{name}'" in wanted.lines


def test_the_ablations():
    assert set(ABLATIONS) == {f"ablation_{what}" for what in ("cell", "directions", "union", "hidden", "backbone")}


def test_the_folder_of_a_sweep_does_not_change_while_it_lasts():
    wanted = prepare("seed=1,2")
    assert wanted.folder.match("outputs/digits/20*")
    assert f"run_dir='{wanted.folder}'" in wanted.lines


def test_what_all_trials_share_is_in_no_name():
    wanted = prepare("data=cifar10", "optim.lr=1e-3", "seed=1,2")  # brings its recipe
    assert wanted.lines[-1] == "hydra.job.config.override_dirname.exclude_keys=[data,experiment,optim.lr,run_dir]"


def test_a_sweep_is_started_without_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RequestError, match=r"without torchrun"):
        prepare("seed=1,2")


def test_a_trial_is_named_by_what_it_varies():
    assert _folder_name("++model.kwargs.cell=gru,seed=0") == "model.kwargs.cell=gru,seed=0"
    assert _folder_name("++model.kwargs.hidden_sizes=[4,8],seed=0") == "model.kwargs.hidden_sizes=4,8,seed=0"
    assert _folder_name("init_from=runs/a b") == "init_from=runs-ab"
    long = [_folder_name(f"init_from={'x' * 300}{end}") for end in "ab"]
    assert long[0] != long[1]
    assert all(len(name) <= 150 for name in long)


def run_forked(command: list[str]) -> int:
    """Runs the command of a trial and returns its exit code."""
    process = Command(command[2:], Path.cwd())
    process.communicate(timeout=120)
    return process.returncode


def test_a_sweep_leaves_its_trials_and_a_table(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sequencer.config.sweep._run", run_forked)
    train.main(parse_command(["-m", "seed=1,2", "run_dir=runs", *QUICK]))
    output = capfd.readouterr().out
    assert "\ntrial 1 of 2\nruns/seed=1\n" in output
    assert re.search(r"\ntrial 2 of 2, about \d+ s left\nruns/seed=2\n", output)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "seed=1", "seed=2", "sweep.csv", "sweep.md", "sweep.png", "multirun.yaml"
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    with open(tmp_path / "runs" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    summaries = [json.loads((tmp_path / "runs" / f"seed={seed}" / "summary.json").read_text()) for seed in (1, 2)]
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert [float(row["val/loss"]) for row in rows] == [summary["val/loss"] for summary in summaries]
    assert not any(name.startswith("test") for name in rows[0])
    assert load_run(tmp_path / "runs" / "seed=1").logger.group == "runs"
    best = min((1, 2), key=lambda seed: summaries[seed - 1]["val/loss"])
    assert f"best by val/loss: runs/seed={best}\n" in output


@pytest.mark.slow
def test_a_failed_trial_does_not_stop_the_others(tmp_path):
    code, output = sweep("-m", "model.kwargs.cell=gru,nope,lstm", "run_dir=runs", cwd=tmp_path)
    assert code == 1
    assert "unknown cell 'nope'" in output
    assert "1 of the trials failed, and are tried again by the same command: model.kwargs.cell=nope" in output
    assert (tmp_path / "runs" / "model.kwargs.cell=lstm" / "summary.json").exists()
    assert "Traceback" not in output


def test_a_sweep_ends_with_its_first_trial_where_that_is_refused(tmp_path):
    code, output = sweep("experiment=ablation_directions", "data.root=nowhere", cwd=tmp_path)
    assert code == 2
    assert output.count("no complete set in") == 1
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_each_trial_done_once(tmp_path):
    arguments = ["-m", "seed=1,2,3", "run_dir=runs", *QUICK, "trainer.max_epochs=6"]
    process = start(*arguments, cwd=tmp_path)
    seen: list[str] = []
    while "epoch 3/6" not in (line := process.stdout.readline()) or "runs/seed=2\n" not in seen:
        assert line, "".join(seen)
        seen.append(line)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    trials = [tmp_path / "runs" / f"seed={seed}" for seed in (1, 2, 3)]
    deadline = time.monotonic() + 60  # the trial is told that its sweep is gone, saves, and ends
    while not list(trials[1].glob("checkpoints/last.ckpt")) or _running(trials[1]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not (trials[1] / "summary.json").exists()
    first = (trials[0] / "summary.json").stat().st_mtime_ns
    process = start(*arguments, cwd=tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert (trials[0] / "summary.json").stat().st_mtime_ns == first
    for folder in trials:
        with open(folder / "metrics.csv", newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == list("123456")
        assert (folder / "train.log").read_text().count("epoch 2/6") == 1
    whole = start(*arguments, "run_dir=whole", cwd=tmp_path)
    whole.communicate()
    for folder in trials:
        before, after = (
            json.loads((root / "summary.json").read_text()) for root in (tmp_path / "whole" / folder.name, folder)
        )
        assert {k: v for k, v in before.items() if "time" not in k} == {
            k: v for k, v in after.items() if "time" not in k
        }


def _running(folder: Path) -> bool:
    relative = f"{folder.parent.name}/{folder.name}"
    return relative in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_sweep_of_a_recipe_in_a_folder_of_the_users_own(tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nname: own\nrun_dir: runs\n")
    code, output = sweep("--config-dir", "mine", "-m", "experiment=own", "seed=1,2", cwd=tmp_path)
    assert code == 0, output
    for seed in (1, 2):
        assert json.loads((tmp_path / "runs" / f"seed={seed}" / "summary.json").read_text())["name"] == "own"


@pytest.mark.slow
def test_optuna_goes_on_with_its_study(tmp_path):
    pytest.importorskip("optuna", reason="the extra 'sweep' is not installed")
    search = [
        "-m",
        "hydra/sweeper=tune",
        "trainer.best_metric=val/top1",
        "optim.lr=tag(log,interval(1e-4,1e-2))",
        "run_dir=runs",
    ]
    for trials in (2, 1):
        code, output = sweep(*search, f"hydra.sweeper.n_trials={trials}", cwd=tmp_path)
        assert code == 0, output
    with sqlite3.connect(tmp_path / "runs" / "study.db") as database:
        states = [state for (state,) in database.execute("select state from trials")]
        values = [value for (value,) in database.execute("select value from trial_values")]
        (direction,) = database.execute("select direction from study_directions").fetchone()
    assert states == ["COMPLETE"] * 3
    assert direction == "MAXIMIZE"
    rates = {float(path.parent.name.partition("=")[2]) for path in (tmp_path / "runs").glob("*/summary.json")}
    assert rates == {float(f"{rate:.4g}") for rate in rates}  # the study's own values, which name the folders
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert sorted(values) == sorted(summary["val/top1"] for summary in summaries)
    assert (tmp_path / "runs" / "optimization_results.yaml").exists()


@pytest.mark.slow
def test_submitit_runs_the_trials(tmp_path):
    pytest.importorskip("submitit", reason="the extra 'sweep' is not installed")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]
    code, output = sweep("-m", "seed=1,2", "run_dir=runs", *launcher, cwd=tmp_path)
    assert code == 0, output
    assert len(list((tmp_path / "runs").glob("seed=*/summary.json"))) == 2
    assert (tmp_path / "runs" / "sweep.md").exists()


@pytest.mark.slow
def test_twenty_trials_take_the_memory_of_one(tmp_path):
    process = start("-m", "seed=range(0,20)", "run_dir=runs", *QUICK, cwd=tmp_path)
    resident = []
    for line in process.stdout:
        if line.startswith("runs/seed="):  # a trial starts
            status = Path("/proc", str(process.pid), "status").read_text()
            resident.append(int(status.split("VmRSS:")[1].split()[0]))
    process.stdout.close()
    assert process.wait() == 0
    assert len(resident) == 20
    # a trial takes hundreds of MiB; of each, Hydra keeps the configuration
    assert resident[-1] - resident[1] < 19 * 200, resident  # KiB
