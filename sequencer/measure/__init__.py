"""Measurements: the forecast of a run, the throughput of its loop and loader, and the comparison with peers."""

from sequencer.measure.forecast import plan

__all__ = ["plan"]
