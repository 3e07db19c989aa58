"""Recurrences along one sequence (`rnn1d`) or along the columns and rows of a token map (`rnn2d`).

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `N` sequences, `T` steps, `D` hidden size per
direction, `K` output channels.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sequencer.ops import fused, torch_rnn
from sequencer.ops.backends import BACKENDS, Settings, choose
from sequencer.ops.packing import PackedWeights
from sequencer.ops.products import is_transforming
from sequencer.ops.reference import CELLS, Layers, autocast_dtype


@torch.compiler.assume_constant_result  # the choice is made when a graph is traced
def _backend(cell: str, hidden_size: int, dtype: torch.dtype, device: str, backend: str | None) -> str:
    return choose(cell, hidden_size, dtype, device, backend).backend


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
        ValueError: The map has no tokens, the cell or the backend is unknown, or `backend` does not support the inputs,
            or torch.func and forward-mode derivatives, which are left to the reference.
        RuntimeError: torch.jit.trace calls this function, or the weights are on another device than the inputs.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace, which PyTorch has deprecated, does not record recurrences: use torch.export"
        )
    # an axis is identified by its forward direction: 0 down the columns, 2 along the rows; see `sequencer.ops.fused`
    axes = {axis: layers for axis, layers in ((0, vertical), (2, horizontal)) if layers is not None}
    _check(x, axes)
    first = next(iter(axes.values()))[0][0]
    hidden_size = first.weight_hh.shape[0] // CELLS[cell].gates
    dtype = autocast_dtype(x) or x.dtype
    name = _backend(cell, hidden_size, dtype, x.device.type, backend)
    if torch.compiler.is_exporting():
        name = "torch" if cell in torch_rnn.FUNCTIONS else "reference"  # these run without this package
    elif torch.compiler.is_compiling():
        name = "reference" if name == "torch" else name  # inductor fails on oneDNN's LSTM primitive
    elif is_transforming():
        if backend not in (None, "auto", "reference"):
            raise ValueError(
                f"the {backend} backend does not support torch.func and forward-mode derivatives: use the reference"
            )
        name = "reference"
    rnn = BACKENDS[name].rnn
    if rnn is None:
        joined = _run_fused(x, axes, cell, name, packed)
        outputs = joined.chunk(2, dim=-1) if len(axes) == 2 and union == "add" else (joined,)
    else:
        outputs = tuple(_run_axis(x, axis, layers, cell, rnn) for axis, layers in axes.items())
    if len(outputs) == 1:
        return outputs[0]
    return outputs[0] + outputs[1] if union == "add" else torch.cat(outputs, dim=-1)


def _check(x: Tensor, axes: dict[int, Layers]) -> None:
    """Checks that a token map has tokens, and that the weights are on its device, whose memory the kernels access.

    Raises:
        ValueError: The map has no rows or no columns.
        RuntimeError: A weight is on another device.
    """
    height, width = x.shape[1:3]
    if height == 0 or width == 0:
        raise ValueError(f"a recurrence needs at least one step: the token map has {height} rows and {width} columns")
    for tensor in (t for layers in axes.values() for directions in layers for w in directions for t in w):
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"weights of a recurrence are on {tensor.device}, its inputs on {x.device}")


def _run_axis(x: Tensor, axis: int, layers: Layers, cell: str, rnn: Callable[[Tensor, Layers, str], Tensor]) -> Tensor:
    """Runs the layers of one axis as a recurrence over a batch of columns (axis 0) or rows (axis 2)."""
    tokens = x.transpose(1, 2) if axis == 0 else x
    B, outer, T, C = tokens.shape
    y = rnn(tokens.reshape(B * outer, T, C), layers, cell)
    y = y.reshape(B, outer, T, y.shape[-1])
    return y.transpose(1, 2) if axis == 0 else y


def _run_fused(x: Tensor, axes: dict[int, Layers], cell: str, backend: str, packed: PackedWeights | None) -> Tensor:
    """Runs all layers by a fused backend; the outputs of the axes are concatenated.

    The first layers of both axes read the same input and share one launch. Deeper layers take one launch an axis.
    """

    def run(x: Tensor, depth: int, chosen: list[int]) -> Tensor:
        weights = [w for axis in chosen for w in axes[axis][depth]]
        directions = [axis + i for axis in chosen for i in range(len(axes[axis][depth]))]
        # only plain tensors outside of autograd and tracing have contents to keep
        if packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
            weight = fused.pack(weights, cell)
        else:
            weight = packed.get((depth, *chosen), weights, cell, backend, autocast_dtype(x) or x.dtype)
        return fused.run(x, weight, cell, directions, backend, Settings.recompute)

    y = run(x, 0, list(axes))
    num_layers = len(next(iter(axes.values())))
    if num_layers == 1:
        return y
    outputs = dict(zip(axes, y.chunk(len(axes), dim=-1), strict=True))
    for depth in range(1, num_layers):
        outputs = {axis: run(output, depth, [axis]) for axis, output in outputs.items()}
    return torch.cat(list(outputs.values()), dim=-1)
