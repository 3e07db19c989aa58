"""LSTM and IndyLSTM on a GPU: matrix products by torch, what lies between them by Triton kernels.

One launch serves every sweep: a program takes a tile of sequences of one sweep through all its steps and reads tokens
where they lie, so that no sweep needs a transposed or flipped copy. State and sums are float32; products take the
inputs' dtype. The layout is that of `recurrence.cpp`.

The resident kernels keep the state in registers and the recurrent weights on the chip. Where these do not fit (float32,
or a hidden size above 128) the streamed kernels take the units in blocks, read the weights at each step, and pass the
state on through memory. With `TRITON_INTERPRET=1` all run on a CPU, for tests, in float32 and float16.

Sums over tokens go through one partial sum a program, added up afterwards in a fixed order: no atomics, so the same
inputs give the same bits.
"""

import functools
import os
from collections.abc import Sequence
from typing import no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for other systems come without it
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN_SIZES = (8, 256)
RESIDENT = 128  # hidden size up to which four gates' weights in two bytes fit in an A100's or H100's shared memory
SHARED_MEMORY = 140_000  # bytes that they take there at the most
PROGRAMS = 64  # partial sums of the weights' gradient


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter; read when this module is imported."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine; None where they can."""
    if triton is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    return None


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gates and cells are kept in between the forward and the backward pass."""
    return dtype


def pack(weight_hh: Tensor) -> Tensor:
    """Recurrent weights as the kernels read them."""
    return weight_hh.contiguous()


if triton is not None:

    @triton.jit
    @no_type_check  # Triton reads the bare function
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    @no_type_check
    def _tanh(x):
        # from the side where exp cannot overflow; near zero, where the difference cancels, a series takes over
        e = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        z = x * x
        near = 1.0 + z * (-0.333333333 + z * (0.133333333 + z * (-0.053968254 + z * 0.021869488)))
        return tl.where(tl.abs(x) < 0.15, x * near, tl.where(x < 0, -far, far))

    @triton.jit
    @no_type_check
    def _sequences(sweeps, B, H, W, TILE: tl.constexpr):
        """Of this program's tile and sweep: sequences, mask, first tokens, steps, stride from step to step."""
        code = (sweeps >> (2 * tl.program_id(1))) & 3
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
        """What belongs to the gates i, f, g, o, `offset` elements apart."""
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
        """Gradients of the preactivations and of the cell before."""
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
        gates, weight, bias, out, cells, sweeps, B, H, W,
        S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
        DIAGONAL: tl.constexpr, KEEP: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        _, valid, token, steps, stride = _sequences(sweeps, B, H, W, TILE)
        u = tl.arange(0, P)
        unit = u < D
        mask = valid[:, None] & unit[None, :]
        if DIAGONAL:
            w_i, w_f, w_g, w_o = _load4(weight + s * 4 * D + u, D, unit)
            w_i, w_f, w_g, w_o = w_i.to(tl.float32), w_f.to(tl.float32), w_g.to(tl.float32), w_o.to(tl.float32)
        else:  # transposed: from unit k of the step before to unit u of this one
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
        gates, cells, weight, grad_out, grad_gates, sweeps, B, H, W,
        S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, DIAGONAL: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        _, valid, start, steps, stride = _sequences(sweeps, B, H, W, TILE)
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
        gates, weight, bias, out, cells, state, sweeps, B, H, W,
        S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
        KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        n, valid, start, steps, stride = _sequences(sweeps, B, H, W, TILE)
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
            tl.debug_barrier()  # other threads of the program read these outputs in the next step
            token += stride

    @triton.jit
    @no_type_check
    def _backward_streamed(
        gates, cells, weight, grad_out, grad_gates, state, sweeps, B, H, W,
        S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        n, valid, start, steps, stride = _sequences(sweeps, B, H, W, TILE)
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
        grad_gates, out, weight_sums, bias_sums, sweeps, tokens, H, W,
        S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
        DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Of one gate in one sweep, the sums over this program's share of the tokens, BLOCK x BLOCK units at a time."""
        part, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
        columns: tl.constexpr = 1 if DIAGONAL else blocks
        q = z // (blocks * columns)
        u = z // columns % blocks * BLOCK + tl.arange(0, BLOCK)
        k = u if DIAGONAL else z % columns * BLOCK + tl.arange(0, BLOCK)
        code = (sweeps >> (2 * s)) & 3
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
    x: Tensor, weight_ih: Tensor, packed: Tensor, bias: Tensor, sweeps: Sequence[int], save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Outputs `[B, H, W, S D]` and, to go back from, gates `[B H W, S 4D]` and cells `[B H W, S D]`."""
    B, H, W, C = x.shape
    S, D, diagonal = len(sweeps), bias.numel() // len(sweeps) // 4, packed.dim() == 2
    gates = torch.mm(x.reshape(-1, C), weight_ih.t())
    out = x.new_empty(B, H, W, S * D)
    cells = x.new_empty(B * H * W, S * D) if save else None
    tensors = (gates, packed, bias.contiguous(), out, out if cells is None else cells)
    size = (_encode(sweeps), B, H, W)
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
    sweeps: Sequence[int],
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight_ih, weight_hh and the bias `[S, 4D]`."""
    B, H, W, C = x.shape
    S, D, diagonal = len(sweeps), out.shape[-1] // len(sweeps), weight_hh.dim() == 2
    grad_gates = torch.empty_like(gates)
    tensors = (gates, cells, weight_hh.contiguous(), grad_out.contiguous(), grad_gates)
    size = (_encode(sweeps), B, H, W)
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
            grad_gates, out, weight_sums, bias_sums, _encode(sweeps), B * H * W, H, W,
            S, D, DIAGONAL=diagonal, PRECISION=_precision(), **sums,
        )  # fmt: skip
    grad_x = torch.mm(grad_gates, weight_ih).view(x.shape)
    grad_ih = torch.mm(grad_gates.t(), x.reshape(-1, C))
    return grad_x, grad_ih, weight_sums.sum(0).to(weight_hh.dtype), bias_sums.sum(0).to(weight_ih.dtype)


def _encode(sweeps: Sequence[int]) -> int:
    """Two bits a sweep."""
    return sum(sweep << (2 * s) for s, sweep in enumerate(sweeps))


def _padded(D: int) -> int:
    """Units of a tile: a power of two, and no less than a matrix product takes."""
    return max(16, triton.next_power_of_2(D))


def _resident(x: Tensor, D: int, diagonal: bool) -> bool:
    """Whether the state fits in registers and the recurrent weights on the chip; a diagonal always does."""
    if diagonal:
        return True
    if x.element_size() > 2 or D > RESIDENT:
        return False
    shared = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else SHARED_MEMORY
    return D <= RESIDENT // 2 or shared >= SHARED_MEMORY


def _resident_plan(D: int) -> dict[str, int]:
    """Units and sequences of a program, and its warps."""
    tile = 32 if D <= 64 else 16
    return {"P": _padded(D), "TILE": tile, "num_warps": 8 if D > 16 else 4}


def _streamed_plan() -> dict[str, int]:
    """Units that are taken at a time, sequences of a program, and its warps."""
    return {"BLOCK": 32, "TILE": 16, "num_warps": 4}


def _sum_plan(D: int, element_size: int) -> dict[str, int]:
    """Units and tokens that the weights' gradient takes at a time."""
    return {"BLOCK": min(_padded(D), 32 if element_size > 2 else 64), "ROWS": 32, "num_warps": 8}


def _grid(B: int, H: int, W: int, S: int, plan: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(B * max(H, W), plan["TILE"]), S


def _state(x: Tensor, width: int) -> Tensor:
    """What the streamed kernels carry from step to step, for every sequence."""
    return torch.zeros(x.shape[0] * max(x.shape[1:3]), width, dtype=torch.float32, device=x.device)


def _precision() -> str:
    """How float32 products are rounded: as torch's own are."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
