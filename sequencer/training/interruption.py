"""Ctrl-C and SIGTERM as a wish that the run honours as soon as it can save."""

import signal
import time
from types import FrameType

PATIENCE = 1.0  # s in which a Ctrl-C is the first one again: a terminal sends it, and torchrun hands it on


class Interruption:
    """Notes the first signal; a second Ctrl-C, by hand, interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    def listen(self) -> None:
        """In place of whatever handlers there are; the Trainer puts those back when it ends."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt
