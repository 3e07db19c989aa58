"""The models, their registration with timm, and the loading of weights."""

from sequencer.models import variants  # importing registers
from sequencer.models.checkpoint import CheckpointError, load_weights, read_checkpoint, select_weights
from sequencer.models.load import LoadedModel, load_model, preprocessing
from sequencer.models.sequencer import Sequencer, Sequencer2d, VSequencer

__all__ = [
    "CheckpointError",
    "LoadedModel",
    "Sequencer",
    "Sequencer2d",
    "VSequencer",
    "load_model",
    "load_weights",
    "preprocessing",
    "read_checkpoint",
    "select_weights",
    "variants",
]
