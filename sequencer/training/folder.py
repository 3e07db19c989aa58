"""The folder of a run, which one process at a time writes to."""

import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from sequencer.config.errors import RequestError
from sequencer.config.schema import Config
from sequencer.files import WriteError, is_full, write_atomically, write_json, writing
from sequencer.report import ORIGIN
from sequencer.tracking.loggers import close_log, log, start_log

LOCK = ".lock"  # file in the folder; it stays, since deleting it would let two processes lock two files of this name


class RunFolder:
    """The folder of a run, locked from `start` to `close`.

    Args:
        path: The folder.
        origin: The command of a new run and the source of each value, for `origin.json`; None or
            empty if it is not known.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._origin = origin
        self._lock: IO[str] | None = None

    def start(self, config: Config) -> None:
        """Creates the folder, locks it, writes `config.yaml` and starts `train.log`; the request has to be a good one.

        Raises:
            RequestError: The folder cannot be written, or another process trains in it.
            WriteError: The disk is full.
        """
        try:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                locked = self._lock is not None or self._take_lock()
                (self.path / "summary.json").unlink(missing_ok=True)  # of fewer epochs than config.yaml is about to say
            write_atomically(self.path / "config.yaml", lambda path: OmegaConf.save(OmegaConf.structured(config), path))
            if self._origin and not (self.path / ORIGIN).exists():
                write_json(self.path / ORIGIN, self._origin)
        except WriteError as error:
            if is_full(error):
                raise
            raise RequestError(f"run_dir={self.path} cannot be used: {error}") from error
        start_log(self.path / "train.log")
        if not locked:
            log.warning("%s: this file system has no locks; start no second process with this run_dir", self.path)

    def close(self) -> None:
        """Closes the log and releases the lock."""
        close_log()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> bool:
        """Locks the folder, unless its file system has no locks.

        A POSIX lock belongs to this process alone: forked children do not hold it, and it ends with the process. It
        also ends when the process closes any descriptor of the file, which is therefore opened nowhere else.

        Returns:
            Whether the folder is locked.

        Raises:
            RequestError: Another process holds the lock.
        """
        file = open(self.path / LOCK, "a+", errors="replace")  # noqa: SIM115 - kept open until `close`
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = "".join(filter(str.isprintable, file.read(200)))
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return False
            raise RequestError(
                f"run_dir={self.path} is in use by {owner or 'another process'}\n"
                f"wait for its end, or choose another run_dir; if it is gone for sure, delete {self.path / LOCK}"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file
        return True
