"""A W&B that is down, slow or broken, or whose disk is full, neither blocks nor fails training."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread, Timer

import pytest
from pytorch_lightning.utilities import rank_zero_only

from sequencer.tracking import wandb_guard
from sequencer.tracking.loggers import close_log, start_log
from sequencer.tracking.wandb_guard import WandbGuard, _start_worker
from sequencer.training import run
from tests.helpers import SMALL_MODEL
from tests.processes import TRAIN, heed_ctrl_c

KEY = "0123456789" * 4
pytestmark = pytest.mark.usefixtures("unrendered")

FAKE = """
import json, os, time

mode = None

def call(name, *arguments):
    trouble = os.environ.get("TROUBLE", "").split(", ")
    if f"{mode} {name} raises" in trouble:
        raise OSError(28, "No space left on device")
    if f"{mode} {name} is late" in trouble:
        raise TimeoutError
    if f"{mode} {name} dies" in trouble:
        os._exit(9)
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([mode, name, *arguments, os.getpid()]) + "\\n")
    if f"{mode} {name} hangs" in trouble:
        time.sleep(600)

def Image(path):
    return {"picture": path}

def init(**arguments):
    global mode
    mode = arguments["mode"]
    call("init", arguments)
    return Run(arguments["dir"])

class Run:
    def __init__(self, folder):
        self.dir = f"{folder}/wandb/{mode}-run/files"

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row, step, commit):
        call("log", row, step)

    def finish(self, exit_code):
        call("finish", exit_code)
"""


class Fake:
    """A module named wandb in place of the real one, which records its calls and fails as it is told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes = folder / "calls"
        (folder / "fake").mkdir()
        (folder / "fake" / "wandb.py").write_text(FAKE)
        monkeypatch.setenv("PYTHONPATH", str(folder / "fake"))
        monkeypatch.setenv("CALLS", str(self.notes))
        self._monkeypatch = monkeypatch

    def fails(self, *troubles: str) -> None:
        self._monkeypatch.setenv("TROUBLE", ", ".join(troubles))

    def calls(self, mode: str, name: str) -> list[list]:
        notes = [json.loads(line) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        return [arguments for at, called, *arguments, _ in notes if (at, called) == (mode, name)]

    def wait_for(self, mode: str, name: str) -> int:
        """Waits until `name` has been called; returns the process that called it."""
        deadline = time.monotonic() + 30
        while not self.calls(mode, name):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return json.loads(self.notes.read_text().splitlines()[-1])[-1]


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


@pytest.fixture
def train_log(tmp_path) -> Iterator[Path]:
    start_log(tmp_path / "train.log")
    yield tmp_path / "train.log"
    close_log()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def start(folder: Path, mode: str = "online") -> WandbGuard:
    guard = WandbGuard(mode, project="p", entity=None, name="n", dir=str(folder), id="abcd1234", resume="allow")
    guard.start()
    return guard


def log_and_close(guard: WandbGuard, rows: int = 3, status: str = "success") -> float:
    """Logs `rows` rows, ends the run, and returns how long `close` took."""
    for step in range(rows):
        guard.log_metrics({"x": step / 2}, step)
    guard.finalize(status)
    if status == "success":
        guard.log_result({"test/x": 0.5}, {"p": Path("p.png")}, rows - 1)
    started = time.monotonic()
    guard.close()
    return time.monotonic() - started


def warnings(path: Path) -> list[str]:
    return [line.split(" WARNING ")[1] for line in path.read_text().splitlines() if " WARNING " in line]


def logged(rows: int = 3) -> list[list]:
    return [[{"x": step / 2, "trainer/global_step": step}, step] for step in range(rows)]


def with_result(rows: int = 3, last: int = 2) -> list[list]:
    result = {"test/x": 0.5, "trainer/global_step": last, "p": {"picture": "p.png"}}
    return [*logged(rows), [result, None]]


@pytest.mark.parametrize(("status", "exit_code"), [("success", 0), ("failed", 1)])
def test_rows_arrive_in_order(fake, train_log, tmp_path, status, exit_code):
    log_and_close(start(tmp_path), status=status)
    assert fake.calls("online", "init")[0][0]["id"] == "abcd1234"
    assert fake.calls("online", "log") == (with_result() if status == "success" else logged())
    assert fake.calls("online", "finish") == [[exit_code]]
    assert "INFO W&B logs online\n" in train_log.read_text()
    assert not warnings(train_log)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("online init raises", "[Errno 28] No space left on device"),
        ("online init dies", "its process died"),
        ("online init hangs", "no answer within 2 s"),
        ("online log raises", "[Errno 28] No space left on device"),
        ("online log dies", "its process died"),
        ("online finish raises", "[Errno 28] No space left on device"),
    ],
)
def test_what_fails_online_is_kept_offline(fake, train_log, tmp_path, monkeypatch, trouble, reason):
    monkeypatch.setattr(wandb_guard, "INIT_LIMIT", 2.0)
    fake.fails(trouble)
    log_and_close(start(tmp_path))
    assert fake.calls("offline", "init")[0][0]["id"] == "abcd1234"
    assert fake.calls("offline", "log") == with_result()
    assert fake.calls("offline", "finish") == [[0]]
    command = f"wandb sync {tmp_path}/wandb/offline-run"
    assert warnings(train_log) == [f"W&B failed ({reason}): it logs offline; send what it lacks with: {command}"]


def test_a_failure_is_noticed_at_the_next_row(fake, train_log, tmp_path):
    fake.fails("online log raises")
    guard = start(tmp_path)
    guard.log_metrics({"x": 0.0}, 0)
    time.sleep(1)  # until the worker has failed
    guard.log_metrics({"x": 0.5}, 1)
    fake.wait_for("offline", "log")
    assert "W&B failed ([Errno 28] No space left on device): it logs offline" in warnings(train_log)[0]
    log_and_close(guard, rows=0)
    assert fake.calls("offline", "log") == with_result(2, last=-1)


def test_wandb_that_fails_offline_too_is_given_up(fake, train_log, tmp_path):
    fake.fails("online init raises", "offline init raises")
    log_and_close(start(tmp_path))
    expected = "W&B is given up ([Errno 28] No space left on device); metrics.csv has every row"
    assert warnings(train_log) == [expected]


def test_wandb_that_cannot_be_imported_is_given_up(fake, train_log, tmp_path):
    (tmp_path / "fake" / "wandb.py").write_text("raise ImportError('no protobuf')")
    log_and_close(start(tmp_path))
    assert warnings(train_log) == ["W&B is given up (no protobuf); metrics.csv has every row"]


def test_the_log_names_what_could_not_be_sent_in_time(fake, train_log, tmp_path):
    fake.fails("online finish is late")
    log_and_close(start(tmp_path))
    command = f"wandb sync {tmp_path}/wandb/online-run"
    expected = f"W&B did not take everything within 20 s; send what it lacks with: {command}"
    assert warnings(train_log) == [expected]
    assert not fake.calls("offline", "init")


@pytest.mark.parametrize(("status", "limit"), [("success", "FINISH_LIMIT"), ("failed", "INTERRUPT_LIMIT")])
def test_a_finish_that_never_returns(fake, train_log, tmp_path, monkeypatch, status, limit):
    """The run does not wait for it, and its process does not stay behind."""
    monkeypatch.setattr(wandb_guard, "FINISH_LIMIT", 1.5)
    monkeypatch.setattr(wandb_guard, "INTERRUPT_LIMIT", 0.7)
    fake.fails("online finish hangs")
    guard = start(tmp_path)
    guard.log_metrics({"x": 0.0}, 0)
    fake.wait_for("online", "log")
    waited = log_and_close(guard, rows=0, status=status)
    assert getattr(wandb_guard, limit) - 0.5 < waited < getattr(wandb_guard, limit) + 1
    command = f"wandb sync {tmp_path}/wandb/online-run"
    assert warnings(train_log) == [f"W&B has not finished in time; send what it lacks with: {command}"]
    guard._thread.join(10)  # the process ends by itself
    with pytest.raises(ProcessLookupError):
        os.kill(fake.wait_for("online", "finish"), 0)
    assert not fake.calls("offline", "init")


@pytest.mark.parametrize("trouble", ["online init hangs", "online log hangs"])
def test_logging_never_waits(fake, train_log, tmp_path, monkeypatch, trouble):
    monkeypatch.setattr(wandb_guard, "INTERRUPT_LIMIT", 0.0)
    fake.fails(trouble)
    guard = start(tmp_path)
    guard.log_metrics({"x": 0.0}, 0)
    process = fake.wait_for("online", trouble.split()[1])
    started = time.monotonic()
    for step in range(20_000):  # more than a pipe holds
        guard.log_metrics({"x": 0.0}, step)
    assert time.monotonic() - started < 20  # seconds; a full pipe would hold it for ever
    assert log_and_close(guard, rows=0, status="failed") < 2
    os.kill(process, signal.SIGKILL)
    guard._thread.join(10)
    assert not guard._thread.is_alive()
    assert not fake.calls("offline", "init")  # a closed guard starts nothing more


def test_a_training_process_that_is_killed_leaves_a_failed_run(fake, tmp_path):
    process, guard = _start_worker()
    with guard:
        guard.send(({"init": 20.0, "finish": 20.0}, {"mode": "online", "dir": str(tmp_path)}))
        guard.send(({"x": 0.0, "trainer/global_step": 0}, 0, {}))
        assert guard.recv() == f"{tmp_path}/wandb/online-run"
    assert process.wait(timeout=20) == 0
    assert fake.calls("online", "log") == logged(1)
    assert fake.calls("online", "finish") == [[1]]


@pytest.mark.parametrize("name", ["init", "finish"])
def test_a_worker_left_alone_does_not_outlive_its_limits(fake, tmp_path, name):
    fake.fails(f"online {name} hangs")
    process, guard = _start_worker()
    with guard:
        guard.send(({"init": 1.0, "finish": 1.0}, {"mode": "online", "dir": str(tmp_path)}))
        if name == "finish":
            guard.recv()
    assert process.wait(timeout=20) == 1
    assert fake.calls("online", name)


def test_other_ranks_log_nothing(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    guard = start(tmp_path)
    log_and_close(guard)
    assert not guard._thread.is_alive()
    assert not fake.calls("online", "init")


def test_runs_of_one_process_are_kept_apart_and_a_resumed_one_goes_on(fake, config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("a", "b"):
        run(config("logger=wandb", "name=" + name, run_dir=name))
    run(config("logger=wandb", "name=a", "trainer.max_epochs=3", run_dir="a"), resume=True)
    first, second, resumed = (arguments for (arguments,) in fake.calls("online", "init"))
    assert [first["name"], second["name"], resumed["name"]] == ["a", "b", "a"]
    assert first["id"] == resumed["id"] == (tmp_path / "a" / "wandb_id").read_text()
    assert first["id"] != second["id"]
    assert first["resume"] == "allow"
    assert first["project"] == "sequencer"
    assert first["config"]["optim"]["opt"] == "adamw"
    assert [step for _, step in fake.calls("online", "log")] == [3, 7, None, 3, 7, None, 11, None]
    assert "val/top1" in fake.calls("online", "log")[0][0]
    assert fake.calls("online", "finish") == [[0]] * 3


def test_a_server_that_never_answers(config, tmp_path, monkeypatch, silent_server):
    """The real wandb: training ends long before the online run is given up, and every row is kept."""
    monkeypatch.setattr(wandb_guard, "INIT_LIMIT", 5.0)
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    started = time.time()
    run(config("logger=wandb"))
    folder = tmp_path / "run"
    assert (folder / "summary.json").stat().st_mtime - (folder / "wandb_id").stat().st_mtime < 5
    assert 5 < time.time() - started < 45
    assert "W&B failed (no answer within 5 s): it logs offline" in (folder / "train.log").read_text()
    (data,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert data.read_bytes().count(b"val/top1") >= 2


def test_a_folder_that_cannot_be_written(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(config("trainer.max_epochs=1"))
    (tmp_path / "run" / "wandb").touch()
    run(config("logger=wandb", "trainer.max_epochs=2"), resume=True)
    assert (tmp_path / "run" / "summary.json").exists()
    (warning,) = warnings(tmp_path / "run" / "train.log")
    assert warning.startswith("W&B is given up ([Errno 20] Not a directory")


def test_a_full_disk(train_log, tmp_path):
    """wandb does not report it; nothing fails or waits."""
    (tmp_path / "wandb").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "wandb")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        waited = log_and_close(start(tmp_path, "offline"), rows=3000)
        assert os.statvfs(tmp_path / "wandb").f_bavail == 0
        assert waited < 30
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "wandb")], check=True)


class Stalling(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs to start; after two seconds it stops answering."""

    stalls = Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"UpsertBucket" in body:
            Timer(2, self.stalls.set).start()
        if self.stalls.is_set():
            time.sleep(60)
        bucket = {"id": "1", "name": "abcd1234", "displayName": "n", "config": "{}", "historyLineCount": 0}
        bucket["project"] = {"id": "1", "name": "p", "entity": {"name": "me"}}
        viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        data = {"viewer": viewer, "model": {"bucket": None}, "upsertBucket": {"bucket": bucket, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.slow
def test_a_server_that_goes_down_in_the_middle(train_log, tmp_path, monkeypatch):
    """The real wandb: what was not sent is complete in the folder that the log names."""
    monkeypatch.setattr(wandb_guard, "SEND_LIMIT", 5.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        guard = start(tmp_path)
        assert Stalling.stalls.wait(30)
        waited = log_and_close(guard, rows=5)
        server.shutdown()
    assert 4 < waited < wandb_guard.FINISH_LIMIT
    (warning,) = warnings(train_log)
    folder = Path(warning.removeprefix("W&B did not take everything within 5 s; send what it lacks with: wandb sync "))
    (data,) = folder.glob("*.wandb")
    assert data.read_bytes().count(b"trainer/global_step") >= 5


def train(tmp_path: Path, server: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, TRAIN, "logger=wandb", "run_dir=run", "trainer.accelerator=cpu", "data.num_workers=0",
         "optim.warmup_epochs=0", "trainer.limit_train_batches=2", SMALL_MODEL, *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "WANDB_BASE_URL": server, "WANDB_API_KEY": KEY},
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("server", ["silent_server", "closed_port"])
def test_a_command_whose_server_is_down_ends_well(tmp_path, request, server):
    process = train(tmp_path, request.getfixturevalue(server), "trainer.max_epochs=3")
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert (tmp_path / "run" / "summary.json").exists()
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert "it logs offline" in output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_does_not_wait_for_its_server(tmp_path, silent_server, number, code):
    process = train(tmp_path, silent_server, "trainer.max_epochs=5000")
    while "epoch    2/5000" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - started < wandb_guard.INTERRUPT_LIMIT + 8
    assert process.returncode == code
