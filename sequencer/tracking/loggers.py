"""The log of a run, and the loggers that receive its metrics besides metrics.csv."""

import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger

from sequencer.config.schema import Config, leaves
from sequencer.console import ConsoleHandler
from sequencer.files import is_full, write_atomically, writing
from sequencer.tracking.wandb_guard import WandbGuard

log = logging.getLogger("sequencer")


def start_log(path: Path) -> None:
    """Sends the package's log to the console, and appends it, details included, with timestamps to `path`."""
    close_log()
    file = LogFile(path)
    file.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    log.handlers, log.propagate = [ConsoleHandler(), file], False
    log.setLevel(logging.DEBUG)


class OneLine(logging.Formatter):
    """Formats a message of several lines as one line."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " ")


class LogFile(logging.FileHandler):
    """A log file whose first failed write raises `WriteError` in the main thread; later records are dropped.

    logging itself would print a traceback for every record that it cannot write.
    """

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if self.failed or threading.current_thread() is not threading.main_thread():
            return
        self.failed = True
        with writing(Path(self.baseFilename)):
            raise  # the error that `emit` has caught

    def close(self) -> None:
        with suppress(OSError):  # of what could not be written before
            super().close()


class EventFiles(TensorBoardLogger):
    """TensorBoard's event files; one that cannot be written raises `WriteError`, which names their folder.

    The writer's thread ends with an error that the writer raises again at the next call: the thread prints nothing.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        super().__init__(folder.parent, name=folder.name, version="", default_hp_metric=False)
        threading.excepthook = _print_unless_full
        self._values = asdict(config)
        with writing(folder):
            self.experiment.add_text("config", f"```yaml\n{OmegaConf.to_yaml(self._values)}```")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(self.log_dir), ValueError):  # by which Lightning replaces any error
            super().log_metrics(*args, **kwargs)

    def log_result(self, metrics: Mapping[str, float], files: Mapping[str, Path], step: int) -> None:
        """Logs metrics and pictures of a finished run, and the configuration for TensorBoard's table of runs.

        Of the files only pictures are taken: TensorBoard does not show pages.
        """
        with writing(Path(self.log_dir), ValueError):
            self.log_hyperparams(leaves(self._values), dict(metrics), step)
            for name, path in files.items():
                if path.suffix != ".png":
                    continue
                with Image.open(path) as image:
                    self.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            self.experiment.close()

    def finalize(self, status: str) -> None:
        with writing(Path(self.log_dir)):
            super().finalize(status)

    def close(self) -> None:
        """Does nothing: `finalize` and `log_result` have closed the file."""


def _print_unless_full(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is None or not is_full(arguments.exc_value):
        threading.__excepthook__(arguments)


def close_log() -> None:
    """Closes what `start_log` opened."""
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)


def build_loggers(config: Config, run_dir: Path) -> list[EventFiles | WandbGuard]:
    """Builds and starts the loggers that `config.logger` asks for, TensorBoard and W&B.

    W&B never prompts for an API key: without one it logs offline.
    """
    loggers: list[EventFiles | WandbGuard] = []
    if config.logger.tensorboard:
        loggers.append(EventFiles(run_dir / "tensorboard", config))
    if config.logger.wandb:
        guard = WandbGuard(
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline"),
            project=config.logger.project,
            entity=config.logger.entity,
            group=config.logger.group,
            name=run_dir.name if run_dir.parent.name == config.logger.group else config.name,  # a trial by its folder
            dir=str(run_dir),
            id=_wandb_id(run_dir),
            resume="allow",
            config=asdict(config),
        )
        guard.start()
        loggers.append(guard)
    return loggers


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _wandb_id(run_dir: Path) -> str:
    """Returns the W&B id of a run, which is kept in its folder so that a resumed run continues the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_text(os.urandom(4).hex()))
    return path.read_text()
