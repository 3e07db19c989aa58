"""A Weights & Biases logger that can neither block nor fail training."""

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger("sequencer")

INIT_LIMIT = 20.0  # s that wandb has to start a run; then an offline run takes its place
SEND_LIMIT = 20.0  # s that wandb has at the end to send what is left; then it closes its file, which can be sent later
FINISH_LIMIT = 30.0  # s that the end of training waits for W&B
INTERRUPT_LIMIT = 5.0  # the same where training failed or was interrupted: schedulers kill soon after SIGTERM

# a row, its step or None, and the files of pictures and pages by name; the last message is the exit code
Message = tuple[dict[str, Any], int | None, dict[str, str]] | int


class WandbGuard(Logger):
    """Logs to W&B through a queue, a daemon thread and a worker process.

    wandb runs in a process of its own because it cannot be abandoned from within: after a failed `init` its service
    keeps the id of the run, so that no offline run can use it, and Python waits for the service at exit. When the
    worker fails before the end, all rows are sent again to an offline run with the same id.
    """

    def __init__(self, mode: str, **arguments: Any) -> None:
        """
        Args:
            mode: of `wandb.init`: `online`, `offline` or `disabled`.
            arguments: further arguments of `wandb.init`.
        """
        super().__init__()
        self._mode, self._arguments = mode, arguments
        self._queue: SimpleQueue[Message] = SimpleQueue()
        self._sent: list[Message] = []
        self._folder: str | None = None
        self._deadline: float | None = None
        self._closed = False
        self._ended = False  # by the thread: everything is sent, or the log says what is not
        self._thread = Thread(target=self._serve, name="wandb", daemon=True)

    @property
    def name(self) -> str:
        return self._arguments["project"]

    @property
    def version(self) -> str:
        return self._arguments["id"]

    @rank_zero_only
    def start(self) -> None:
        """Starts the thread, which starts the worker."""
        self._thread.start()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._queue.put((dict(metrics) | {"trainer/global_step": step}, step, {}))

    @rank_zero_only
    def log_result(self, metrics: Mapping[str, float], files: Mapping[str, Path], step: int) -> None:
        """Logs metrics, pictures and the page of a finished run, and tells W&B that it has succeeded."""
        row = dict(metrics) | {"trainer/global_step": step}
        self._queue.put((row, None, {name: str(path) for name, path in files.items()}))  # W&B's own next step
        self._end(0, FINISH_LIMIT)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the arguments of `wandb.init` include the configuration."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Tells W&B that training has failed; where it has succeeded, `log_result` is still to come."""
        if status != "success":
            self._end(1, INTERRUPT_LIMIT)

    def _end(self, exit_code: int, limit: float) -> None:
        """Sends the exit code, after which W&B finishes in the background until `close`."""
        if self._deadline is None:
            self._deadline = time.monotonic() + limit
            self._queue.put(exit_code)

    @rank_zero_only
    def close(self) -> None:
        """Waits a limited time for W&B; a run without a result has failed."""
        self.finalize("failed")
        assert self._deadline is not None
        with suppress(KeyboardInterrupt):  # training has ended and its exit code stands; Ctrl-C only ends the wait
            self._thread.join(1)
            if self._thread.is_alive():
                rest = max(0.0, self._deadline - time.monotonic())
                log.info("waiting for W&B, at most %.0f s", rest)
                self._thread.join(rest)
        self._closed = True
        if not self._ended:
            log.warning("W&B has not finished in time%s", self._sync if self._folder else "")

    @property
    def _sync(self) -> str:
        """The end of a log message that names the command which sends missing rows, on a line of its own."""
        return f"; send what it lacks with:\nwandb sync {shlex.quote(str(self._folder))}"

    def _serve(self) -> None:
        """Sends everything to a run in the given mode or, where that fails, to an offline run."""
        problem: Exception | None = None
        for mode in dict.fromkeys((self._mode, "offline")):
            try:
                self._send_all(mode, problem)
            except Exception as error:  # of any kind: training goes on
                problem = error
            else:
                self._ended = True
                return
            if self._closed or (self._deadline is not None and time.monotonic() > self._deadline):
                return  # no time is left for another run; `close` says so
        log.warning("W&B is given up (%s); metrics.csv has every row", problem)
        self._ended = True

    def _send_all(self, mode: str, problem: Exception | None) -> None:
        """Starts a worker and sends it every message from the first to the exit code.

        Args:
            mode: of `wandb.init`.
            problem: why the run before this one failed, if there was one.

        Raises:
            Exception: W&B failed before the end.
        """
        process, worker = _start_worker()
        with process, worker:
            try:
                worker.send(({"init": INIT_LIMIT, "finish": FINISH_LIMIT}, {**self._arguments, "mode": mode}))
                self._folder = _answer(worker, INIT_LIMIT)
                self._announce(mode, problem)
                for message in self._messages():
                    _send(worker, message)
                complete = _answer(worker, FINISH_LIMIT)
            except BaseException:
                process.kill()
                raise
        if not (complete or self._closed):
            log.warning("W&B did not take everything within %d s%s", SEND_LIMIT, self._sync)

    def _announce(self, mode: str, problem: Exception | None) -> None:
        if self._closed:
            return
        if problem:
            log.warning("W&B failed (%s): it logs %s%s", problem, mode, self._sync)
        else:
            log.info("W&B logs %s%s", mode, self._sync if mode == "offline" else "")

    def _messages(self) -> Iterator[Message]:
        """Yields the messages that were sent before, then new ones, up to the exit code."""
        position = 0
        while True:
            if position == len(self._sent):
                self._sent.append(self._queue.get())
            message = self._sent[position]
            yield message
            if isinstance(message, int):
                return
            position += 1


def _start_worker() -> tuple[subprocess.Popen[bytes], Connection]:
    """Starts the worker process; returns it and the connection to it."""
    ours, theirs = Pipe()
    settings = {
        "WANDB_CONSOLE": "off",
        "WANDB_FINISH_TIMEOUT": str(SEND_LIMIT),
        "WANDB_FINISH_TIMEOUT_RAISES": "true",
        "WANDB_PROGRAM": sys.argv[0],
        "WANDB_X_STATS_PID": str(os.getpid()),  # system metrics are those of the training process
    }
    with theirs:
        script = Path(__file__).with_name("wandb_worker.py")
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(theirs.fileno()), *sys.argv[1:]],
            env=os.environ | settings,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # wandb's service, which lives on, must not keep a pipe of the training open
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C goes to the training process only
        )
    return process, ours


def _send(worker: Connection, message: Message) -> None:
    try:
        worker.send(message)
    except OSError:
        _answer(worker, 0)  # raises the reason, if the worker sent one
        raise


def _answer(worker: Connection, limit: float) -> Any:
    """Receives the worker's answer.

    Raises:
        RuntimeError: none came within `limit` seconds, the worker died, or wandb failed.
    """
    if not worker.poll(limit):
        raise RuntimeError(f"no answer within {limit:g} s")
    try:
        answer = worker.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError("its process died") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
