"""Pictures of a run and of what its model does, and measurements of its speed."""

from sequencer.analysis.plots import plot_confusion, plot_curves, plot_growth, plot_sweep
from sequencer.analysis.sweep import write_sweep

__all__ = ["plot_confusion", "plot_curves", "plot_growth", "plot_sweep", "write_sweep"]
