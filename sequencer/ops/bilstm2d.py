"""The recurrences as users call them: along one sequence, or along the columns and rows of a token map.

The only place that chooses a backend. `B` batch, `H W` token rows and columns, `C` channels, `N` sequences,
`T` steps, `D` hidden size per direction, `K` output channels.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sequencer.ops import reference, torch_rnn
from sequencer.ops.reference import CELLS, Weights

Backend = Literal["reference", "torch"]
Layers = list[tuple[Weights, ...]]  # layers, first to last; each holds one direction or (forward, backward)


def choose_backend(cell: str, backend: Backend | None = None) -> Backend:
    """The backend that serves `cell`: the one asked for, or torch's kernels where they exist.

    Raises:
        ValueError: the backend is unknown or has no such cell.
    """
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}; there are {', '.join(CELLS)}")
    if backend is None:
        return "torch" if cell in torch_rnn.FUNCTIONS else "reference"
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(get_args(Backend))}")
    if backend == "torch" and cell not in torch_rnn.FUNCTIONS:
        raise ValueError(f"the torch backend has no {cell} cell; use reference")
    return backend


def rnn1d(
    x: Float[Tensor, "N T C"], layers: Layers, cell: str = "lstm", backend: Backend | None = None
) -> Float[Tensor, "N T K"]:
    """Outputs of every step, forward and backward direction concatenated; the state starts at zero."""
    module = torch_rnn if choose_backend(cell, backend) == "torch" else reference
    return module.rnn(x, layers, cell)


def rnn2d(
    x: Float[Tensor, "B H W C"],
    vertical: Layers | None,
    horizontal: Layers | None,
    cell: str = "lstm",
    union: str = "cat",
    backend: Backend | None = None,
) -> Float[Tensor, "B H W K"]:
    """BiLSTM2D without its closing linear layer (Tatsunami and Taki 2022, section 3.2).

    `vertical` runs down every column, `horizontal` along every row; a sweep that is None is left out. `union`
    joins the two: `cat` stacks their channels in the order [vertical, horizontal], `add` sums them.
    """
    B, H, W, C = x.shape
    sweeps = []
    if vertical is not None:
        columns = x.permute(0, 2, 1, 3).reshape(B * W, H, C)
        v = rnn1d(columns, vertical, cell, backend)
        sweeps.append(v.reshape(B, W, H, v.shape[-1]).permute(0, 2, 1, 3))
    if horizontal is not None:
        rows = x.reshape(B * H, W, C)
        h = rnn1d(rows, horizontal, cell, backend)
        sweeps.append(h.reshape(B, H, W, h.shape[-1]))
    if len(sweeps) == 1:
        return sweeps[0]
    return sweeps[0] + sweeps[1] if union == "add" else torch.cat(sweeps, dim=-1)
