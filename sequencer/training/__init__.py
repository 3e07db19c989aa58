"""Training: the LightningModule, and the life of a run from its configuration to its result."""

from sequencer.training.divergence import Diverged
from sequencer.training.lifecycle import run
from sequencer.training.module import Classifier
from sequencer.training.smoke_test import smoke

__all__ = ["Classifier", "Diverged", "run", "smoke"]
