"""Ctrl-C and SIGTERM as a wish that the run honours as soon as it can save."""

import signal
from types import FrameType


class Interruption:
    """Notes the first signal; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> None:
        """In place of whatever handlers there are; the Trainer puts those back when it ends."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
