"""The recurrences, written out: one scan over time in plain PyTorch, any dtype, differentiable any number of times.

This is the truth that every other backend is tested against. `N` sequences, `T` steps, `C` channels, `D` hidden
size, `G` gates; the rows of a weight are its gates one after another, in the order named in each step function.

Sources: LSTM with forget gate, GRU and plain RNN as in PyTorch, whose parameters they share; peepholes from Gers
and Schmidhuber 2000; IndyLSTM from Gonnet and Deselaers 2019 (arXiv 1903.08023), section 2; the LSTM without a
forget gate from Hochreiter and Schmidhuber 1997, section 4 and appendix A.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Weights(NamedTuple):
    """The parameters of one direction of one layer; what a cell does not have is None."""

    weight_ih: Float[Tensor, "GD C"]
    weight_hh: Float[Tensor, "GD D"] | Float[Tensor, " GD"]  # a vector where the recurrence is diagonal
    bias_ih: Float[Tensor, " GD"]
    bias_hh: Float[Tensor, " GD"] | None = None
    weight_ch: Float[Tensor, " 3D"] | None = None  # peepholes of i, f and o


State = tuple[Tensor, Tensor]  # h and c, each (N, D); cells without an inner state carry c along untouched


def _lstm(gates: Tensor, state: State, w: Weights) -> State:
    """i, f, g, o."""
    h, c = state
    i, f, g, o = (gates + F.linear(h, w.weight_hh, w.bias_hh)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _peephole_lstm(gates: Tensor, state: State, w: Weights) -> State:
    """i, f, g, o; the input and forget gates see the cell before the update, the output gate after it."""
    h, c = state
    i, f, g, o = (gates + F.linear(h, w.weight_hh, w.bias_hh)).chunk(4, dim=-1)
    assert w.weight_ch is not None
    p_i, p_f, p_o = w.weight_ch.chunk(3)
    c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    return (o + p_o * c).sigmoid() * c.tanh(), c


def _indylstm(gates: Tensor, state: State, w: Weights) -> State:
    """i, f, g, o; every unit sees its own output alone."""
    h, c = state
    i, f, g, o = (gates + w.weight_hh * h.repeat(1, 4)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _lstm1997(gates: Tensor, state: State, w: Weights) -> State:
    """i, g, o; nothing is forgotten, the cell input is squashed to [-2, 2] and the cell state to [-1, 1].

    The paper feeds the gates' own activations back as well and cuts the gradient at the gates; this does neither.
    """
    h, c = state
    i, g, o = (gates + F.linear(h, w.weight_hh)).chunk(3, dim=-1)
    c = c + i.sigmoid() * (4 * g.sigmoid() - 2)
    return o.sigmoid() * (2 * c.sigmoid() - 1), c


def _gru(gates: Tensor, state: State, w: Weights) -> State:
    """r, z, n; the reset gate scales the recurrent term of n, bias included."""
    h, c = state
    r, z, n = gates.chunk(3, dim=-1)
    r_h, z_h, n_h = F.linear(h, w.weight_hh, w.bias_hh).chunk(3, dim=-1)
    z = (z + z_h).sigmoid()
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (1 - z) * n + z * h, c


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, State, Weights], State]:
    def step(gates: Tensor, state: State, w: Weights) -> State:
        h, c = state
        return activation(gates + F.linear(h, w.weight_hh, w.bias_hh)), c

    return step


@dataclass(frozen=True)
class Cell:
    """What distinguishes one cell from another: its step and the parameters it has."""

    step: Callable[[Tensor, State, Weights], State]
    gates: int
    diagonal: bool = False
    bias_hh: bool = True
    peephole: bool = False
    forget_bias: float | None = None  # where the source starts the forget gate open

    def shapes(self, input_size: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Field of `Weights` -> shape."""
        rows = self.gates * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows,) if self.diagonal else (rows, hidden_size),
            "bias_ih": (rows,),
        }
        if self.bias_hh:
            shapes["bias_hh"] = (rows,)
        if self.peephole:
            shapes["weight_ch"] = (3 * hidden_size,)
        return shapes


CELLS = {
    "lstm": Cell(_lstm, gates=4),
    "gru": Cell(_gru, gates=3),
    "rnn": Cell(_rnn(torch.tanh), gates=1),
    "rnn_relu": Cell(_rnn(torch.relu), gates=1),
    "peephole_lstm": Cell(_peephole_lstm, gates=4, peephole=True),
    "indylstm": Cell(_indylstm, gates=4, diagonal=True, bias_hh=False, forget_bias=1.0),
    "lstm1997": Cell(_lstm1997, gates=3, bias_hh=False),
}


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for; None where it is off, and on devices that it does not know (meta)."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None


def scan(x: Float[Tensor, "N T C"], w: Weights, cell: str, reverse: bool = False) -> Float[Tensor, "N T D"]:
    """Outputs of one direction of one layer, from a zero state; `reverse` walks from the last step to the first.

    Half-precision inputs (autocast included) keep their state in float32.
    """
    gates = F.linear(x, w.weight_ih, w.bias_ih)
    state_dtype = torch.promote_types(gates.dtype, torch.float32)
    hidden_size = w.weight_hh.shape[0] // CELLS[cell].gates
    h = c = torch.zeros(x.shape[0], hidden_size, dtype=state_dtype, device=x.device)
    if autocast_dtype(x.device.type) is None:
        w = Weights._make(t if t is None else t.to(state_dtype) for t in w)
    step, steps = CELLS[cell].step, range(x.shape[1])
    outputs = []
    for t in reversed(steps) if reverse else steps:
        h, c = step(gates[:, t].to(state_dtype), (h, c), w)
        outputs.append(h)
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, dim=1).to(gates.dtype)


def rnn(x: Float[Tensor, "N T C"], layers: list[tuple[Weights, ...]], cell: str) -> Float[Tensor, "N T K"]:
    """Layers one upon another, each of one or two directions; `K` is `D` times the number of directions."""
    for directions in layers:
        outputs = [scan(x, w, cell, reverse=bool(index)) for index, w in enumerate(directions)]
        x = torch.cat(outputs, dim=-1)
    return x
