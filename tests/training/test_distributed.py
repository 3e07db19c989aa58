"""Several ranks on the CPU make the same run as one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sequencer import distributed
from sequencer.config import RequestError
from sequencer.training import run
from sequencer.training.random_state import seed_rank
from sequencer.training.setup import build_parts
from tests.helpers import RANDOM, SMALL, SMALL_MODEL, assert_same_run, read_last, read_rows
from tests.processes import TRAIN, Command, finish, heed_ctrl_c, start_ranks, wait_for

EMA = ["optim.ema_decay=0.9"]
LONG = [
    "trainer.max_epochs=4",
    "trainer.limit_train_batches=15",
    "trainer.accumulate_grad_batches=2",
    "data.batch_size=36",
]
CALM = ["data.augment.mixup=0", "model.drop_path_rate=0"]  # nothing that each rank draws for itself
QUICK = [*SMALL, SMALL_MODEL]


def torchrun(folder: Path, processes: int, *overrides: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Starts a small run on the digits by torchrun, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", str(TRAIN), *QUICK, *overrides]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
        preexec_fn=heed_ctrl_c,
    )


def workers(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def succeed(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def assert_close(a: Path, b: Path) -> None:
    """Compares two runs up to the order of sums."""
    x, y = read_last(a), read_last(b)
    for slot in ("state_dict", "state_dict_ema"):
        assert x[slot].keys() == y[slot].keys()
        for name, tensor in x[slot].items():
            torch.testing.assert_close(tensor, y[slot][name], rtol=1e-3, atol=1e-5)
    for one, other in zip(read_rows(a), read_rows(b), strict=True):
        for name in ("train/loss", "val/loss", "val_ema/loss"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)
        assert (one["step"], one["lr"], one["val/top1"]) == (other["step"], other["lr"], other["val/top1"])


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> Path:
    """The folder of a run of one rank, not to be changed."""
    folder = tmp_path_factory.mktemp("one")
    finish(start_ranks(1, [*QUICK, *CALM, *EMA, *LONG, "run_dir=run"], folder))
    return folder / "run"


def summary(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_ranks_make_the_run_of_one(of_one, tmp_path, ranks):
    """Neither 2 nor 3 divides the 143 images of validation or the 359 of the test split."""
    output = finish(start_ranks(ranks, [*QUICK, *CALM, *EMA, *LONG, "run_dir=many"], tmp_path))
    assert_close(of_one, tmp_path / "many")
    one, many = summary(of_one), summary(tmp_path / "many")
    assert many["test/top1"] == one["test/top1"]
    assert many["test/loss"] == pytest.approx(one["test/loss"], rel=1e-5)
    assert f"batch 72 ({36 // ranks} x {ranks} devices" in output
    assert output.count("epoch 1/4") == 1  # only rank 0 prints
    for row in read_rows(tmp_path / "many"):  # the images of all ranks, in a part of the epoch's time
        assert 15 * 36 / float(row["time/images_per_s"]) < float(row["time/epoch_s"]) + 0.001


def test_gradients_are_those_of_one_rank(config, tmp_path):
    """After one update of plain gradient descent at rate 1, the weights differ from the first ones by the gradients."""
    plain = ["optim.opt=momentum", "optim.momentum=0", "optim.lr=1", "optim.sched=constant", "optim.weight_decay=0"]
    plain += ["trainer.gradient_clip_val=null", "trainer.max_epochs=1", "trainer.limit_train_batches=2", *CALM]
    plain += ["trainer.accumulate_grad_batches=2", "data.batch_size=36", "data.augment.smoothing=0.1"]
    ranks = start_ranks(2, [*QUICK, *plain, "run_dir=two"], tmp_path)
    run(config(*plain, run_dir="one"))
    run(config(*plain, "optim.lr=0", run_dir="start"))
    finish(ranks)
    start, one, two = (read_last(tmp_path / name)["state_dict"] for name in ("start", "one", "two"))
    for name, weights in start.items():
        torch.testing.assert_close(two[name] - weights, one[name] - weights, rtol=1e-4, atol=3e-7)
    assert max(float((one[name] - weights).abs().max()) for name, weights in start.items()) > 0.01


def test_ranks_killed_restarted_stopped_and_resumed_make_the_same_run(tmp_path):
    """As torchrun does it: all ranks are started again on the store of the first start, and receive SIGTERM."""
    options = [*QUICK, *RANDOM, *EMA, *LONG, "trainer.checkpoint_interval=0", "trainer.max_epochs=6"]
    options += ["trainer.limit_train_batches=6"]
    finish(start_ranks(2, [*options, "run_dir=whole"], tmp_path))
    log = tmp_path / "broken" / "train.log"
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(count: int) -> list[Command]:
        agent = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": count}
        return start_ranks(2, [*options, "run_dir=broken"], tmp_path, agent)

    first = start(0)
    wait_for(log, " INFO epoch ")
    first[1].send_signal(signal.SIGKILL)
    first[0].send_signal(signal.SIGTERM)
    for rank in first:
        rank.communicate(60)
    done = log.read_text().count(" INFO epoch ")
    second = start(1)
    wait_for(log, " INFO epoch ", times=done + 1)
    for rank in second:
        rank.send_signal(signal.SIGTERM)
    assert [(rank.communicate(60), rank.returncode)[1] for rank in second] == [143, 143]
    assert len(read_rows(tmp_path / "broken")) < 6
    finish(start_ranks(2, [*options, "run_dir=broken"], tmp_path))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_run_killed_restarted_stopped_and_resumed_is_the_same_run(tmp_path):
    """torchrun restarts the ranks when one is killed, and passes on SIGTERM; the same command resumes the run."""
    options = [*RANDOM, *EMA, *LONG, "trainer.checkpoint_interval=0", "trainer.max_epochs=8"]
    finish(start_ranks(2, [*QUICK, *options, "run_dir=whole"], tmp_path))
    broken, log = torchrun(tmp_path, 2, *options, "run_dir=broken", restarts=1), tmp_path / "broken" / "train.log"
    wait_for(log, " INFO epoch ")
    os.kill(workers(broken)[-1], signal.SIGKILL)
    wait_for(log, " parameters\n", times=2)  # the end of the first line of each start
    wait_for(log, " INFO epoch ", times=log.read_text().count(" INFO epoch ") + 1)
    os.kill(broken.pid, signal.SIGTERM)
    broken.communicate(timeout=60)
    assert len(read_rows(tmp_path / "broken")) < 8
    finish(start_ranks(2, [*QUICK, *options, "run_dir=broken"], tmp_path))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_is_resumed_by_another_number_of_ranks(config, of_one, tmp_path):
    options = [*CALM, *EMA, *LONG]
    ranks = start_ranks(2, [*QUICK, *options, "run_dir=run"], tmp_path)
    wait_for(tmp_path / "run" / "train.log", "epoch 1/4")
    for rank in ranks:  # as Ctrl-C in a terminal does
        rank.send_signal(signal.SIGINT)
    assert [(rank.communicate(60), rank.returncode)[1] for rank in ranks] == [130, 130]
    assert len(read_rows(tmp_path / "run")) < 4
    resumed = run(config(*options), resume=True)
    assert_close(of_one, tmp_path / "run")
    assert resumed["test/top1"] == summary(of_one)["test/top1"]


def test_random_states_differ_between_ranks():
    draws = []
    for rank in (0, 1):
        seed_rank(0, 0, rank)
        draws.append(torch.rand(4))
    assert not torch.equal(*draws)


def test_restarted_ranks_do_not_read_the_keys_of_those_before_them(monkeypatch):
    """torchrun keeps one store over all restarts."""
    kept, stores = torch.distributed.HashStore(), []
    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(kept, 0, 2)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, store, **kwargs: stores.append(store))
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    for count in ("0", "1"):
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": count}.items():
            monkeypatch.setenv(name, value)
        distributed.join(gpu=False)
    stores[0].set("address", "of a rank that was killed")
    assert stores[0].check(["address"])
    assert not stores[1].check(["address"])


def test_restarts_need_a_run_dir(tmp_path):
    environment = {**os.environ, "TORCHELASTIC_MAX_RESTARTS": "1"}
    done = subprocess.run([sys.executable, TRAIN], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run_dir" in done.stderr


def test_a_batch_that_devices_do_not_divide_is_refused(config, tmp_path):
    with pytest.raises(RequestError, match=r"data\.batch_size=64 cannot be shared evenly by 3 devices"):
        run(config("trainer.devices=3", "data.batch_size=64"))
    assert not list(tmp_path.iterdir())


def test_several_devices_start_torchrun(config, monkeypatch):
    class Replaced(Exception):
        """Stands for the process that `os.execve` replaces this one by."""

    def execve(program, arguments, environment):
        raise Replaced(program, arguments)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["train.py", "trainer.devices=2"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "train.py", raising=False)  # a worker of xdist has none
    with pytest.raises(Replaced) as replaced:
        run(config("trainer.devices=2"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert replaced.value.args == (sys.executable, [sys.executable, *launcher, "train.py", "trainer.devices=2"])


def test_the_variables_of_other_launchers_do_not_count(config, monkeypatch):
    """As in a shell that `salloc --ntasks=4` has opened."""
    for name, value in {"NTASKS": 4, "PROCID": 2, "LOCALID": 2, "JOB_ID": 1, "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    trainer = build_parts(config()).trainer
    assert (trainer.world_size, trainer.is_global_zero) == (1, True)


def test_a_notebook_is_not_replaced_by_torchrun(config, monkeypatch):
    monkeypatch.setattr(os, "execve", pytest.fail)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(RequestError, match=r"trainer\.devices=2 starts this script again .* a notebook or a prompt"):
        run(config("trainer.devices=2"))


@pytest.mark.slow
def test_two_machines(of_one, tmp_path):
    options = [*CALM, *EMA, *LONG]
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
        command += ["--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port=29517", str(TRAIN)]
        command += [*QUICK, *options, "run_dir=two"]
        agents.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for agent in agents:
        succeed(agent)
    assert_close(of_one, tmp_path / "two")
    assert summary(tmp_path / "two")["test/top1"] == summary(of_one)["test/top1"]


@pytest.mark.slow
def test_the_slurm_script_saves_requeues_and_resumes(of_one, tmp_path):
    """With stand-ins for SLURM's commands: SIGTERM saves and requeues the job, the next job finishes the run."""
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
    options = [*QUICK, *CALM, *EMA, *LONG, "trainer.precision='32'", "trainer.checkpoint_interval=0"]
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
    assert len(read_rows(tmp_path / "run")) < 4
    succeed(submit())
    assert_close(of_one, tmp_path / "run")
