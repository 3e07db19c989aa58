"""The recurrences as users call them: along one sequence, or along the columns and rows of a token map.

The only place that chooses a backend. `B` batch, `H W` token rows and columns, `C` channels, `N` sequences,
`T` steps, `D` hidden size per direction, `K` output channels.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sequencer.ops import cpu, fused, reference, torch_rnn, triton_kernels
from sequencer.ops.packing import PackedWeights
from sequencer.ops.reference import CELLS, Weights, autocast_dtype

log = logging.getLogger("sequencer")

BY_SPEED = ("triton", "fused", "torch", "reference")
BACKENDS = ("auto", *BY_SPEED)
Layers = list[tuple[Weights, ...]]  # layers, first to last; each holds one direction or (forward, backward)


class Choice(NamedTuple):
    """Which backend serves a recurrence, and why."""

    backend: str
    reason: str


class _Settings:
    backend: str | None = None
    recompute: bool = False


def configure(backend: str | None = None, recompute: bool = False) -> None:
    """Settings of the process, for all recurrences.

    Args:
        backend: one of `BACKENDS`, preferred: what it cannot serve goes to the next best, as `explain` tells. `auto`
            takes the fastest; None what the environment variable SEQUENCER_BACKEND says, or else the fastest.
        recompute: the fused backends keep no activations of the recurrence but run it again in the backward pass:
            less memory, more time.

    Raises:
        ValueError: the backend is unknown.
    """
    if backend is not None:
        _check(backend)
    _Settings.backend, _Settings.recompute = backend, recompute


def explain(
    cell: str = "lstm",
    hidden_size: int = 48,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> Choice:
    """The backend that `rnn1d` and `rnn2d` take for such inputs, with the reason; `backend` as they are given it.

    Raises:
        ValueError: the cell or the backend is unknown, or a backend given here cannot serve such inputs. One that
            `configure` or the environment prefers hands over instead.
    """
    preferred = _Settings.backend or os.environ.get("SEQUENCER_BACKEND", "auto")
    return _choose(cell, hidden_size, dtype, torch.device(device).type, preferred, backend)


@torch.compiler.assume_constant_result  # decided once a graph
def _backend(cell: str, hidden_size: int, dtype: torch.dtype, device: str, backend: str | None) -> str:
    return explain(cell, hidden_size, dtype, device, backend).backend


@functools.cache
def _choose(
    cell: str, hidden_size: int, dtype: torch.dtype, device: str, preferred: str, demanded: str | None
) -> Choice:
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}; there are {', '.join(CELLS)}")
    first = demanded or preferred
    _check(first)
    refusals: dict[str, str] = {}
    for candidate in [first, *(name for name in BY_SPEED if name != first)]:
        if candidate == "auto":
            continue
        refusal = _refusal(candidate, cell, hidden_size, dtype, device, asked=candidate == first)
        if refusal is None:
            why = "the fastest that serves it" if first == "auto" else f"{first} was asked for"
            return Choice(candidate, "; ".join([why, *(f"{name}: {reason}" for name, reason in refusals.items())]))
        if candidate == demanded:
            raise ValueError(f"the {demanded} backend cannot serve {cell}: {refusal}")
        refusals[candidate] = refusal
    raise AssertionError("the reference serves everything")


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")


def _refusal(backend: str, cell: str, hidden_size: int, dtype: torch.dtype, device: str, asked: bool) -> str | None:
    """Why a backend does not serve such inputs; None where it does. The interpreter serves only if asked for."""
    if backend == "reference":
        return None
    if backend == "torch":
        return None if cell in torch_rnn.FUNCTIONS else f"it has no {cell} cell"
    if cell not in fused.CELLS:
        return f"it serves {' and '.join(fused.CELLS)}"
    if backend == "fused":
        if device != "cpu":
            return "it runs on a CPU"
        return f"it has no {dtype}" if dtype not in cpu.DTYPES else _once(cpu.unavailable())
    if device != "cuda" and not (device == "cpu" and asked and triton_kernels.interpreted()):
        return "it runs on a GPU"
    low, high = triton_kernels.HIDDEN_SIZES
    if not low <= hidden_size <= high:
        return f"its hidden sizes are {low} to {high}"
    return f"it has no {dtype}" if dtype not in triton_kernels.DTYPES else triton_kernels.unavailable()


@functools.cache
def _once(refusal: str | None) -> str | None:
    """Says once in a process that the fast way is shut."""
    if refusal is not None:
        log.warning("recurrences run on torch's slower kernels: %s", refusal)
    return refusal


def rnn1d(
    x: Float[Tensor, "N T C"],
    layers: Layers,
    cell: str = "lstm",
    backend: str | None = None,
    packed: PackedWeights | None = None,
) -> Float[Tensor, "N T K"]:
    """Outputs of every step, forward and backward direction concatenated; the state starts at zero."""
    return rnn2d(x.unsqueeze(1), None, layers, cell, backend=backend, packed=packed).squeeze(1)


def rnn2d(
    x: Float[Tensor, "B H W C"],
    vertical: Layers | None,
    horizontal: Layers | None,
    cell: str = "lstm",
    union: str = "cat",
    backend: str | None = None,
    packed: PackedWeights | None = None,
) -> Float[Tensor, "B H W K"]:
    """BiLSTM2D without its closing linear layer (Tatsunami and Taki 2022, section 3.2).

    `vertical` runs down every column, `horizontal` along every row; a sweep that is None is left out. `union`
    joins the two: `cat` stacks their channels in the order [vertical, horizontal], `add` sums them. `packed` keeps
    what the fused backends make of the weights from one inference to the next.
    """
    layers = {sweep: stack for sweep, stack in ((0, vertical), (2, horizontal)) if stack is not None}
    first = next(iter(layers.values()))[0][0]
    hidden_size = first.weight_hh.shape[0] // CELLS[cell].gates
    dtype = autocast_dtype(x.device.type) or x.dtype
    name = _backend(cell, hidden_size, dtype, x.device.type, backend)
    if torch.compiler.is_exporting():
        name = "torch" if cell in torch_rnn.FUNCTIONS else "reference"  # a program that runs without this package
    elif torch.compiler.is_compiling() and name == "torch":
        name = "reference"  # inductor fails on oneDNN's LSTM primitive; the scan can be traced
    if name in ("fused", "triton"):
        joined = _all_at_once(x, layers, name, packed)
        outputs = joined.chunk(2, dim=-1) if len(layers) == 2 and union == "add" else (joined,)
    else:
        rnn = torch_rnn.rnn if name == "torch" else reference.rnn
        outputs = tuple(_one_by_one(x, sweep, stack, cell, rnn) for sweep, stack in layers.items())
    if len(outputs) == 1:
        return outputs[0]
    return outputs[0] + outputs[1] if union == "add" else torch.cat(outputs, dim=-1)


def _one_by_one(
    x: Tensor, sweep: int, layers: Layers, cell: str, rnn: Callable[[Tensor, Layers, str], Tensor]
) -> Tensor:
    """One sweep as a recurrence over a batch of columns (0) or rows (2)."""
    tokens = x.transpose(1, 2) if sweep == 0 else x
    B, outer, T, C = tokens.shape
    y = rnn(tokens.reshape(B * outer, T, C), layers, cell)
    y = y.reshape(B, outer, T, y.shape[-1])
    return y.transpose(1, 2) if sweep == 0 else y


def _all_at_once(x: Tensor, layers: dict[int, Layers], backend: str, packed: PackedWeights | None) -> Tensor:
    """The first layer of all sweeps in one launch, deeper ones sweep by sweep, since their inputs differ."""

    def run(x: Tensor, depth: int, sweeps: list[int]) -> Tensor:
        weights = [w for sweep in sweeps for w in layers[sweep][depth]]
        directions = [sweep + i for sweep in sweeps for i in range(len(layers[sweep][depth]))]
        if packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
            weight = fused.pack(weights)
        else:
            weight = packed.get((depth, *sweeps), weights, backend, autocast_dtype(x.device.type) or x.dtype)
        return fused.run(x, weight, directions, backend, _Settings.recompute)

    y = run(x, 0, list(layers))
    depth = len(next(iter(layers.values())))
    if depth == 1:
        return y
    parts = dict(zip(layers, y.chunk(len(layers), dim=-1), strict=True))
    for layer in range(1, depth):
        parts = {sweep: run(part, layer, [sweep]) for sweep, part in parts.items()}
    return torch.cat(list(parts.values()), dim=-1)
