"""LSTM and IndyLSTM on a GPU: matrix products by torch, the scans over time by Triton kernels.

All directions of a layer share one launch. A program processes all steps of a tile of sequences of one direction. It
indexes the token map in place, so that no direction needs a transposed or flipped copy. State and accumulators are
float32; the operands of products have the dtype of the inputs. Arrays have the layout described in `recurrence.cpp`.

There are two sets of kernels. The resident kernels keep the state in registers and the recurrent weights in shared
memory. Where the weights do not fit (float32, or a hidden size above 128), the streamed kernels process the units in
blocks, read the weights from global memory at each step, and keep the state in global memory. With `TRITON_INTERPRET=1`
all kernels run on a CPU, for tests, in float32 and float16.

The gradients of weights and biases are deterministic: each program writes a partial sum, and the partial sums are added
in a fixed order, without atomics.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `S` number of directions, `D` hidden size, `P` the
hidden size padded to a power of two. Direction codes are those of `sequencer.ops.fused`.
"""

import functools
import os
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for systems other than Linux do not include it
    triton = None

CELLS = ("lstm", "indylstm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN_SIZES = (8, 256)
RESIDENT = 128  # largest hidden size whose weights, in a 2-byte dtype, fit in the shared memory of an A100 or H100
SHARED_MEMORY = 140_000  # the most bytes of shared memory that a resident kernel needs
PROGRAMS = 64  # largest number of partial sums of the gradients of weights and biases


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


if triton is not None:

    @triton.jit
    @no_type_check  # Triton compiles the undecorated function
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    @no_type_check
    def _tanh(x):
        # exp(-2|x|) cannot overflow; near zero, where 1 - e suffers from cancellation, a series is used
        e = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        z = x * x
        near = 1.0 + z * (-0.333333333 + z * (0.133333333 + z * (-0.053968254 + z * 0.021869488)))
        return tl.where(tl.abs(x) < 0.15, x * near, tl.where(x < 0, -far, far))

    @triton.jit
    @no_type_check
    def _sequences(directions, B, H, W, TILE: tl.constexpr):
        """Describes the sequences of this program's tile and direction.

        Returns:
            Indices of the sequences, a mask of the valid ones, the index of each sequence's first token, the number of
            steps, and the difference of token indices between consecutive steps.
        """
        code = (directions >> (2 * tl.program_id(1))) & 3
        vertical = code < 2
        backwards = code % 2
        n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        steps = tl.where(vertical, H, W)
        stride = tl.where(vertical, W, 1)
        start = tl.where(vertical, n // W * H * W + n % W, n * W) + backwards * (steps - 1) * stride
        return n, n < B * tl.where(vertical, W, H), start, steps, tl.where(backwards == 1, -stride, stride)

    @triton.jit
    @no_type_check
    def _load4(p, offset, mask):
        """Loads the blocks of the gates i, f, g, o, which start `offset` elements apart."""
        i = tl.load(p, mask=mask, other=0.0)
        f = tl.load(p + offset, mask=mask, other=0.0)
        g = tl.load(p + 2 * offset, mask=mask, other=0.0)
        o = tl.load(p + 3 * offset, mask=mask, other=0.0)
        return i, f, g, o

    @triton.jit
    @no_type_check
    def _store4(p, offset, mask, i, f, g, o):
        kept = p.dtype.element_ty
        tl.store(p, i.to(kept), mask=mask)
        tl.store(p + offset, f.to(kept), mask=mask)
        tl.store(p + 2 * offset, g.to(kept), mask=mask)
        tl.store(p + 3 * offset, o.to(kept), mask=mask)

    @triton.jit
    @no_type_check
    def _preactivations(gates, bias, D: tl.constexpr, mask, unit):
        i, f, g, o = _load4(gates, D, mask)
        b_i, b_f, b_g, b_o = _load4(bias, D, unit)
        i = i.to(tl.float32) + b_i.to(tl.float32)[None, :]
        f = f.to(tl.float32) + b_f.to(tl.float32)[None, :]
        g = g.to(tl.float32) + b_g.to(tl.float32)[None, :]
        o = o.to(tl.float32) + b_o.to(tl.float32)[None, :]
        return i, f, g, o

    @triton.jit
    @no_type_check
    def _step(i, f, g, o, c):
        i, f, g, o = _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)
        c = f * c + i * g
        return i, f, g, o, c, o * _tanh(c)

    @triton.jit
    @no_type_check
    def _step_back(gates, D: tl.constexpr, mask, dh, dc, c, c_before):
        """Returns the gradients of the preactivations of i, f, g, o and of the previous cell state."""
        i, f, g, o = _load4(gates, D, mask)
        i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
        tanh_c = _tanh(c)
        dc += dh * o * (1.0 - tanh_c * tanh_c)
        d_i = dc * g * i * (1.0 - i)
        d_f = dc * c_before * f * (1.0 - f)
        d_g = dc * i * (1.0 - g * g)
        d_o = dh * tanh_c * o * (1.0 - o)
        return d_i, d_f, d_g, d_o, dc * f

    @triton.jit
    @no_type_check
    def _forward_resident(
        gates, weight, bias, out, cells, directions, B, H, W,
        S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
        DIAGONAL: tl.constexpr, KEEP: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        _, valid, token, steps, stride = _sequences(directions, B, H, W, TILE)
        u = tl.arange(0, P)
        unit = u < D
        mask = valid[:, None] & unit[None, :]
        if DIAGONAL:
            w_i, w_f, w_g, w_o = _load4(weight + s * 4 * D + u, D, unit)
            w_i, w_f, w_g, w_o = w_i.to(tl.float32), w_f.to(tl.float32), w_g.to(tl.float32), w_o.to(tl.float32)
        else:  # transposed: rows are units of the previous step, columns units of this step
            square = weight + s * 4 * D * D + u[None, :] * D + u[:, None]
            w_i, w_f, w_g, w_o = _load4(square, D * D, unit[None, :] & unit[:, None])
        h = tl.zeros((TILE, P), dtype=tl.float32)
        c = tl.zeros((TILE, P), dtype=tl.float32)
        for _ in range(steps):
            row = (token * S + s)[:, None] * D
            at = gates + 4 * row + u[None, :]
            i, f, g, o = _preactivations(at, bias + s * 4 * D + u, D, mask, unit)
            if DIAGONAL:
                i += h * w_i[None, :]
                f += h * w_f[None, :]
                g += h * w_g[None, :]
                o += h * w_o[None, :]
            else:
                narrow = h.to(w_i.dtype)
                i = tl.dot(narrow, w_i, i)
                f = tl.dot(narrow, w_f, f)
                g = tl.dot(narrow, w_g, g)
                o = tl.dot(narrow, w_o, o)
            i, f, g, o, c, h = _step(i, f, g, o, c)
            tl.store(out + row + u[None, :], h.to(out.dtype.element_ty), mask=mask)
            if KEEP:
                _store4(at, D, mask, i, f, g, o)
                tl.store(cells + row + u[None, :], c.to(cells.dtype.element_ty), mask=mask)
            token += stride

    @triton.jit
    @no_type_check
    def _backward_resident(
        gates, cells, weight, grad_out, grad_gates, directions, B, H, W,
        S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, DIAGONAL: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        _, valid, start, steps, stride = _sequences(directions, B, H, W, TILE)
        u = tl.arange(0, P)
        unit = u < D
        mask = valid[:, None] & unit[None, :]
        if DIAGONAL:
            w_i, w_f, w_g, w_o = _load4(weight + s * 4 * D + u, D, unit)
            w_i, w_f, w_g, w_o = w_i.to(tl.float32), w_f.to(tl.float32), w_g.to(tl.float32), w_o.to(tl.float32)
        else:
            square = weight + s * 4 * D * D + u[:, None] * D + u[None, :]
            w_i, w_f, w_g, w_o = _load4(square, D * D, unit[None, :] & unit[:, None])
        dh = tl.zeros((TILE, P), dtype=tl.float32)
        dc = tl.zeros((TILE, P), dtype=tl.float32)
        token = start + (steps - 1) * stride
        c = tl.load(cells + (token * S + s)[:, None] * D + u[None, :], mask=mask, other=0.0).to(tl.float32)
        for _ in range(steps):
            row = (token * S + s)[:, None] * D
            before = ((token - stride) * S + s)[:, None] * D
            inner = mask & (token != start)[:, None]
            c_before = tl.load(cells + before + u[None, :], mask=inner, other=0.0).to(tl.float32)
            dh += tl.load(grad_out + row + u[None, :], mask=mask, other=0.0).to(tl.float32)
            i, f, g, o, dc = _step_back(gates + 4 * row + u[None, :], D, mask, dh, dc, c, c_before)
            _store4(grad_gates + 4 * row + u[None, :], D, mask, i, f, g, o)
            if DIAGONAL:
                dh = i * w_i[None, :] + f * w_f[None, :] + g * w_g[None, :] + o * w_o[None, :]
            else:
                dh = tl.dot(i.to(w_i.dtype), w_i)
                dh = tl.dot(f.to(w_f.dtype), w_f, dh)
                dh = tl.dot(g.to(w_g.dtype), w_g, dh)
                dh = tl.dot(o.to(w_o.dtype), w_o, dh)
            c = c_before
            token -= stride

    @triton.jit
    @no_type_check
    def _forward_streamed(
        gates, weight, bias, out, cells, state, directions, B, H, W,
        S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
        KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        n, valid, start, steps, stride = _sequences(directions, B, H, W, TILE)
        carried = state + (n * S + s)[:, None] * D
        token = start
        for _ in range(steps):
            row = (token * S + s)[:, None] * D
            before = ((token - stride) * S + s)[:, None] * D
            inner = (valid & (token != start))[:, None]
            for first in range(0, D, BLOCK):
                u = first + tl.arange(0, BLOCK)
                unit = u < D
                mask = valid[:, None] & unit[None, :]
                at = gates + 4 * row + u[None, :]
                i, f, g, o = _preactivations(at, bias + s * 4 * D + u, D, mask, unit)
                for depth in range(0, D, BLOCK):
                    k = depth + tl.arange(0, BLOCK)
                    h = tl.load(out + before + k[None, :], mask=inner & (k < D)[None, :], other=0.0)
                    square = weight + s * 4 * D * D + u[None, :] * D + k[:, None]
                    w_i, w_f, w_g, w_o = _load4(square, D * D, unit[None, :] & (k < D)[:, None])
                    i = tl.dot(h, w_i, i, input_precision=PRECISION)
                    f = tl.dot(h, w_f, f, input_precision=PRECISION)
                    g = tl.dot(h, w_g, g, input_precision=PRECISION)
                    o = tl.dot(h, w_o, o, input_precision=PRECISION)
                c = tl.load(carried + u[None, :], mask=mask, other=0.0)
                i, f, g, o, c, h = _step(i, f, g, o, c)
                tl.store(carried + u[None, :], c, mask=mask)
                tl.store(out + row + u[None, :], h.to(out.dtype.element_ty), mask=mask)
                if KEEP:
                    _store4(at, D, mask, i, f, g, o)
                    tl.store(cells + row + u[None, :], c.to(cells.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # in the next step, other threads of the program read these outputs
            token += stride

    @triton.jit
    @no_type_check
    def _backward_streamed(
        gates, cells, weight, grad_out, grad_gates, state, directions, B, H, W,
        S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        n, valid, start, steps, stride = _sequences(directions, B, H, W, TILE)
        carried = state + (n * S + s)[:, None] * D
        last = start + (steps - 1) * stride
        token = last
        for _ in range(steps):
            row = (token * S + s)[:, None] * D
            before = ((token - stride) * S + s)[:, None] * D
            after = ((token + stride) * S + s)[:, None] * 4 * D
            for first in range(0, D, BLOCK):
                u = first + tl.arange(0, BLOCK)
                mask = valid[:, None] & (u < D)[None, :]
                dh = tl.load(grad_out + row + u[None, :], mask=mask, other=0.0).to(tl.float32)
                for depth in range(0, 4 * D, BLOCK):
                    k = depth + tl.arange(0, BLOCK)
                    inner = (valid & (token != last))[:, None] & (k < 4 * D)[None, :]
                    d = tl.load(grad_gates + after + k[None, :], mask=inner, other=0.0)
                    w = tl.load(
                        weight + s * 4 * D * D + k[:, None] * D + u[None, :],
                        mask=(k < 4 * D)[:, None] & (u < D)[None, :],
                        other=0.0,
                    )
                    dh = tl.dot(d, w, dh, input_precision=PRECISION)
                c = tl.load(cells + row + u[None, :], mask=mask, other=0.0).to(tl.float32)
                inner = mask & (token != start)[:, None]
                c_before = tl.load(cells + before + u[None, :], mask=inner, other=0.0).to(tl.float32)
                dc = tl.load(carried + u[None, :], mask=mask, other=0.0)
                i, f, g, o, dc = _step_back(gates + 4 * row + u[None, :], D, mask, dh, dc, c, c_before)
                tl.store(carried + u[None, :], dc, mask=mask)
                _store4(grad_gates + 4 * row + u[None, :], D, mask, i, f, g, o)
            tl.debug_barrier()
            token -= stride

    @triton.jit
    @no_type_check
    def _weight_grad(
        grad_gates, out, weight_sums, bias_sums, directions, tokens, H, W,
        S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
        DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Computes one partial sum of the gradients of `weight_hh` and the bias.

        A program handles one part of the tokens, one direction, one gate, and a block of BLOCK x BLOCK units.
        """
        part, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
        columns: tl.constexpr = 1 if DIAGONAL else blocks
        q = z // (blocks * columns)
        u = z // columns % blocks * BLOCK + tl.arange(0, BLOCK)
        k = u if DIAGONAL else z % columns * BLOCK + tl.arange(0, BLOCK)
        code = (directions >> (2 * s)) & 3
        vertical = code < 2
        backwards = code % 2
        stride = tl.where(vertical, W, 1)
        total = tl.zeros((BLOCK,) if DIAGONAL else (BLOCK, BLOCK), dtype=tl.float32)
        bias = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(part * ROWS, tokens, tl.num_programs(0) * ROWS):
            token = tl.arange(0, ROWS).to(tl.int64) + first
            step = tl.where(vertical, token // W % H, token % W)
            step = tl.where(backwards == 1, tl.where(vertical, H, W) - 1 - step, step)
            before = token + tl.where(backwards == 1, stride, -stride)
            d = tl.load(
                grad_gates + ((token * S + s) * 4 + q)[:, None] * D + u[None, :],
                mask=(token < tokens)[:, None] & (u < D)[None, :],
                other=0.0,
            )
            h = tl.load(
                out + (before * S + s)[:, None] * D + k[None, :],
                mask=((token < tokens) & (step > 0))[:, None] & (k < D)[None, :],
                other=0.0,
            )
            bias += tl.sum(d.to(tl.float32), axis=0)
            if DIAGONAL:
                total += tl.sum(d.to(tl.float32) * h.to(tl.float32), axis=0)
            else:
                total = tl.dot(tl.trans(d), h, total, input_precision=PRECISION)
        row = ((part * S + s) * 4 + q).to(tl.int64) * D + u
        if DIAGONAL:
            tl.store(weight_sums + row, total, mask=u < D)
        else:
            tl.store(weight_sums + row[:, None] * D + k[None, :], total, mask=(u < D)[:, None] & (k < D)[None, :])
        if z % columns == 0:
            tl.store(bias_sums + row, bias, mask=u < D)


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
    S, D, diagonal = len(directions), bias.numel() // len(directions) // 4, cell == "indylstm"
    gates = torch.mm(x.reshape(-1, C), weight_ih.t())
    out = x.new_empty(B, H, W, S * D)
    cells = x.new_empty(B * H * W, S * D) if save else None
    tensors = (gates, packed, bias.contiguous(), out, out if cells is None else cells)
    size = (_encode(directions), B, H, W)
    with torch.cuda.device_of(x):
        if _resident(x, D, diagonal):
            plan = _resident_plan(D)
            _forward_resident[_grid(B, H, W, S, plan)](*tensors, *size, S, D, DIAGONAL=diagonal, KEEP=save, **plan)
        else:
            plan = _streamed_plan()
            _forward_streamed[_grid(B, H, W, S, plan)](
                *tensors, _state(x, S * D), *size, S, D, KEEP=save, PRECISION=_precision(), **plan
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
    S, D, diagonal = len(directions), out.shape[-1] // len(directions), cell == "indylstm"
    grad_gates = torch.empty_like(gates)
    tensors = (gates, cells, weight_hh.contiguous(), grad_out.contiguous(), grad_gates)
    size = (_encode(directions), B, H, W)
    sums = _sum_plan(D, x.element_size())
    parts = max(1, min(PROGRAMS, triton.cdiv(B * H * W, sums["ROWS"])))
    blocks = triton.cdiv(D, sums["BLOCK"])
    weight_sums = torch.empty(parts, *weight_hh.shape, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty(parts, S, 4 * D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if _resident(x, D, diagonal):
            plan = _resident_plan(D)
            _backward_resident[_grid(B, H, W, S, plan)](*tensors, *size, S, D, DIAGONAL=diagonal, **plan)
        else:
            plan = _streamed_plan()
            _backward_streamed[_grid(B, H, W, S, plan)](
                *tensors, _state(x, S * D), *size, S, D, PRECISION=_precision(), **plan
            )
        _weight_grad[(parts, S, 4 * blocks * (1 if diagonal else blocks))](
            grad_gates, out, weight_sums, bias_sums, _encode(directions), B * H * W, H, W,
            S, D, DIAGONAL=diagonal, PRECISION=_precision(), **sums,
        )  # fmt: skip
    grad_x = torch.mm(grad_gates, weight_ih).view(x.shape)
    grad_ih = torch.mm(grad_gates.t(), x.reshape(-1, C))
    return grad_x, grad_ih, weight_sums.sum(0).to(weight_hh.dtype), bias_sums.sum(0).to(weight_ih.dtype)


def _encode(directions: Sequence[int]) -> int:
    """Encodes direction codes as one integer, two bits each, since a kernel takes no list."""
    return sum(direction << (2 * s) for s, direction in enumerate(directions))


def _padded(D: int) -> int:
    """Returns the hidden size padded to a power of two, at least 16, the smallest size of a `tl.dot` operand."""
    return max(16, triton.next_power_of_2(D))


def _resident(x: Tensor, D: int, diagonal: bool) -> bool:
    """Returns whether the resident kernels are used: the recurrent weights are diagonal or fit in shared memory."""
    if diagonal:
        return True
    if x.element_size() > 2 or D > RESIDENT:
        return False
    if D <= RESIDENT // 2 or not x.is_cuda:
        return True
    device = torch.cuda.get_device_properties(x.device)
    # the attribute is missing from torch's type stubs, and on ROCm
    return getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block) >= SHARED_MEMORY


def _resident_plan(D: int) -> dict[str, int]:
    """Returns padded hidden size, sequences and warps of a program of the resident kernels."""
    tile = 32 if D <= 64 else 16
    return {"P": _padded(D), "TILE": tile, "num_warps": 8 if D > 16 else 4}


def _streamed_plan() -> dict[str, int]:
    """Returns units of a block, sequences and warps of a program of the streamed kernels."""
    return {"BLOCK": 32, "TILE": 16, "num_warps": 4}


def _sum_plan(D: int, element_size: int) -> dict[str, int]:
    """Returns units of a block, tokens of a block and warps of a program of `_weight_grad`."""
    return {"BLOCK": min(_padded(D), 32 if element_size > 2 else 64), "ROWS": 32, "num_warps": 8}


def _grid(B: int, H: int, W: int, S: int, plan: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(B * max(H, W), plan["TILE"]), S


def _state(x: Tensor, width: int) -> Tensor:
    """Allocates the state that the streamed kernels carry from step to step, for every sequence."""
    return torch.zeros(x.shape[0] * max(x.shape[1:3]), width, dtype=torch.float32, device=x.device)


def _precision() -> str:
    """Returns the precision of float32 products, following `torch.set_float32_matmul_precision`."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
