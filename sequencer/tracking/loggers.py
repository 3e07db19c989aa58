"""The log of a run, and the loggers that receive its metrics besides metrics.csv."""

import logging
import os
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from pathlib import Path

from pytorch_lightning.loggers import Logger, TensorBoardLogger
from rich.logging import RichHandler

from sequencer.config.schema import Config
from sequencer.tracking.wandb_guard import WandbGuard

log = logging.getLogger("sequencer")


def start_log(path: Path) -> None:
    """Sends the package's log to the console, above a progress bar, and appends it with timestamps to `path`."""
    close_log()
    console = RichHandler(show_time=False, show_level=False, show_path=False, markup=False, highlighter=None)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers, log.propagate = [console, file], False
    log.setLevel(logging.INFO)


def close_log() -> None:
    """Closes what `start_log` opened."""
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)


def build_loggers(config: Config, run_dir: Path) -> list[Logger]:
    """Builds and starts the loggers that `config.logger` asks for, TensorBoard and W&B.

    W&B never prompts for an API key: without one it logs offline.
    """
    loggers: list[Logger] = []
    if config.logger.tensorboard:
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version=""))
    if config.logger.wandb:
        guard = WandbGuard(
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline"),
            project=config.logger.project,
            entity=config.logger.entity,
            name=config.name,
            dir=str(run_dir),
            id=_wandb_id(run_dir),
            resume="allow",
            config=asdict(config),
        )
        guard.start()
        loggers.append(guard)
    return loggers


def close_loggers(loggers: list[Logger]) -> None:
    """Ends loggers that work in the background; waits for them a limited time."""
    for logger in loggers:
        if isinstance(logger, WandbGuard):
            logger.close()


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
        path.write_text(os.urandom(4).hex())
    return path.read_text()
