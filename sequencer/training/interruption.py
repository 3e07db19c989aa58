"""Ctrl-C, SIGTERM and SIGHUP as requests to stop as soon as a checkpoint can be saved."""

import signal
import threading
import time
from types import FrameType

PATIENCE = 1.0  # s in which a repeated SIGINT counts as the same Ctrl-C: terminal and torchrun both send it


class Interruption:
    """Records the first SIGINT, SIGTERM or SIGHUP in `signal`; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    def listen(self) -> None:
        """Replaces the signal handlers, unless they ignore the signal; the Trainer restores its caller's at the end.

        A run in a thread of a program leaves the signals to the program: only the main thread can have handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt
