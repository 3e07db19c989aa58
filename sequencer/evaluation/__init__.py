"""Metrics on fixed sets, and predictions for images."""

from sequencer.evaluation.evaluate import FlipAveraged, evaluate
from sequencer.evaluation.inputs import check_img_size, data_section, input_config, preprocessing
from sequencer.evaluation.metrics import ClassificationMetrics, ClassResult, Outcome, wilson_interval
from sequencer.evaluation.predict import Prediction, find_images, predict, readable_names

__all__ = [
    "ClassResult",
    "ClassificationMetrics",
    "FlipAveraged",
    "Outcome",
    "Prediction",
    "check_img_size",
    "data_section",
    "evaluate",
    "find_images",
    "input_config",
    "predict",
    "preprocessing",
    "readable_names",
    "wilson_interval",
]
