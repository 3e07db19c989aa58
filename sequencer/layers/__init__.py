"""Modules built on the recurrences of `sequencer.ops`."""

from sequencer.layers.blocks import LAYER_NORM_EPS, Downsample2d, SequencerBlock, Stage
from sequencer.layers.rnn2d import RNN, UNIONS, RNN1d, RNN2d

__all__ = ["LAYER_NORM_EPS", "RNN", "UNIONS", "Downsample2d", "RNN1d", "RNN2d", "SequencerBlock", "Stage"]
