"""Token mixing by recurrence: `RNN1d` over all tokens in a row, `RNN2d` along the columns and rows of their map."""

import math

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from sequencer.ops import CELLS, Layers, PackedWeights, Weights, rnn1d, rnn2d

UNIONS = ("cat", "add", "vertical", "horizontal")


class RNN(nn.Module):
    """Recurrent layers of any cell; parameters carry `torch.nn.LSTM`'s names and shapes.

    Args:
        input_size: channels `C` of a step.
        hidden_size: `D`, per direction.
        cell: one of `sequencer.ops.CELLS`.
        num_layers: layers one upon another.
        bidirectional: a second direction runs from the last step to the first.

    Raises:
        ValueError: unknown cell, or a size below 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"unknown cell {cell!r}; there are {', '.join(CELLS)}")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        if min(sizes.values()) < 1:
            raise ValueError(f"sizes must be 1 or more: {', '.join(f'{name}={size}' for name, size in sizes.items())}")
        self.cell, self.hidden_size = cell, hidden_size
        directions = 2 if bidirectional else 1
        self.output_size = directions * hidden_size
        self.suffixes: list[list[str]] = []  # by layer, direction
        for layer in range(num_layers):
            shapes = CELLS[cell].shapes(self.output_size if layer else input_size, hidden_size)
            self.suffixes.append([f"_l{layer}", f"_l{layer}_reverse"][:directions])
            for suffix in self.suffixes[-1]:
                for name, shape in shapes.items():
                    self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape)))
        self.parameter_names = list(shapes)
        self.packed = PackedWeights()
        self.init_weights()

    def init_weights(self) -> None:
        """Uniform in +-1/sqrt(D), biases included, as torch and the Sequencer paper's code; see `Cell.forget_bias`."""
        bound, forget_bias = 1 / math.sqrt(self.hidden_size), CELLS[self.cell].forget_bias
        for name, parameter in self.named_parameters():
            nn.init.uniform_(parameter, -bound, bound)
            if forget_bias is not None and name.startswith("bias_ih"):
                nn.init.constant_(parameter[self.hidden_size : 2 * self.hidden_size], forget_bias)

    def weights(self) -> Layers:
        """The parameters in the form that `sequencer.ops` takes."""

        def direction(suffix: str) -> Weights:
            return Weights(**{name: getattr(self, name + suffix) for name in self.parameter_names})

        return [tuple(direction(suffix) for suffix in layer) for layer in self.suffixes]

    def train(self, mode: bool = True) -> "RNN":
        self.packed.clear()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N T K"]:
        return rnn1d(x, self.weights(), self.cell, packed=self.packed)

    def extra_repr(self) -> str:
        return f"cell={self.cell}, hidden_size={self.hidden_size}, output_size={self.output_size}"


class RNN1d(nn.Module):
    """A recurrence over all tokens of a map, read in raster order as one sequence.

    The token mixer of the vanilla Sequencer (Tatsunami and Taki 2022, section 4.3).

    Raises:
        ValueError: the recurrence's channels differ from `input_size`, there being no linear layer to mend it.
    """

    def __init__(
        self, input_size: int, hidden_size: int, cell: str = "lstm", num_layers: int = 1, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.rnn = RNN(input_size, hidden_size, cell, num_layers, bidirectional)
        if self.rnn.output_size != input_size:
            raise ValueError(
                f"the {self.rnn.output_size} channels of the recurrence must equal the {input_size} of the input: "
                "change hidden_sizes or bidirectional"
            )

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return self.rnn(x.flatten(1, 2)).reshape(x.shape)


class RNN2d(nn.Module):
    """Recurrences down every column and along every row, joined and projected back to the input's channels.

    BiLSTM2D of the Sequencer paper (Tatsunami and Taki 2022, section 3.2) for any cell.

    Args:
        input_size: channels `C`, in and out.
        hidden_size: `D`, per direction.
        cell: one of `sequencer.ops.CELLS`.
        num_layers: recurrent layers one upon another, in each sweep.
        bidirectional: both directions of each sweep, or only top to bottom and left to right.
        union: `cat` or `add` joins both sweeps; `vertical` or `horizontal` keeps that one alone.
        with_fc: close with a linear layer; without it the joined channels must equal `input_size`.

    Raises:
        ValueError: unknown cell or union, or sizes that do not fit without the linear layer.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = True,
        union: str = "cat",
        with_fc: bool = True,
    ) -> None:
        super().__init__()
        if union not in UNIONS:
            raise ValueError(f"unknown union {union!r}; there are {', '.join(UNIONS)}")
        self.cell, self.union = cell, union
        joined = hidden_size * (2 if bidirectional else 1) * (2 if union == "cat" else 1)
        if not with_fc and joined != input_size:
            raise ValueError(
                f"without the closing linear layer the {joined} channels of the recurrences must equal the "
                f"{input_size} of the input: change hidden_size, union or directions"
            )

        # registered first, as in timm, so that even the order of the state dict agrees
        self.fc = nn.Linear(joined, input_size) if with_fc else nn.Identity()
        sizes = (input_size, hidden_size, cell, num_layers, bidirectional)
        self.rnn_v = RNN(*sizes) if union != "horizontal" else None
        self.rnn_h = RNN(*sizes) if union != "vertical" else None
        self.packed = PackedWeights()

    def train(self, mode: bool = True) -> "RNN2d":
        self.packed.clear()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        vertical = self.rnn_v.weights() if self.rnn_v is not None else None
        horizontal = self.rnn_h.weights() if self.rnn_h is not None else None
        return self.fc(rnn2d(x, vertical, horizontal, self.cell, self.union, packed=self.packed))
