"""train.py as a user meets it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import TRAIN, Command, finish, wait_for

QUICK = [
    "trainer.accelerator=cpu", "data.num_workers=0", "optim.warmup_epochs=0", "trainer.limit_train_batches=2",
    "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}",
    "logger.report=false",
]  # fmt: skip


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TRAIN, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def no_torch(tmp_path_factory, monkeypatch):
    """Makes every import of torch or timm in a new process an error."""
    folder = tmp_path_factory.mktemp("no_torch")
    for name in ("torch", "timm"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported before the request was checked')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=cifar10", "optim.lrr=1"], "optim.lr"),
        (["optim.lr=abc"], "optim.lr"),
        (["data=cifar11"], "cifar10"),
        (["trainer.max_epochs=0"], "at least 1"),
        (["resume=nowhere"], "nowhere"),
        (["-m", "seed=1,2", "optim.lrr=1"], "optim.lr"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["-cn", "nosuch"], "there is no nosuch.yaml"),
        (["-cd", "/nonexistent"], "there is no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_refused_before_torch_is_imported(arguments, expected, tmp_path, no_torch):
    result = train(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert "Traceback" not in result.stderr + result.stdout
    assert not list(tmp_path.iterdir())


def test_an_unknown_backend_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQUENCER_BACKEND", "trition")
    result = train(cwd=tmp_path)
    assert result.returncode == 2
    expected = "train.py: SEQUENCER_BACKEND=trition: there are auto, triton, fused, torch, reference\n"
    assert result.stderr == expected
    assert not list(tmp_path.iterdir())


def test_help_lists_groups_and_choices(tmp_path, no_torch):
    result = train("--help", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("data: ", "cifar10", "experiment: ", "logger: ", "wandb", "resume=", "init_from="):
        assert word in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_request_that_data_refuses_leaves_nothing(tmp_path):
    result = train("data=cifar10", "data.root=nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert "data.download=true" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_run_resume_and_finish(tmp_path):
    def succeed(*arguments: str) -> str:
        return finish([Command(arguments, tmp_path)])

    assert "epoch 1/1" in succeed("run_dir=run", "trainer.max_epochs=1", *QUICK)
    more = succeed("resume=run", "trainer.max_epochs=2")
    assert "epoch 2/2" in more
    assert more.startswith("resuming in epoch 2 of 2, after 2 updates, from\nrun/checkpoints/last.ckpt\n")
    again = succeed("resume=run")
    assert again.startswith(
        "nothing is left to do: this run has finished its 2 epochs; for more:\n"
        "python train.py resume=run trainer.max_epochs=4\n"
    )
    assert "epoch 1/" not in again
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2


def test_ctrl_c(tmp_path):
    process = Command(["run_dir=run", "trainer.max_epochs=500", *QUICK], tmp_path)
    wait_for(tmp_path / "run" / "train.log", "epoch   2/500")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; resume with:\npython train.py resume=run\n" in output
    assert errors == "interrupted\n"
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert not list(tmp_path.rglob("*.partial"))
