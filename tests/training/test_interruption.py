"""Signals that ask a run to stop."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from sequencer.training import interruption
from sequencer.training.interruption import Interruption


@pytest.fixture(autouse=True)
def handlers():
    """Restores the handlers of the process, which heeds Ctrl-C meanwhile."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_recorded(number):
    heard = Interruption()
    heard.listen()
    send(number)
    assert heard.signal == number


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch):
    heard = Interruption()
    heard.listen()
    send(signal.SIGTERM)
    send(signal.SIGINT)  # within `PATIENCE`: torchrun passes on what the terminal has sent
    assert heard.signal == signal.SIGTERM
    monkeypatch.setattr(interruption, "PATIENCE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_run_in_a_thread_leaves_the_signals_to_the_program():
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(Interruption().listen).result()
    assert signal.getsignal(signal.SIGTERM) == before


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heard = Interruption()
    heard.listen()
    send(signal.SIGINT)
    assert heard.signal is None
