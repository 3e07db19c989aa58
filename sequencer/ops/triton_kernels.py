"""LSTM and IndyLSTM on a GPU: matrix products by torch, the scans over time by Triton kernels.

All directions of a layer share one launch. A program processes all steps of a tile of sequences of one direction. It
indexes the token map in place, so that no direction needs a transposed or flipped copy. State and accumulators are
float32; the operands of products have the dtype of the inputs. Arrays have the layout described in `recurrence.cpp`,
and the input projection adds the biases. `triton_plans` chooses the kernels by the properties of the device. With
`TRITON_INTERPRET=1` all kernels run on a CPU, for tests, in float32 and float16.

The gradients of weights and biases are deterministic: each program writes a partial sum, and the partial sums are added
in a fixed order, without atomics.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `S` number of directions, `D` hidden size.
Direction codes are those of `sequencer.ops.fused`.
"""

import functools
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

try:
    import triton
except ImportError:  # builds of torch for systems other than Linux do not include it
    triton = None
else:
    from sequencer.ops.triton_plans import Device, Launch, Plan, choose_plan

CELLS = ("lstm", "indylstm")
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


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which gates and cells are kept for the backward pass, for inputs of `dtype`."""
    return dtype


def pack(weight_hh: Tensor, cell: str) -> Tensor:
    """Returns recurrent weights `[S, 4D, D]` or diagonals `[S, 4D]` in the layout that the kernels read: contiguous."""
    return weight_hh.contiguous()


def device_of(x: Tensor) -> "Device":
    """Returns the properties by which the kernels for `x` are chosen; in the interpreter those of an H100."""
    if not x.is_cuda:
        return Device(capability=90, shared_memory=232_448, multiprocessors=132)
    return _device(x.device)


def plan_of(device: "Device", cell: str, D: int, dtype: torch.dtype) -> "Plan":
    """Returns the kernels of a layer; products in float32 follow `torch.set_float32_matmul_precision`."""
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return choose_plan(device, cell, D, dtype.itemsize, precision)


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
        weight_ih: Input weights `[S 4D, C]`.
        packed: Recurrent weights as returned by `pack`.
        bias: Biases `[S, 4D]`.
        cell: One of `CELLS`.
        directions: `S` direction codes.
        save: If True, gates and cells are returned for the backward pass.

    Returns:
        Outputs `[B, H, W, S D]`, then gates `[B H W, S 4D]` and cells `[B H W, S D]`, or None for both; all in the
        dtype of `x`.
    """
    B, H, W, C = x.shape
    S, D = len(directions), bias.numel() // len(directions) // 4
    gates = torch.addmm(bias.reshape(-1), x.reshape(-1, C), weight_ih.t())
    out = x.new_empty(B, H, W, S * D)
    cells = x.new_empty(B * H * W, S * D) if save else None
    launch = plan_of(device_of(x), cell, D, x.dtype).forward
    tensors = (gates, packed, out, out if cells is None else cells, *_state(launch, x, S * D))
    with torch.cuda.device_of(x):
        launch.kernel[_grid(B, H, W, S, launch)](
            *tensors, _encode(directions), B, H, W, S=S, D=D, KEEP=save, **launch.constants, num_warps=launch.tile.warps
        )
    return out, gates if save else None, cells


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
    S, D = len(directions), out.shape[-1] // len(directions)
    grad_gates = torch.empty_like(gates)
    device, code = device_of(x), _encode(directions)
    plan = plan_of(device, cell, D, x.dtype)
    tensors = (gates, cells, weight_hh.contiguous(), grad_out.contiguous(), grad_gates)
    blocks, parts = plan.sums.blocks, plan.parts(device, S, B * H * W)
    weight_sums = torch.empty(parts, *weight_hh.shape, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty(parts, S, 4 * D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch = plan.backward
        launch.kernel[_grid(B, H, W, S, launch)](
            *tensors,
            *_state(launch, x, S * D),
            code,
            B,
            H,
            W,
            S=S,
            D=D,
            **launch.constants,
            num_warps=launch.tile.warps,
        )
        launch = plan.sums
        launch.kernel[(blocks, parts, S)](
            grad_gates, out, weight_sums, bias_sums, code, B * H * W, H, W,
            S=S, D=D, **launch.constants, num_warps=launch.tile.warps,
        )  # fmt: skip
    grad_x = torch.mm(grad_gates, weight_ih).view(x.shape)
    grad_ih = torch.mm(grad_gates.t(), x.reshape(-1, C))
    return grad_x, grad_ih, weight_sums.sum(0).to(weight_hh.dtype), bias_sums.sum(0).to(weight_ih.dtype)


def _encode(directions: Sequence[int]) -> int:
    """Encodes direction codes as one integer, two bits each, since a kernel takes no list."""
    return sum(direction << (2 * s) for s, direction in enumerate(directions))


def _grid(B: int, H: int, W: int, S: int, launch: "Launch") -> tuple[int, int]:
    return triton.cdiv(B * max(H, W), launch.tile.size), S


def _state(launch: "Launch", x: Tensor, width: int) -> tuple[Tensor, ...]:
    """Allocates the state of every sequence that the streamed kernels carry from step to step; nothing for others."""
    if "state" not in launch.kernel.arg_names:
        return ()
    return (torch.zeros(x.shape[0] * max(x.shape[1:3]), width, dtype=torch.float32, device=x.device),)
