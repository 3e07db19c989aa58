"""The page of a run: what happened, where it fails, and where the evidence lay."""

from sequencer.report.page import write_report
from sequencer.report.subject import Subject, evaluate_run

__all__ = ["Subject", "evaluate_run", "write_report"]
