"""The process that runs wandb on behalf of `sequencer.tracking.wandb_guard`, which starts this file by its path.

Standard library and wandb only: importing the package would cost torch. It is never alone for longer than its limits:
a guard that dies without a word ends the run as failed.
"""

import os
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer
from typing import Any


def main(guard: Connection) -> None:
    """Answers with the folder of the run, then, after rows and an exit code, with whether all of it was sent.

    Raises:
        Exception: whatever wandb raises before the end.
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
    """Logs until the exit code comes, and returns it."""
    try:
        while not isinstance(message := guard.recv(), int):
            row, step = message
            run.log({**row, "trainer/global_step": step}, step=step, commit=True)
    except (EOFError, ConnectionResetError):
        return 1
    return message


if __name__ == "__main__":
    guard = Connection(int(sys.argv.pop(1)))  # the other arguments are the training's, for wandb to record
    try:
        main(guard)
    except BaseException as error:
        with suppress(OSError):  # the guard may be gone
            guard.send(RuntimeError((str(error).strip().splitlines() or [type(error).__name__])[0]))
    os._exit(0)  # wandb's own exit hook would wait for its service, as long as that takes
