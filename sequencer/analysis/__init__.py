"""Plots of runs, sweeps and measurements, and the result table of a sweep."""

from sequencer.analysis.plots import plot_confusion, plot_curves, plot_growth, plot_sweep
from sequencer.analysis.sweep import write_sweep

__all__ = ["plot_confusion", "plot_curves", "plot_growth", "plot_sweep", "write_sweep"]
