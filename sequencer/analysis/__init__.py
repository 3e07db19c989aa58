"""Pictures of a run and of what its model does."""

from sequencer.analysis.plots import plot_confusion, plot_curves

__all__ = ["plot_confusion", "plot_curves"]
