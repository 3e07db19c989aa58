"""Metrics, the evaluation of a model on a split, and predictions for images."""

from sequencer.evaluation.figures import describe_figures, short_number
from sequencer.evaluation.inputs import at_img_size, check_img_size, data_section, data_settings, input_config
from sequencer.evaluation.loop import FlipAveraged, evaluate, tracked
from sequencer.evaluation.metrics import (
    ClassificationMetrics,
    ClassResult,
    Outcome,
    describe_unpredicted,
    is_right,
    metric_names,
)
from sequencer.evaluation.prediction import Prediction, find_images, predict, readable_names
from sequencer.evaluation.predictions import Collector, Predictions
from sequencer.evaluation.split import Evaluation, check_classes, describe_setting, evaluate_model, evaluation_data
from sequencer.evaluation.writing import write_evaluation

__all__ = [
    "ClassResult",
    "ClassificationMetrics",
    "Collector",
    "Evaluation",
    "FlipAveraged",
    "Outcome",
    "Prediction",
    "Predictions",
    "at_img_size",
    "check_classes",
    "check_img_size",
    "data_section",
    "data_settings",
    "describe_figures",
    "describe_setting",
    "describe_unpredicted",
    "evaluate",
    "evaluate_model",
    "evaluation_data",
    "find_images",
    "input_config",
    "is_right",
    "metric_names",
    "predict",
    "readable_names",
    "short_number",
    "tracked",
    "write_evaluation",
]
