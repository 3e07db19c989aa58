"""Sequencer models and the loading of models and weights."""

from sequencer.models.average import average_models
from sequencer.models.build import create_model
from sequencer.models.checkpoint import (
    CheckpointError,
    load_weights,
    pretrained_cfg,
    read_checkpoint,
    select_weights,
)
from sequencer.models.declarations import KeyFigures
from sequencer.models.exported import Exported, check_original, load_exported
from sequencer.models.layouts import to_paper_layout, to_timm_layout
from sequencer.models.load import PREPROCESSING, LoadedModel, load_model, read_weights, timm_preprocessing
from sequencer.models.sequencer import Sequencer, Sequencer2d, VSequencer

__all__ = [
    "PREPROCESSING",
    "CheckpointError",
    "Exported",
    "KeyFigures",
    "LoadedModel",
    "Sequencer",
    "Sequencer2d",
    "VSequencer",
    "average_models",
    "check_original",
    "create_model",
    "load_exported",
    "load_model",
    "load_weights",
    "pretrained_cfg",
    "read_checkpoint",
    "read_weights",
    "select_weights",
    "timm_preprocessing",
    "to_paper_layout",
    "to_timm_layout",
]
