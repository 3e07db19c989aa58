"""Several processes on the CPU's backend, as torchrun starts them: the same run as one process makes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sequencer.models import read_checkpoint
from sequencer.training import run
from sequencer.training.random_state import seed_rank
from tests.training.conftest import SMALL, SMALL_MODEL
from tests.training.test_run import RANDOM, assert_same_run, rows, same

TRAIN = Path(__file__).parents[2] / "train.py"
EMA = ["optim.ema_decay=0.9"]
LONG = [
    "trainer.max_epochs=4",
    "trainer.limit_train_batches=15",
    "trainer.accumulate_grad_batches=2",
    "data.batch_size=36",
]
CALM = ["data.augment.mixup=0", "model.drop_path_rate=0"]  # nothing that each process draws for itself


@pytest.fixture
def torchrun(tmp_path):
    """`torchrun(processes, run_dir, *overrides, restarts=0)` starts a small run on the digits."""

    def start(processes: int, run_dir: str, *overrides: str, restarts: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", str(TRAIN), *SMALL, SMALL_MODEL, *overrides, f"run_dir={run_dir}"]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            preexec_fn=heed_ctrl_c,
        )

    return start


def heed_ctrl_c() -> None:
    """Whoever runs the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no {text!r} in {path}")


def workers(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def assert_close(a: Path, b: Path) -> None:
    """The same run but for the order of sums."""
    x, y = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (a, b))
    for slot in ("state_dict", "state_dict_ema"):
        for name, tensor in x[slot].items():
            torch.testing.assert_close(tensor, y[slot][name], rtol=1e-3, atol=1e-5)
    for one, other in zip(rows(a), rows(b), strict=True):
        for name in ("train/loss", "val/loss", "val_ema/loss"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)
        assert (one["step"], one["lr"], one["val/top1"]) == (other["step"], other["lr"], other["val/top1"])


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_make_the_run_of_one(config, torchrun, tmp_path, processes):
    """143 images to validate and 359 to test are shared evenly by none of them."""
    process = torchrun(processes, "many", *CALM, *EMA, *LONG)
    one = run(config(*CALM, *EMA, *LONG, run_dir="one"))
    output = finish(process)
    assert_close(tmp_path / "one", tmp_path / "many")
    shared = json.loads((tmp_path / "many" / "summary.json").read_text())
    assert shared["test/top1"] == one["test/top1"]
    assert shared["test/loss"] == pytest.approx(one["test/loss"], rel=1e-5)
    assert f"batch 72: {36 // processes} on each of {processes} devices, 2 passes an update" in output
    assert output.count("epoch 1/4") == 1  # one process speaks


def test_gradients_are_those_of_one_process(config, torchrun, tmp_path):
    """One update of plain gradient descent at rate 1 from the same weights: they differ by the gradients."""
    plain = ["optim.opt=momentum", "optim.momentum=0", "optim.lr=1", "optim.sched=constant", "optim.weight_decay=0"]
    plain += ["trainer.gradient_clip_val=null", "trainer.max_epochs=1", "trainer.limit_train_batches=2", *CALM]
    plain += ["trainer.accumulate_grad_batches=2", "data.batch_size=36", "data.augment.smoothing=0.1"]
    process = torchrun(2, "two", *plain)
    run(config(*plain, run_dir="one"))
    run(config(*plain, "optim.lr=0", run_dir="start"))
    finish(process)
    start, one, two = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("start", "one", "two")
    )
    for name, weights in start.items():
        torch.testing.assert_close(two[name] - weights, one[name] - weights, rtol=1e-4, atol=3e-7)
    assert max(float((one[name] - weights).abs().max()) for name, weights in start.items()) > 0.01


def test_stopped_killed_or_shared_otherwise_it_is_the_same_run(torchrun, tmp_path):
    options = [*RANDOM, *EMA, *LONG, "trainer.checkpoint_interval=0"]
    finish(torchrun(2, "whole", *options))

    stopped = torchrun(2, "stopped", *options)
    wait_for(tmp_path / "stopped" / "train.log", "epoch 1/4")
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.communicate(timeout=60)
    assert len(rows(tmp_path / "stopped")) < 4
    finish(torchrun(2, "stopped", *options))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")

    killed = torchrun(2, "killed", *options, restarts=1)
    wait_for(tmp_path / "killed" / "train.log", "epoch 2/4")
    os.kill(workers(killed)[-1], signal.SIGKILL)
    finish(killed)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_goes_on_with_another_number_of_processes(config, torchrun, tmp_path):
    options = [*CALM, *EMA, *LONG]
    whole = run(config(*options, run_dir="whole"))
    process = torchrun(2, "moved", *options)
    wait_for(tmp_path / "moved" / "train.log", "epoch 1/4")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    process.communicate(timeout=60)
    assert len(rows(tmp_path / "moved")) < 4
    moved = run(config(*options, run_dir="moved"), resume=True)
    assert_close(tmp_path / "whole", tmp_path / "moved")
    assert moved["test/top1"] == whole["test/top1"]


def test_random_states_differ_between_processes():
    draws = []
    for rank in (0, 1):
        seed_rank(0, 0, rank)
        draws.append(torch.rand(4))
    assert not same({"x": draws[0]}, {"x": draws[1]})


def test_restarts_need_a_folder_of_ones_own(tmp_path):
    environment = {**os.environ, "TORCHELASTIC_MAX_RESTARTS": "1"}
    done = subprocess.run([sys.executable, TRAIN], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run_dir" in done.stderr


def test_batches_are_shared_evenly_or_refused(tmp_path):
    command = [sys.executable, TRAIN, "trainer.accelerator=cpu", "trainer.devices=3", "data.batch_size=64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "data.batch_size=64 cannot be shared evenly by 3 devices" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_machines(config, tmp_path):
    options = [*CALM, *EMA, *LONG]
    whole = run(config(*options, run_dir="whole"))
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
        command += ["--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port=29517", str(TRAIN)]
        command += [*SMALL, SMALL_MODEL, *options, "run_dir=two"]
        agents.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for agent in agents:
        finish(agent)
    assert_close(tmp_path / "whole", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["test/top1"] == whole["test/top1"]


@pytest.mark.slow
def test_slurm_stops_requeues_and_goes_on(config, tmp_path):
    """The batch script with stand-ins for SLURM's commands: SIGTERM saves and requeues, the next job finishes."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path / "requeued"}\n'
    )
    (stubs / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (stubs / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7"}
    environment = {**os.environ, **job, "PATH": f"{stubs}:{os.environ['PATH']}"}
    options = [*SMALL, SMALL_MODEL, *CALM, *EMA, *LONG, "trainer.precision='32'", "trainer.checkpoint_interval=0"]
    command = ["bash", str(TRAIN.parent / "scripts" / "slurm.sh"), str(tmp_path / "run"), *options]

    def submit() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=TRAIN.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = submit()
    wait_for(tmp_path / "run" / "train.log", "epoch 1/4")
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert len(rows(tmp_path / "run")) < 4
    finish(submit())
    run(config(*CALM, *EMA, *LONG, run_dir="whole"))
    assert_close(tmp_path / "whole", tmp_path / "run")
