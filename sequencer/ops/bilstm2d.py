"""Recurrences along one sequence (`rnn1d`) or along the columns and rows of a token map (`rnn2d`).

This module is the only place that chooses a backend.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `N` sequences, `T` steps, `D` hidden size per
direction, `K` output channels.
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

BY_SPEED = ("triton", "fused", "torch", "reference")  # fastest first
BACKENDS = ("auto", *BY_SPEED)
Layers = list[tuple[Weights, ...]]  # first layer first; each layer holds (forward,) or (forward, backward)


class Choice(NamedTuple):
    """The backend that computes a recurrence, and the reason for its choice."""

    backend: str
    reason: str


class _Settings:
    backend: str | None = None
    recompute: bool = False


def configure(backend: str | None = None, recompute: bool = False) -> None:
    """Sets the preferred backend and the memory mode of all recurrences in this process.

    Args:
        backend: One of `BACKENDS`. Inputs that it does not support are computed by the fastest backend that does; see
            `explain`. `auto` prefers the fastest. None, the default, takes the value of the environment variable
            SEQUENCER_BACKEND, or `auto` where it is not set.
        recompute: If True, the `fused` and `triton` backends do not keep the activations of the recurrence but compute
            them again in the backward pass, which takes less memory and more time.

    Raises:
        ValueError: The backend is unknown.
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
    """Returns the backend that `rnn1d` and `rnn2d` use for given inputs, and the reason.

    Args:
        cell: One of `CELLS`.
        hidden_size: Hidden size `D` per direction.
        dtype: Data type of the inputs, or that of autocast where it is enabled.
        device: Device of the inputs.
        backend: The `backend` argument of `rnn1d` and `rnn2d`. It must support the inputs, whereas a backend preferred
            by `configure` or the environment is replaced by another one where it does not.

    Raises:
        ValueError: The cell or the backend is unknown, or `backend` does not support the inputs.
    """
    preferred = _Settings.backend or os.environ.get("SEQUENCER_BACKEND", "auto")
    return _choose(cell, hidden_size, dtype, torch.device(device).type, preferred, backend)


@torch.compiler.assume_constant_result  # the choice is made when a graph is traced
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
        refusal = _refusal(candidate, cell, hidden_size, dtype, device, requested=candidate == first)
        if refusal is None:
            why = "the fastest that serves it" if first == "auto" else f"{first} was asked for"
            return Choice(candidate, "; ".join([why, *(f"{name}: {reason}" for name, reason in refusals.items())]))
        if candidate == demanded:
            raise ValueError(f"the {demanded} backend cannot serve {cell}: {refusal}")
        refusals[candidate] = refusal
    raise AssertionError("the reference backend supports all inputs")


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")


def _refusal(backend: str, cell: str, hidden_size: int, dtype: torch.dtype, device: str, requested: bool) -> str | None:
    """Returns why a backend does not support the inputs, or None if it does.

    Triton's interpreter, which is slow, is used only where the backend was `requested` by name.
    """
    if backend == "reference":
        return None
    if backend == "torch":
        return None if cell in torch_rnn.FUNCTIONS else f"it has no {cell} cell"
    if cell not in fused.CELLS:
        return f"it serves {' and '.join(fused.CELLS)}"
    if backend == "fused":
        if device != "cpu":
            return "it runs on a CPU"
        return f"it has no {dtype}" if dtype not in cpu.DTYPES else _warn_once(cpu.unavailable())
    if device != "cuda" and not (device == "cpu" and requested and triton_kernels.interpreted()):
        return "it runs on a GPU"
    low, high = triton_kernels.HIDDEN_SIZES
    if not low <= hidden_size <= high:
        return f"its hidden sizes are {low} to {high}"
    return f"it has no {dtype}" if dtype not in triton_kernels.DTYPES else triton_kernels.unavailable()


@functools.cache
def _warn_once(refusal: str | None) -> str | None:
    """Warns, once in a process, that the CPU kernel is not available; returns its argument."""
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
    """Runs recurrent layers over a batch of sequences, from a zero state.

    Args:
        x: Inputs, in any floating-point dtype. Under autocast the recurrence runs in autocast's dtype.
        layers: The parameters of each layer.
        cell: One of `CELLS`.
        backend: A backend that must be used. By default the one that `explain` names.
        packed: A cache in which the fused backends keep packed weights between inference calls.

    Returns:
        The outputs of the last layer at every step. `K` is `D` for one direction. For two it is `2 D`, the forward
        direction first.

    Raises:
        ValueError: The cell or the backend is unknown, or `backend` does not support the inputs.
    """
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
    """Runs recurrent layers along the columns and the rows of a token map, each from a zero state.

    This is BiLSTM2D of Tatsunami and Taki 2022, section 3.2, without its final linear layer, for any cell.

    Args:
        x: Token map, in any floating-point dtype. Under autocast the recurrence runs in autocast's dtype.
        vertical: The parameters of each layer that scans the columns, or None to leave this axis out.
        horizontal: The parameters of each layer that scans the rows, or None to leave this axis out.
        cell: One of `CELLS`.
        union: `cat` concatenates the channels of both axes in the order vertical, horizontal; `add` adds them.
        backend: A backend that must be used. By default the one that `explain` names.
        packed: A cache in which the fused backends keep packed weights between inference calls.

    Returns:
        The outputs of the last layers at every token. An axis has `D` channels for one direction and `2 D` for two, the
        forward direction first. `K` is the channels of one axis, or twice that where `cat` joins both.

    Raises:
        ValueError: The cell or the backend is unknown, or `backend` does not support the inputs.
    """
    # an axis is identified by its forward direction: 0 down the columns, 2 along the rows; see `sequencer.ops.fused`
    axes = {axis: layers for axis, layers in ((0, vertical), (2, horizontal)) if layers is not None}
    first = next(iter(axes.values()))[0][0]
    hidden_size = first.weight_hh.shape[0] // CELLS[cell].gates
    dtype = autocast_dtype(x.device.type) or x.dtype
    name = _backend(cell, hidden_size, dtype, x.device.type, backend)
    if torch.compiler.is_exporting():
        name = "torch" if cell in torch_rnn.FUNCTIONS else "reference"  # these run without this package
    elif torch.compiler.is_compiling() and name == "torch":
        name = "reference"  # inductor fails on oneDNN's LSTM primitive
    if name in ("fused", "triton"):
        joined = _run_fused(x, axes, name, packed)
        outputs = joined.chunk(2, dim=-1) if len(axes) == 2 and union == "add" else (joined,)
    else:
        rnn = torch_rnn.rnn if name == "torch" else reference.rnn
        outputs = tuple(_run_axis(x, axis, layers, cell, rnn) for axis, layers in axes.items())
    if len(outputs) == 1:
        return outputs[0]
    return outputs[0] + outputs[1] if union == "add" else torch.cat(outputs, dim=-1)


def _run_axis(x: Tensor, axis: int, layers: Layers, cell: str, rnn: Callable[[Tensor, Layers, str], Tensor]) -> Tensor:
    """Runs the layers of one axis as a recurrence over a batch of columns (axis 0) or rows (axis 2)."""
    tokens = x.transpose(1, 2) if axis == 0 else x
    B, outer, T, C = tokens.shape
    y = rnn(tokens.reshape(B * outer, T, C), layers, cell)
    y = y.reshape(B, outer, T, y.shape[-1])
    return y.transpose(1, 2) if axis == 0 else y


def _run_fused(x: Tensor, axes: dict[int, Layers], backend: str, packed: PackedWeights | None) -> Tensor:
    """Runs all layers by a fused backend; the outputs of the axes are concatenated.

    The first layers of both axes read the same input and share one launch. Deeper layers take one launch an axis.
    """

    def run(x: Tensor, depth: int, chosen: list[int]) -> Tensor:
        weights = [w for axis in chosen for w in axes[axis][depth]]
        directions = [axis + i for axis in chosen for i in range(len(axes[axis][depth]))]
        # only plain tensors outside of autograd and tracing have contents to keep
        if packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
            weight = fused.pack(weights)
        else:
            weight = packed.get((depth, *chosen), weights, backend, autocast_dtype(x.device.type) or x.dtype)
        return fused.run(x, weight, directions, backend, _Settings.recompute)

    y = run(x, 0, list(axes))
    num_layers = len(next(iter(axes.values())))
    if num_layers == 1:
        return y
    outputs = dict(zip(axes, y.chunk(len(axes), dim=-1), strict=True))
    for depth in range(1, num_layers):
        outputs = {axis: run(output, depth, [axis]) for axis, output in outputs.items()}
    return torch.cat(list(outputs.values()), dim=-1)
