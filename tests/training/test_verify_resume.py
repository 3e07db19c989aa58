"""scripts/verify_resume.py: its verdict, and the long proof that it gives."""

import os
import shutil

import pytest
import torch

from sequencer.training import run
from tests.training.conftest import SMALL, SMALL_MODEL
from tests.training.test_run import EMA, RANDOM

LONG = ["trainer.max_epochs=6", "trainer.limit_train_batches=20", "trainer.accumulate_grad_batches=2"]


@pytest.fixture
def script(load_script):
    return load_script("verify_resume")


def test_the_verdict(script, capsys):
    assert script.main(["--kills", "2", "--output", "proof", *SMALL, SMALL_MODEL, *RANDOM, *EMA]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "the same run: weights, averages, optimizer states and metrics are equal bit for bit"
    assert printed[-2].startswith("2 kills, ")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_25_kills(script, capsys, workers):
    options = [*SMALL, *RANDOM, *EMA, *LONG, f"data.num_workers={workers}"]
    assert script.main(["--kills", "25", "--seed", str(workers), "--output", "proof", *options]) == 0
    kills, _, inside, *_ = capsys.readouterr().out.splitlines()[-2].split()
    assert int(kills) == 25
    assert int(inside) > 0


@pytest.fixture
def pair(config, tmp_path):
    """A run and its copy."""
    run(config(*EMA, run_dir="whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    return tmp_path / "whole", tmp_path / "broken"


@pytest.mark.parametrize("part", ["state_dict", "state_dict_ema", "optimizer_states", "ranks", "metrics.csv"])
def test_one_bit_is_seen(script, pair, part):
    whole, broken = pair
    script.check(whole, broken)
    if part == "metrics.csv":
        text = (broken / part).read_text()
        (broken / part).write_text(text.replace("0,4,", "0,5,", 1))
    else:
        path = broken / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        tensor = first_tensor(checkpoint[part])
        tensor.view(torch.uint8).view(-1)[0] ^= 1
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
