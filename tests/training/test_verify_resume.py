"""scripts/verify_resume.py."""

import os
import shutil
import sys

import pytest
import torch

from tests.helpers import EMA, RANDOM, SMALL, SMALL_MODEL
from tests.processes import TRAIN, Command

LONG = ["trainer.max_epochs=6", "trainer.limit_train_batches=20", "trainer.accumulate_grad_batches=2"]


@pytest.fixture
def script(load_script):
    return load_script("verify_resume")


def test_the_verdict(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "start", lambda options, run_dir: Command([*options, f"run_dir={run_dir}"], tmp_path))
    assert script.main(["--kills", "2", "--output", "proof", *SMALL, SMALL_MODEL, *RANDOM, *EMA]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "the same run: weights, averages, optimizer states and metrics are equal bit for bit"
    assert printed[-2].startswith("2 kills, ")


def test_runs_are_started_by_train_py(script, monkeypatch):
    commands = []
    monkeypatch.setattr(script.subprocess, "Popen", lambda command, **kwargs: commands.append(command))
    script.start(["seed=1"], "folder")
    assert commands == [[sys.executable, str(TRAIN), "seed=1", "run_dir=folder"]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_25_kills(script, capsys, workers):
    options = [*SMALL, *RANDOM, *EMA, *LONG, f"data.num_workers={workers}"]
    assert script.main(["--kills", "25", "--seed", str(workers), "--output", "proof", *options]) == 0
    kills, _, inside, *_ = capsys.readouterr().out.splitlines()[-2].split()
    assert int(kills) == 25
    assert int(inside) > 0


@pytest.fixture
def pair(whole, tmp_path):
    """A run and its copy."""
    shutil.copytree(whole, tmp_path / "broken")
    return whole, tmp_path / "broken"


@pytest.mark.parametrize(
    "part", ["state_dict", "state_dict_ema", "optimizer_states", "ranks", "train_totals", "metrics.csv"]
)
def test_one_altered_bit_is_detected(script, pair, part):
    whole, broken = pair
    script.check(whole, broken)
    if part == "metrics.csv":
        text = (broken / part).read_text()
        (broken / part).write_text(text.replace("\n1,2,", "\n1,3,", 1))
    else:
        path = broken / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        if part == "train_totals":
            checkpoint[part][0][0] = 1e-300
        else:
            first_tensor(checkpoint[part]).view(torch.uint8).view(-1)[0] ^= 1
        os.unlink(path)
        torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=f"NOT the same run: (last.ckpt: )?{part} differ"):
        script.check(whole, broken)


def first_tensor(value):
    if isinstance(value, torch.Tensor) and value.dim():
        return value
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for entry in entries if (found := first_tensor(entry)) is not None), None)


def test_wrong_requests(script, tmp_path, capsys):
    assert script.main(["optim.lrr=1"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert script.main(["--output", "full"]) == 2
    assert "is not empty" in capsys.readouterr().err
