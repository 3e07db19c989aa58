"""The process that runs wandb for `sequencer.tracking.wandb_guard`, which starts this file by its path.

It imports the standard library and wandb only, since importing the package would import torch. When the training
process dies it ends the W&B run as failed, and it outlives that process by its limits at most.
"""

import os
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer
from typing import Any


def main(guard: Connection) -> None:
    """Runs wandb on the messages that come through `guard`.

    It answers twice: with the folder of the W&B run when it has started and, after the exit code, with whether every
    row was sent.

    Raises:
        Exception: wandb failed.
    """
    limits, arguments = guard.recv()
    starting = _end_after(limits["init"])
    run = _start(arguments)
    starting.cancel()
    guard.send(str(Path(run.dir).parent))
    exit_code = _log_rows(guard, run)
    _end_after(limits["finish"])
    try:
        run.finish(exit_code)
    except TimeoutError:
        guard.send(False)
    else:
        guard.send(True)


def _end_after(seconds: float) -> Timer:
    """Ends this process with exit code 1 after some seconds, unless the timer is cancelled."""
    timer = Timer(seconds, os._exit, [1])
    timer.start()
    return timer


def _start(arguments: dict[str, Any]) -> Any:
    import wandb

    run = wandb.init(**arguments)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def _log_rows(guard: Connection, run: Any) -> int:
    """Logs rows until the exit code comes, and returns it."""
    try:
        while not isinstance(message := guard.recv(), int):
            row, step, files = message
            run.log({**row, **{name: _media(path) for name, path in files.items()}}, step=step, commit=True)
    except (EOFError, ConnectionResetError):
        return 1
    return message


def _media(path: str) -> Any:
    """Returns a file as W&B shows it, a page or a picture."""
    import wandb

    return wandb.Html(path, inject=False) if path.endswith(".html") else wandb.Image(path)


if __name__ == "__main__":
    guard = Connection(int(sys.argv.pop(1)))  # the other arguments are the training's, for wandb to record
    try:
        main(guard)
    except BaseException as error:
        with suppress(OSError):  # the guard may be gone
            guard.send(RuntimeError((str(error).strip().splitlines() or [type(error).__name__])[0]))
    os._exit(0)  # skips wandb's exit hook, which waits for its service without limit
