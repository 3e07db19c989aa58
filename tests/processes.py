"""Commands in processes of their own, forked from a server that has imported the package: no import for each.

The pictures of their runs are blank.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.pictures import leave_blank

TRAIN = Path(__file__).parents[1] / "train.py"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.processes", "tests.pictures", "sequencer.training", "sequencer.measure"])


class Command:
    """`python SCRIPT ARGUMENTS...` in a process group of its own, with the interface of `subprocess.Popen`."""

    def __init__(
        self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None, script: Path = TRAIN
    ) -> None:
        self._folder = tempfile.mkdtemp()
        self._outputs = [Path(self._folder, name) for name in ("stdout", "stderr")]
        command = [str(script), *map(str, arguments)]
        self._process = _context.Process(
            target=_run, args=(command, str(cwd), {**os.environ, **(environment or {})}, self._outputs)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end and returns standard output and standard error.

        Raises:
            TimeoutError: the process was killed after `timeout` seconds.
        """
        self._process.join(timeout)
        output, errors = (path.read_text() if path.exists() else "" for path in self._outputs)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"not finished after {timeout} s: {output}{errors}")
        shutil.rmtree(self._folder)
        return output, errors


def start_function(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Calls a function of a module in a process without run-time type checks."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def run_function(function: Callable[..., object], *arguments: object) -> None:
    """Calls a function as `start_function` does; it has to return without an error."""
    process = start_function(function, *arguments)
    process.join(120)
    assert process.exitcode == 0


def start_ranks(
    number: int,
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, object] | None = None,
    script: Path = TRAIN,
) -> list[Command]:
    """Starts a command on several ranks, with the environment variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    shared |= environment or {}
    ranks = [{key: str(value) for key, value in (shared | {"RANK": i, "LOCAL_RANK": i}).items()} for i in range(number)]
    return [Command(arguments, cwd, variables, script) for variables in ranks]


def finish(ranks: Sequence[Command]) -> str:
    """Waits for all ranks to succeed and returns the standard output of rank 0."""
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), outputs
    assert [output for output, _ in outputs[1:]] == [""] * (len(ranks) - 1)
    return outputs[0][0]


def wait_for(path: Path, text: str, times: int = 1) -> None:
    """Waits until a file holds a text so many times."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count(text) >= times:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} does not hold {text!r} {times} times")


def heed_ctrl_c() -> None:
    """Undoes that SIGINT is ignored in processes which a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(command: list[str], cwd: str, environment: dict[str, str], outputs: list[Path]) -> None:
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    heed_ctrl_c()
    leave_blank()
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))  # as the interpreter does
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips them
        sys.stdout.flush()
        sys.stderr.flush()
