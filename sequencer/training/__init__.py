"""Training runs."""

from sequencer.training.run import run

__all__ = ["run"]
