"""Recurrences as pure functions on tensors."""

from sequencer.ops.bilstm2d import BACKENDS, Choice, Layers, configure, explain, rnn1d, rnn2d
from sequencer.ops.packing import PackedWeights
from sequencer.ops.reference import CELLS, Weights

__all__ = [
    "BACKENDS",
    "CELLS",
    "Choice",
    "Layers",
    "PackedWeights",
    "Weights",
    "configure",
    "explain",
    "rnn1d",
    "rnn2d",
]
