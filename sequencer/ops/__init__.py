"""Recurrences as pure functions on tensors."""

from sequencer.ops.bilstm2d import Layers, choose_backend, rnn1d, rnn2d
from sequencer.ops.reference import CELLS, Weights

__all__ = ["CELLS", "Layers", "Weights", "choose_backend", "rnn1d", "rnn2d"]
