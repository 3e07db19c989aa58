"""LSTM, IndyLSTM, GRU and plain RNNs on a GPU: matrix products by torch, the scans over time by Triton kernels.

All directions of a layer share one launch. A program processes all steps of a tile of sequences of one direction. It
indexes the token map in place, so that no direction needs a transposed or flipped copy. State and accumulators are
float32; the operands of products have the dtype of the inputs, those of a plain RNN float32. Arrays have the layout
described in `recurrence.cpp`, and the input projection adds the biases. `triton_plans` chooses the kernels by the
properties of the device. With `TRITON_INTERPRET=1` all kernels run on a CPU, for tests, in float32 and float16.

The gradients of weights and biases are deterministic: each program writes a partial sum, and the partial sums are added
in a fixed order, without atomics.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `S` number of directions, `D` hidden size, `G`
gates of the cell, `J` biases of a unit. Direction codes are those of `sequencer.ops.fused`.
"""

import functools
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from sequencer.ops import cpu, reference

try:
    import triton
except ImportError:  # builds of torch for systems other than Linux do not include it
    triton = None
else:
    from sequencer.ops.triton_plans import Device, Launch, Plan, choose_plan

CELLS = ("lstm", "indylstm", "gru", "rnn", "rnn_relu")
FASTEST = ("lstm", "indylstm")  # cells of the automatic choice; those of the others have not been timed on a GPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN_SIZES = (8, 256)


@functools.cache
def interpreted() -> bool:
    """Returns whether the kernels run in Triton's interpreter, which is decided when this module is imported."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Returns why the kernels cannot run on this machine, or None if they can."""
    if triton is None:
        return "triton is not installed"
    if interpreted():
        # Triton 3.6, that of torch 2.11, converts arrays of one element to scalars, which NumPy 2.4 refuses
        refused = TorchVersion(triton.__version__) < "3.8" and TorchVersion(np.__version__) >= "2.4"
        return f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4" if refused else None
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    return None


def compute_dtype(dtype: torch.dtype, cell: str) -> torch.dtype:
    """Returns the dtype in which inputs of `dtype` are computed: that of a plain RNN is float32, as on a CPU."""
    return torch.float32 if cell in cpu.PLAIN else dtype


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which gates and cells are kept for the backward pass, for inputs of `dtype`."""
    return dtype


def pack(weight_hh: Tensor, cell: str) -> Tensor:
    """Returns recurrent weights `[S, GD, D]` or diagonals `[S, 4D]` in the layout that the kernels read: contiguous."""
    return weight_hh.to(compute_dtype(weight_hh.dtype, cell)).contiguous()


def device_of(x: Tensor) -> "Device":
    """Returns the properties by which the kernels for `x` are chosen; in the interpreter those of an H100."""
    if not x.is_cuda:
        return Device(capability=90, shared_memory=232_448, multiprocessors=132)
    return _device(x.device)


def plan_of(device: "Device", cell: str, D: int, dtype: torch.dtype) -> "Plan":
    """Returns the kernels of a layer; products in float32 follow `torch.set_float32_matmul_precision`."""
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return choose_plan(device, cell, D, compute_dtype(dtype, cell).itemsize, precision)


@functools.cache
def _device(device: torch.device) -> "Device":
    properties = torch.cuda.get_device_properties(device)
    # the attribute is missing on ROCm
    shared_memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(10 * properties.major + properties.minor, shared_memory, properties.multi_processor_count)


def forward(
    x: Tensor, weight_ih: Tensor, packed: Tensor, bias: Tensor, cell: str, directions: Sequence[int], save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs one layer in all directions, from a zero state.

    Args:
        x: Token map `[B, H, W, C]`.
        weight_ih: Input weights `[S GD, C]`.
        packed: Recurrent weights as returned by `pack`.
        bias: Biases `[S, JD]`.
        cell: One of `CELLS`.
        directions: `S` direction codes.
        save: If True, gates and cells are returned for the backward pass.

    Returns:
        Outputs `[B, H, W, S D]`, then what `sequencer.ops.fused.KEPT` describes, or None for both; all in the dtype of
        `x`.
    """
    C, S, G, dtype = x.shape[-1], len(directions), reference.CELLS[cell].gates, compute_dtype(x.dtype, cell)
    D, save = weight_ih.shape[0] // S // G, save and cell not in cpu.PLAIN
    weight_ih, bias = weight_ih.to(dtype), bias.to(dtype).contiguous()
    gates = torch.addmm(bias[:, : G * D].reshape(-1), x.reshape(-1, C).to(dtype), weight_ih.t())
    out = gates.new_empty(*x.shape[:3], S * D)
    cells = gates.new_empty(gates.shape[0], S * D) if save else None
    tensors = {"gates": gates, "weight": packed, "bias": bias, "out": out, "cells": out if cells is None else cells}
    _scan(plan_of(device_of(x), cell, D, dtype).forward, x, directions, D, tensors, KEEP=save)
    return out.to(x.dtype), gates if save else None, cells


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    cell: str,
    directions: Sequence[int],
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of x, weight_ih, weight_hh and bias, whose shapes are those of `forward` and `pack`."""
    B, H, W, C = x.shape
    S, D, dtype = len(directions), out.shape[-1] // len(directions), x.dtype
    grad_out, x, weight_ih, weight_hh, out = (
        t.to(compute_dtype(dtype, cell)) for t in (grad_out, x, weight_ih, weight_hh, out)
    )
    grad_gates = out.new_empty(B * H * W, weight_ih.shape[0])
    grad_recurrent = torch.empty_like(grad_gates) if cell == "gru" else grad_gates
    device = device_of(x)
    plan = plan_of(device, cell, D, x.dtype)
    tensors = {"gates": gates, "cells": cells, "weight": weight_hh.contiguous(), "out": out}
    tensors |= {"grad_out": grad_out.contiguous(), "grad_gates": grad_gates, "grad_recurrent": grad_recurrent}
    _scan(plan.backward, x, directions, D, tensors)
    launch, parts = plan.sums, plan.parts(device, S, B * H * W)
    weight_sums = torch.empty(parts, *weight_hh.shape, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty(parts, *weight_hh.shape[:2], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch.kernel[(launch.blocks, parts, S)](
            grad_recurrent, out, weight_sums, bias_sums, _encode(directions), B * H * W, H, W,
            S=S, D=D, **launch.constants, num_warps=launch.tile.warps,
        )  # fmt: skip
    grad_x = torch.mm(grad_gates, weight_ih).view(x.shape)
    grad_ih = torch.mm(grad_gates.t(), x.reshape(-1, C))
    grad_bias = bias_sums.sum(0)
    if cell == "gru":
        of_n = grad_gates.view(-1, S, 3 * D)[..., 2 * D :].sum(0, dtype=torch.float32)
        grad_bias = torch.cat([grad_bias[:, : 2 * D], of_n, grad_bias[:, 2 * D :]], dim=1)
    return grad_x.to(dtype), grad_ih.to(dtype), weight_sums.sum(0).to(dtype), grad_bias.to(dtype)


def _encode(directions: Sequence[int]) -> int:
    """Encodes direction codes as one integer, two bits each, since a kernel takes no list."""
    return sum(direction << (2 * s) for s, direction in enumerate(directions))


def _scan(
    launch: "Launch", x: Tensor, directions: Sequence[int], D: int, tensors: dict[str, Tensor], **constants: bool
) -> None:
    """Launches a scan over time, with those of `tensors` that its kernel takes.

    The streamed kernels also take the state of every sequence that they carry from step to step, which starts as zero.
    """
    B, H, W, _ = x.shape
    S, names = len(directions), launch.kernel.arg_names
    if "state" in names:
        state = torch.zeros(B * max(H, W), S * D, dtype=torch.float32, device=x.device)
        tensors = tensors | {"state": state}
    with torch.cuda.device_of(x):
        launch.kernel[(triton.cdiv(B * max(H, W), launch.tile.size), S)](
            **{name: tensor for name, tensor in tensors.items() if name in names},
            directions=_encode(directions), B=B, H=H, W=W,
            S=S, D=D, **launch.constants, **constants, num_warps=launch.tile.warps,
        )  # fmt: skip
