"""Plots of runs, sweeps and measurements, and tables of compared runs."""

from sequencer.analysis.comparison import compare, find_runs, print_comparison, write_csv, write_sweep
from sequencer.analysis.plots import plot_confusion, plot_curves, plot_growth, plot_sweep

__all__ = [
    "compare",
    "find_runs",
    "plot_confusion",
    "plot_curves",
    "plot_growth",
    "plot_sweep",
    "print_comparison",
    "write_csv",
    "write_sweep",
]
