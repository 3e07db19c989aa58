"""Metrics on fixed sets."""

from sequencer.evaluation.evaluate import evaluate
from sequencer.evaluation.inputs import data_section, preprocessing
from sequencer.evaluation.metrics import ClassificationMetrics, ClassResult

__all__ = ["ClassResult", "ClassificationMetrics", "data_section", "evaluate", "preprocessing"]
