"""Training: the step, and a run from its configuration to its result."""

from sequencer.training.divergence import Diverged
from sequencer.training.lifecycle import run

__all__ = ["Diverged", "run"]
