"""Conversion of every cell to an LSTM, GRU or plain RNN operator of ONNX or torch.

An IndyLSTM is an LSTM whose recurrent matrices are diagonal. An LSTM of 1997 is an LSTM whose forget gate is always 1
and whose cell state is half that of the original: with s the sigmoid, `g(x) = 4 s(x) - 2 = 2 tanh(x / 2)` and
`h(c) = 2 s(c) - 1 = tanh(c / 2)`, so `c / 2` is increased by `i tanh(x / 2)` and the output is `o tanh(c / 2)`. Both
conversions are exact up to rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sequencer.config.errors import RequestError
from sequencer.layers import RNN, RNN1d, RNN2d
from sequencer.ops import Weights

OPEN = 30.0  # bias of the forget gate; its sigmoid is 1 in float32 and float16


def as_lstm(w: Weights, cell: str) -> Weights:
    """Converts the weights of an `indylstm` or `lstm1997` to those of an equivalent LSTM with gates i, f, g, o."""
    if cell == "indylstm":
        recurrent = torch.cat([row.diag() for row in w.weight_hh.chunk(4)])
        return Weights(w.weight_ih, recurrent, w.bias_ih, torch.zeros_like(w.bias_ih))

    def gates(weight: Tensor, forget: float) -> Tensor:
        i, g, o = weight.chunk(3)
        return torch.cat([i, torch.full_like(i, forget), g / 2, o])

    bias = gates(w.bias_ih, OPEN)
    return Weights(gates(w.weight_ih, 0), gates(w.weight_hh, 0), bias, torch.zeros_like(bias))


@torch.no_grad()
def use_lstms(model: nn.Module) -> None:
    """Replaces every `indylstm` and `lstm1997` of a model by an equivalent LSTM, in place."""
    for mixer in [module for module in model.modules() if isinstance(module, RNN1d | RNN2d)]:
        for child, rnn in list(mixer.named_children()):
            if not isinstance(rnn, RNN) or rnn.cell not in ("indylstm", "lstm1997"):
                continue
            weights = {
                name + suffix: tensor
                for suffixes, directions in zip(rnn.suffixes, rnn.weights(), strict=True)
                for suffix, w in zip(suffixes, directions, strict=True)
                for name, tensor in as_lstm(w, rnn.cell)._asdict().items()
                if tensor is not None
            }
            inputs = weights["weight_ih_l0"].shape[1]
            lstm = RNN(inputs, rnn.hidden_size, "lstm", len(rnn.suffixes), len(rnn.suffixes[0]) == 2)
            lstm.load_state_dict(weights)
            setattr(mixer, child, lstm)
            if isinstance(mixer, RNN2d):
                mixer.cell = "lstm"


@dataclass(frozen=True)
class Node:
    """The ONNX operator of a cell."""

    operator: str
    gates: tuple[int, ...]  # for each gate of the operator, its position among this package's gates
    activation: str | None = None


NODES = {
    "lstm": Node("LSTM", (0, 3, 1, 2)),  # gates of the operator: i, o, f, c
    "peephole_lstm": Node("LSTM", (0, 3, 1, 2)),
    "gru": Node("GRU", (1, 0, 2)),  # z, r, h
    "rnn": Node("RNN", (0,), "Tanh"),
    "rnn_relu": Node("RNN", (0,), "Relu"),
}


class OnnxLayer(nn.Module):
    """One layer of an `RNN` as an ONNX operator.

    The weights are stored in the operator's own layout, so that the graph does not slice or concatenate them.

    Args:
        directions: Parameters of the forward direction and, if bidirectional, of the backward direction.
        cell: A key of `NODES`.
        hidden_size: Hidden size `D` per direction.
    """

    W: Tensor
    R: Tensor
    B: Tensor
    P: Tensor | None

    def __init__(self, directions: tuple[Weights, ...], cell: str, hidden_size: int) -> None:
        super().__init__()
        self.node, self.hidden_size, self.directions = NODES[cell], hidden_size, len(directions)

        def stack(name: str) -> Tensor:
            return torch.stack([self._reorder(getattr(w, name)) for w in directions])

        self.register_buffer("W", stack("weight_ih"))
        self.register_buffer("R", stack("weight_hh"))
        self.register_buffer("B", torch.cat([stack("bias_ih"), stack("bias_hh")], dim=1))
        peepholes = [w.weight_ch.detach() for w in directions if w.weight_ch is not None]
        self.register_buffer("P", None)
        if peepholes:  # order i, f, o in this package; i, o, f in ONNX
            self.P = torch.stack([torch.cat([p.chunk(3)[k] for k in (0, 2, 1)]) for p in peepholes])

    def _reorder(self, weight: Tensor) -> Tensor:
        gates = weight.detach().chunk(len(self.node.gates))
        return torch.cat([gates[k] for k in self.node.gates])

    def forward(self, x: Float[Tensor, "T N C"]) -> Float[Tensor, "T directions N D"]:
        attributes: dict[str, Any] = {"hidden_size": self.hidden_size}
        attributes["direction"] = "bidirectional" if self.directions == 2 else "forward"
        inputs: list[Tensor | None] = [x, self.W, self.R, self.B]
        if self.node.operator == "GRU":
            attributes["linear_before_reset"] = 1  # torch's definition of a GRU
        elif self.node.activation:
            attributes["activations"] = [self.node.activation] * self.directions
        elif self.P is not None:
            inputs += [None, None, None, self.P]  # sequence lengths, initial h and initial c are left out
        shape = (x.shape[0], self.directions, x.shape[1], self.hidden_size)
        return torch.onnx.ops.symbolic(f"::{self.node.operator}", inputs, attributes, dtype=x.dtype, shape=shape)


class OnnxRNN(nn.Module):
    """All layers of an `RNN`, scanning the columns or the rows of a token map, as ONNX operators."""

    def __init__(self, rnn: RNN, vertical: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OnnxLayer(directions, rnn.cell, rnn.hidden_size) for directions in rnn.weights())
        self.vertical = vertical

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W K"]:
        """Runs the layers with the steps as the first dimension, which the operators require."""
        x = x.permute(1, 0, 2, 3) if self.vertical else x.permute(2, 0, 1, 3)
        T, B, outer, _ = x.shape
        y = self.layers[0](x.reshape(T, B * outer, -1))
        for layer in self.layers[1:]:
            y = layer(y.transpose(1, 2).reshape(T, B * outer, -1))
        y = y.reshape(T, y.shape[1], B, outer, -1)
        y = y.permute(2, 0, 3, 1, 4) if self.vertical else y.permute(2, 3, 0, 1, 4)
        return y.flatten(3)


class OnnxMixer(nn.Module):
    """An `RNN1d` or `RNN2d` whose recurrences are ONNX operators."""

    def __init__(self, mixer: RNN1d | RNN2d) -> None:
        super().__init__()
        rnns = (mixer.rnn_v, mixer.rnn_h) if isinstance(mixer, RNN2d) else (None, mixer.rnn)
        self.rnns = nn.ModuleList(
            OnnxRNN(rnn, vertical) for rnn, vertical in zip(rnns, (True, False), strict=True) if rnn is not None
        )
        self.adds = isinstance(mixer, RNN2d) and mixer.union == "add"
        self.fc = mixer.fc if isinstance(mixer, RNN2d) else nn.Identity()
        self.flat = isinstance(mixer, RNN1d)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        tokens = x.flatten(1, 2).unsqueeze(1) if self.flat else x
        outputs = [rnn(tokens) for rnn in self.rnns]
        joined = sum(outputs) if self.adds else torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return self.fc(joined).reshape(x.shape)


def use_nodes(model: nn.Module) -> None:
    """Replaces every token mixer of a model by one whose recurrences are ONNX operators, in place.

    Raises:
        RequestError: A cell has no ONNX operator.
    """
    use_lstms(model)
    for module in model.modules():
        if isinstance(module, RNN) and module.cell not in NODES:
            raise RequestError(f"ONNX has no operator for the cell {module.cell!r}: use --format torch_export or timm")
    for name, module in list(model.named_modules()):
        if isinstance(module, RNN1d | RNN2d):
            model.set_submodule(name, OnnxMixer(module))
