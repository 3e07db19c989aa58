"""The page of a run: what happened, where it fails, and where the evidence lay; and the page of several runs."""

from sequencer.report.comparison import write_comparison
from sequencer.report.page import write_report
from sequencer.report.results import Results, examine
from sequencer.report.subject import ORIGIN, Subject, make_subject, open_subject

__all__ = [
    "ORIGIN",
    "Results",
    "Subject",
    "examine",
    "make_subject",
    "open_subject",
    "write_comparison",
    "write_report",
]
