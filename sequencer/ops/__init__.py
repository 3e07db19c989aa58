"""Recurrences as pure functions on tensors."""

from sequencer.ops.backends import BACKENDS, Backend, Choice, Inputs, add_backend, configure, explain
from sequencer.ops.bilstm2d import rnn1d, rnn2d
from sequencer.ops.packing import PackedWeights
from sequencer.ops.products import linear
from sequencer.ops.reference import CELLS, Cell, Layers, Trace, Weights, trace

__all__ = [
    "BACKENDS",
    "CELLS",
    "Backend",
    "Cell",
    "Choice",
    "Inputs",
    "Layers",
    "PackedWeights",
    "Trace",
    "Weights",
    "add_backend",
    "configure",
    "explain",
    "linear",
    "rnn1d",
    "rnn2d",
    "trace",
]
