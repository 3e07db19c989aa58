"""Reference implementation of every cell: a loop over time steps in plain PyTorch.

It works in any floating-point dtype and is differentiable any number of times. It is the standard that all other
backends are tested against.

Shape letters: `N` sequences, `T` steps, `C` channels, `D` hidden size, `G` gates. The rows of a weight are `G` blocks
of `D` rows, one a gate, in the order given in the docstring of each step function.

Sources: LSTM with a forget gate, GRU and plain RNN as in PyTorch, with the same parameters; peephole connections from
Gers and Schmidhuber 2000; IndyLSTM from Gonnet and Deselaers 2019 (arXiv 1903.08023), section 2; LSTM without a forget
gate from Hochreiter and Schmidhuber 1997, section 4 and appendix A.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Weights(NamedTuple):
    """The parameters of one direction of one layer; parameters that the cell does not have are None."""

    weight_ih: Float[Tensor, "GD C"]
    weight_hh: Float[Tensor, "GD D"] | Float[Tensor, " GD"]  # the diagonals of the gates, for an IndyLSTM
    bias_ih: Float[Tensor, " GD"]
    bias_hh: Float[Tensor, " GD"] | None = None
    weight_ch: Float[Tensor, " 3D"] | None = None  # peephole weights of i, f and o


Layers = list[tuple[Weights, ...]]  # first layer first; each layer holds (forward,) or (forward, backward)
State = tuple[Tensor, Tensor]  # h and c, each (N, D); a GRU and a plain RNN return c unchanged
Gates = dict[str, Tensor]  # by name: the activations of the gates, each (N, D) in [0, 1]
Step = State | tuple[Tensor, Tensor, Gates]  # the next state, with the gates of a cell that has some


def _lstm(gates: Tensor, state: State, w: Weights) -> Step:
    """Computes one step of an LSTM; gates i, f, g, o."""
    h, _ = state
    return _update(gates + F.linear(h, w.weight_hh, w.bias_hh), state)


def _update(gates: Tensor, state: State) -> Step:
    """Computes the gates of an LSTM and its next state from their complete inputs i, f, g, o."""
    _, c = state
    i, f, g, o = gates.chunk(4, dim=-1)
    i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
    c = f * c + i * g.tanh()
    return o * c.tanh(), c, {"input": i, "forget": f, "output": o}


def _peephole_lstm(gates: Tensor, state: State, w: Weights) -> Step:
    """Computes one step of an LSTM with peepholes; gates i, f, g, o.

    The input and forget gates read the cell state before the update, the output gate reads it after the update.
    """
    h, c = state
    i, f, g, o = (gates + F.linear(h, w.weight_hh, w.bias_hh)).chunk(4, dim=-1)
    assert w.weight_ch is not None
    p_i, p_f, p_o = w.weight_ch.chunk(3)
    i, f = (i + p_i * c).sigmoid(), (f + p_f * c).sigmoid()
    c = f * c + i * g.tanh()
    o = (o + p_o * c).sigmoid()
    return o * c.tanh(), c, {"input": i, "forget": f, "output": o}


def _indylstm(gates: Tensor, state: State, w: Weights) -> Step:
    """Computes one step of an IndyLSTM, whose recurrent weights are diagonal matrices; gates i, f, g, o."""
    h, _ = state
    return _update(gates + w.weight_hh * h.repeat(1, 4), state)


def _lstm1997(gates: Tensor, state: State, w: Weights) -> Step:
    """Computes one step of the LSTM of 1997, which has no forget gate; gates i, g, o.

    The cell input is squashed to [-2, 2], the cell state to [-1, 1]. Two properties of the paper are left out: gate
    activations are not fed back as inputs, and gradients are not truncated at the gates.
    """
    h, c = state
    i, g, o = (gates + F.linear(h, w.weight_hh)).chunk(3, dim=-1)
    i, o = i.sigmoid(), o.sigmoid()
    c = c + i * (4 * g.sigmoid() - 2)
    return o * (2 * c.sigmoid() - 1), c, {"input": i, "output": o}


def _gru(gates: Tensor, state: State, w: Weights) -> Step:
    """Computes one step of a GRU; gates r, z, n. The reset gate scales the recurrent term of n, including its bias."""
    h, c = state
    r, z, n = gates.chunk(3, dim=-1)
    r_h, z_h, n_h = F.linear(h, w.weight_hh, w.bias_hh).chunk(3, dim=-1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + r * n_h).tanh()
    return (1 - z) * n + z * h, c, {"reset": r, "update": z}


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, State, Weights], Step]:
    def step(gates: Tensor, state: State, w: Weights) -> Step:
        h, c = state
        return activation(gates + F.linear(h, w.weight_hh, w.bias_hh)), c

    return step


@dataclass(frozen=True)
class Cell:
    """The step function of a cell and the parameters that it has."""

    step: Callable[[Tensor, State, Weights], Step]  # (input projection, previous state, weights) -> state, gates
    gates: int
    diagonal: bool = False  # weight_hh holds diagonals
    bias_hh: bool = True
    peephole: bool = False
    forget_bias: float | None = None  # initial bias of the forget gate, where the source sets one

    def shapes(self, input_size: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter, by its field name in `Weights`."""
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


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast converts `x`.

    Returns:
        The dtype, or None where autocast is disabled, does not support the device (e.g. meta), or leaves `x` as it is,
        as torch does with float64.
    """
    device_type = x.device.type
    # torch 2.11 cannot trace the check, which is for devices that are not compiled for, such as meta
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device_type):
        return None
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def scan(x: Float[Tensor, "N T C"], w: Weights, cell: str, reverse: bool = False) -> Float[Tensor, "N T D"]:
    """Runs one direction of one layer, from a zero state.

    Args:
        x: Inputs, in any floating-point dtype.
        w: The parameters.
        cell: One of `CELLS`.
        reverse: If True, the scan runs from the last step to the first.

    Returns:
        The outputs of every step, in the dtype of `x` or of autocast. The state is kept in float32 where that is
        narrower.
    """
    gates = F.linear(x, w.weight_ih, w.bias_ih)
    state_dtype = torch.promote_types(gates.dtype, torch.float32)
    hidden_size = w.weight_hh.shape[0] // CELLS[cell].gates
    h = c = torch.zeros(x.shape[0], hidden_size, dtype=state_dtype, device=x.device)
    if autocast_dtype(x) is None:
        w = Weights._make(t if t is None else t.to(state_dtype) for t in w)
    step, steps = CELLS[cell].step, range(x.shape[1])
    outputs = []
    for t in reversed(steps) if reverse else steps:
        h, c = step(gates[:, t].to(state_dtype), (h, c), w)[:2]
        outputs.append(h)
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, dim=1).to(gates.dtype)


class Trace(NamedTuple):
    """What one direction of one layer computes at every step."""

    hidden: Float[Tensor, "N T D"]
    state: Float[Tensor, "N T D"]  # the cell state; the hidden state of a cell that has no other
    gates: dict[str, Float[Tensor, "N T D"]]  # by name, in [0, 1]; empty for a cell without gates


def trace(x: Float[Tensor, "N T C"], w: Weights, cell: str) -> Trace:
    """Runs one direction of one layer from the first step to the last, as `scan` does, and keeps states and gates.

    Args:
        x: Inputs, in a floating-point dtype that autocast leaves as it is.
        w: The parameters, of the same dtype.
        cell: One of `CELLS`.
    """
    inputs = F.linear(x, w.weight_ih, w.bias_ih)
    h = c = x.new_zeros(x.shape[0], w.weight_hh.shape[0] // CELLS[cell].gates)
    hidden, states, gates = [], [], []
    for step_inputs in inputs.unbind(1):  # whose gradient is one stack, that of an index a zero-filled copy per step
        h, new, *found = CELLS[cell].step(step_inputs, (h, c), w)
        hidden.append(h)
        states.append(h if new is c else new)  # a GRU and a plain RNN return c unchanged
        c = new
        gates.append(found[0] if found else {})
    stacked = {name: torch.stack([step[name] for step in gates], 1) for name in gates[0]}
    return Trace(torch.stack(hidden, 1), torch.stack(states, 1), stacked)


def rnn(x: Float[Tensor, "N T C"], layers: Layers, cell: str) -> Float[Tensor, "N T K"]:
    """Runs stacked layers of one or two directions each; `K` is `D` times the number of directions."""
    for directions in layers:
        outputs = [scan(x, w, cell, reverse=bool(index)) for index, w in enumerate(directions)]
        x = torch.cat(outputs, dim=-1)
    return x
