"""Training runs."""

from sequencer.training.divergence import Diverged
from sequencer.training.plan import plan
from sequencer.training.run import run

__all__ = ["Diverged", "plan", "run"]
