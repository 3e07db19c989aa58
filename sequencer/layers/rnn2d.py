"""Token mixers: `RNN1d` reads a token map as one sequence, `RNN2d` scans its columns and rows.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `N` sequences, `T` steps, `D` hidden size per
direction, `K` output channels.
"""

import math

import torch
import torch.nn as nn
from jaxtyping import Float
from timm.layers import register_notrace_module
from torch import Tensor

from sequencer.layers.linear import Linear
from sequencer.ops import CELLS, Layers, PackedWeights, Weights, rnn1d, rnn2d

UNIONS = ("cat", "add", "vertical", "horizontal")


class RNN(nn.Module):
    """Stacked recurrent layers of any cell, with the parameter names and shapes of `torch.nn.LSTM`.

    Maps `N T C` to `N T K`, where `K` is `D`, or `2 D` if bidirectional, the forward direction first.

    Args:
        input_size: Channels `C` of the input.
        hidden_size: Hidden size `D` per direction.
        cell: One of `sequencer.ops.CELLS`.
        num_layers: Number of stacked layers.
        bidirectional: If True, every layer also scans from the last step to the first.

    Raises:
        ValueError: The cell is unknown, or a size is below 1.
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
        self.suffixes: list[list[str]] = []  # suffixes of the parameters of each direction of each layer
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
        """Draws all parameters, biases included, uniformly from +-1/sqrt(D), as torch and the code of the paper do.

        A cell whose source sets a bias of the forget gate starts with it; see
        `sequencer.ops.reference.Cell.forget_bias`.
        """
        bound, forget_bias = 1 / math.sqrt(self.hidden_size), CELLS[self.cell].forget_bias
        for name, parameter in self.named_parameters():
            nn.init.uniform_(parameter, -bound, bound)
            if forget_bias is not None and name.startswith("bias_ih"):
                nn.init.constant_(parameter[self.hidden_size : 2 * self.hidden_size], forget_bias)

    def weights(self) -> Layers:
        """Returns the parameters in the form that the functions of `sequencer.ops` take."""

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


@register_notrace_module  # torch.fx keeps it as a leaf: its backend is chosen when it runs
class RNN1d(nn.Module):
    """Recurrent layers over all tokens of a map, read in raster order as one sequence.

    This is the token mixer of the vanilla Sequencer (Tatsunami and Taki 2022, section 4.3). It maps `B H W C` to
    `B H W C` and has no linear layer, so that the channels of the recurrence must equal `input_size`.

    Args:
        input_size: Channels `C` of the input and the output.
        hidden_size: Hidden size `D` per direction.
        cell: One of `sequencer.ops.CELLS`.
        num_layers: Number of stacked layers.
        bidirectional: If True, every layer also scans from the last token to the first.

    Raises:
        ValueError: The cell is unknown, a size is below 1, or the channels of the recurrence differ from `input_size`.
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


@register_notrace_module  # torch.fx keeps it as a leaf: its backend is chosen when it runs
class RNN2d(nn.Module):
    """Recurrent layers that scan every column and every row of a token map, followed by a linear layer.

    This is BiLSTM2D of Tatsunami and Taki 2022, section 3.2, for any cell. It maps `B H W C` to `B H W C`.

    Args:
        input_size: Channels `C` of the input and the output.
        hidden_size: Hidden size `D` per direction.
        cell: One of `sequencer.ops.CELLS`.
        num_layers: Number of stacked layers in each axis.
        bidirectional: If True, columns and rows are scanned in both directions; if False, only from top to bottom and
            from left to right.
        union: `cat` concatenates and `add` adds the outputs of both axes; `vertical` scans only the columns,
            `horizontal` only the rows.
        with_fc: If True, a linear layer projects the outputs to `input_size` channels; if False, they must have that
            many.

    Raises:
        ValueError: The cell or the union is unknown, a size is below 1, or the channels do not equal `input_size` where
            there is no linear layer.
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
                f"without the final linear layer the {joined} channels of the recurrences must equal the "
                f"{input_size} of the input: change hidden_size, union or directions"
            )

        # registered first, as in timm, so that the state dicts have the same order
        self.fc = Linear(joined, input_size) if with_fc else nn.Identity()
        sizes = (input_size, hidden_size, cell, num_layers, bidirectional)
        self.rnn_v = RNN(*sizes) if union != "horizontal" else None
        self.rnn_h = RNN(*sizes) if union != "vertical" else None
        self.packed = PackedWeights()

    def train(self, mode: bool = True) -> "RNN2d":
        self.packed.clear()
        return super().train(mode)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        if not all(rnn is None or _is_plain(rnn) for rnn in (self.rnn_v, self.rnn_h)):
            return self.fc(self._call_modules(x))
        vertical = self.rnn_v.weights() if self.rnn_v is not None else None
        horizontal = self.rnn_h.weights() if self.rnn_h is not None else None
        return self.fc(rnn2d(x, vertical, horizontal, self.cell, self.union, packed=self.packed))

    def _call_modules(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W K"]:
        """Computes what `rnn2d` does by calling `rnn_v` and `rnn_h` as modules, one after the other."""
        outputs = []
        if self.rnn_v is not None:
            columns = x.transpose(1, 2)
            outputs.append(self.rnn_v(columns.flatten(0, 1)).unflatten(0, columns.shape[:2]).transpose(1, 2))
        if self.rnn_h is not None:
            outputs.append(self.rnn_h(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return outputs[0] + outputs[1] if self.union == "add" else torch.cat(outputs, dim=-1)


def _is_plain(rnn: nn.Module) -> bool:
    """Whether a recurrence is computed by its weights alone: a user may have wrapped it or registered hooks.

    `torch.nn.utils.prune`, `weight_norm` and `spectral_norm` compute the weights in such a hook. The attributes are
    private, as read in torch 2.14.
    """
    hooks = (rnn._forward_pre_hooks, rnn._forward_hooks, rnn._backward_pre_hooks, rnn._backward_hooks)
    return isinstance(rnn, RNN) and not any(hooks)
