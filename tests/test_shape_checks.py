"""The annotated shapes are live in these tests; see `--jaxtyping-packages` in pyproject.toml."""

import pytest
import torch
from jaxtyping import TypeCheckError

from sequencer.layers import RNN
from sequencer.ops import rnn1d, rnn2d


def test_wrong_shapes_and_types_are_refused():
    weights = RNN(3, 2).weights()
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        rnn1d(torch.zeros(2, 3), weights)
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        rnn2d(torch.zeros(1, 2, 2, 3, dtype=torch.int64), weights, None)
