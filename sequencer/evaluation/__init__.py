"""Metrics on fixed sets."""

from sequencer.evaluation.evaluate import evaluate
from sequencer.evaluation.metrics import ClassificationMetrics, ClassResult

__all__ = ["ClassResult", "ClassificationMetrics", "evaluate"]
