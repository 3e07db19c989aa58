"""LSTM and IndyLSTM on a GPU: matrix products by torch, what lies between them by Triton kernels.

One launch serves every sweep: a program takes a tile of sequences of one sweep through all its steps, with its state
in registers and the recurrent weights on the chip, and reads tokens where they lie, so that no sweep needs a
transposed or flipped copy. State and sums are float32; products take the inputs' dtype. The layout is that of
`recurrence.cpp`. With `TRITON_INTERPRET=1` the kernels run on a CPU, for tests, in float32 and float16.

Sums over tokens go through one partial sum a program, added up afterwards in a fixed order: no atomics, so the same
inputs give the same bits.
"""

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for other systems come without it
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN_SIZES = (8, 256)
TOKEN_BLOCK = 64  # tokens that the weights' gradient takes in one step
PROGRAMS = 64  # partial sums of that gradient


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
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    def _tanh(x):
        # from the side where exp cannot overflow; near zero the series takes over from a difference that cancels
        e = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        z = x * x
        near = 1.0 + z * (-0.333333333 + z * (0.133333333 + z * (-0.053968254 + z * 0.021869488)))
        return tl.where(tl.abs(x) < 0.15, x * near, tl.where(x < 0, -far, far))

    @triton.jit
    def _sequences(sweeps, tile, B, H, W, TILE: tl.constexpr):
        """Of a tile of sequences in sweep program_id(1): first tokens, mask, steps, and stride from step to step."""
        code = (sweeps >> (2 * tl.program_id(1))) & 3
        vertical = code < 2
        backwards = code % 2
        n = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        steps = tl.where(vertical, H, W)
        stride = tl.where(vertical, W, 1)
        valid = n < B * tl.where(vertical, W, H)
        start = tl.where(vertical, n // W * H * W + n % W, n * W)
        start = start + backwards * (steps - 1) * stride
        return start, valid, steps, tl.where(backwards == 1, -stride, stride)

    @triton.jit
    def _forward(
        gates, weight, bias, out, cells, sweeps, B, H, W,
        S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
        DIAGONAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        start, valid, steps, stride = _sequences(sweeps, tl.program_id(0), B, H, W, TILE)
        u = tl.arange(0, P)
        unit = u < D
        mask = valid[:, None] & unit[None, :]
        b = bias + s * 4 * D + u
        b_i = tl.load(b, mask=unit, other=0.0).to(tl.float32)
        b_f = tl.load(b + D, mask=unit, other=0.0).to(tl.float32)
        b_g = tl.load(b + 2 * D, mask=unit, other=0.0).to(tl.float32)
        b_o = tl.load(b + 3 * D, mask=unit, other=0.0).to(tl.float32)
        if DIAGONAL:
            w = weight + s * 4 * D + u
            w_i = tl.load(w, mask=unit, other=0.0).to(tl.float32)
            w_f = tl.load(w + D, mask=unit, other=0.0).to(tl.float32)
            w_g = tl.load(w + 2 * D, mask=unit, other=0.0).to(tl.float32)
            w_o = tl.load(w + 3 * D, mask=unit, other=0.0).to(tl.float32)
        else:
            # transposed: from unit k of the step before to unit u of this one
            w = weight + s * 4 * D * D + u[None, :] * D + u[:, None]
            square = unit[None, :] & unit[:, None]
            w_i = tl.load(w, mask=square, other=0.0)
            w_f = tl.load(w + D * D, mask=square, other=0.0)
            w_g = tl.load(w + 2 * D * D, mask=square, other=0.0)
            w_o = tl.load(w + 3 * D * D, mask=square, other=0.0)
        h = tl.zeros((TILE, P), dtype=tl.float32)
        c = tl.zeros((TILE, P), dtype=tl.float32)
        token = start
        for _ in range(steps):
            row = (token * S + s)[:, None] * D
            g = gates + 4 * row + u[None, :]
            a_i = tl.load(g, mask=mask, other=0.0).to(tl.float32) + b_i[None, :]
            a_f = tl.load(g + D, mask=mask, other=0.0).to(tl.float32) + b_f[None, :]
            a_g = tl.load(g + 2 * D, mask=mask, other=0.0).to(tl.float32) + b_g[None, :]
            a_o = tl.load(g + 3 * D, mask=mask, other=0.0).to(tl.float32) + b_o[None, :]
            if DIAGONAL:
                a_i += h * w_i[None, :]
                a_f += h * w_f[None, :]
                a_g += h * w_g[None, :]
                a_o += h * w_o[None, :]
            else:
                x = h.to(w_i.dtype)
                a_i = tl.dot(x, w_i, a_i, input_precision=PRECISION)
                a_f = tl.dot(x, w_f, a_f, input_precision=PRECISION)
                a_g = tl.dot(x, w_g, a_g, input_precision=PRECISION)
                a_o = tl.dot(x, w_o, a_o, input_precision=PRECISION)
            i, f, o = _sigmoid(a_i), _sigmoid(a_f), _sigmoid(a_o)
            candidate = _tanh(a_g)
            c = f * c + i * candidate
            h = tl.where(mask, o * _tanh(c), 0.0)
            tl.store(out + row + u[None, :], h.to(out.dtype.element_ty), mask=mask)
            if KEEP:
                kept = gates.dtype.element_ty
                tl.store(g, i.to(kept), mask=mask)
                tl.store(g + D, f.to(kept), mask=mask)
                tl.store(g + 2 * D, candidate.to(kept), mask=mask)
                tl.store(g + 3 * D, o.to(kept), mask=mask)
                tl.store(cells + row + u[None, :], c.to(kept), mask=mask)
            token += stride

    @triton.jit
    def _backward(
        gates, cells, weight, grad_out, grad_gates, sweeps, B, H, W,
        S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
        DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        s = tl.program_id(1)
        start, valid, steps, stride = _sequences(sweeps, tl.program_id(0), B, H, W, TILE)
        u = tl.arange(0, P)
        unit = u < D
        mask = valid[:, None] & unit[None, :]
        if DIAGONAL:
            w = weight + s * 4 * D + u
            w_i = tl.load(w, mask=unit, other=0.0).to(tl.float32)
            w_f = tl.load(w + D, mask=unit, other=0.0).to(tl.float32)
            w_g = tl.load(w + 2 * D, mask=unit, other=0.0).to(tl.float32)
            w_o = tl.load(w + 3 * D, mask=unit, other=0.0).to(tl.float32)
        else:
            w = weight + s * 4 * D * D + u[:, None] * D + u[None, :]
            square = unit[None, :] & unit[:, None]
            w_i = tl.load(w, mask=square, other=0.0)
            w_f = tl.load(w + D * D, mask=square, other=0.0)
            w_g = tl.load(w + 2 * D * D, mask=square, other=0.0)
            w_o = tl.load(w + 3 * D * D, mask=square, other=0.0)
        dh = tl.zeros((TILE, P), dtype=tl.float32)
        dc = tl.zeros((TILE, P), dtype=tl.float32)
        token = start + (steps - 1) * stride
        c = tl.load(cells + (token * S + s)[:, None] * D + u[None, :], mask=mask, other=0.0).to(tl.float32)
        for _ in range(steps):
            row = (token * S + s)[:, None] * D
            g = gates + 4 * row + u[None, :]
            i = tl.load(g, mask=mask, other=0.0).to(tl.float32)
            f = tl.load(g + D, mask=mask, other=0.0).to(tl.float32)
            candidate = tl.load(g + 2 * D, mask=mask, other=0.0).to(tl.float32)
            o = tl.load(g + 3 * D, mask=mask, other=0.0).to(tl.float32)
            before = cells + row - stride * S * D + u[None, :]
            c_before = tl.load(before, mask=mask & (token != start)[:, None], other=0.0).to(tl.float32)
            dh += tl.load(grad_out + row + u[None, :], mask=mask, other=0.0).to(tl.float32)
            tanh_c = _tanh(c)
            dc += dh * o * (1.0 - tanh_c * tanh_c)
            d_i = dc * candidate * i * (1.0 - i)
            d_f = dc * c_before * f * (1.0 - f)
            d_g = dc * i * (1.0 - candidate * candidate)
            d_o = dh * tanh_c * o * (1.0 - o)
            dc = dc * f
            c = c_before
            d = grad_gates + 4 * row + u[None, :]
            kept = grad_gates.dtype.element_ty
            tl.store(d, d_i.to(kept), mask=mask)
            tl.store(d + D, d_f.to(kept), mask=mask)
            tl.store(d + 2 * D, d_g.to(kept), mask=mask)
            tl.store(d + 3 * D, d_o.to(kept), mask=mask)
            if DIAGONAL:
                dh = d_i * w_i[None, :] + d_f * w_f[None, :] + d_g * w_g[None, :] + d_o * w_o[None, :]
            else:
                dh = tl.dot(d_i.to(w_i.dtype), w_i, input_precision=PRECISION)
                dh = tl.dot(d_f.to(w_f.dtype), w_f, dh, input_precision=PRECISION)
                dh = tl.dot(d_g.to(w_g.dtype), w_g, dh, input_precision=PRECISION)
                dh = tl.dot(d_o.to(w_o.dtype), w_o, dh, input_precision=PRECISION)
            token -= stride

    @triton.jit
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
    tile = _tile(D)
    with torch.cuda.device_of(x):
        _forward[_grid(B, H, W, S, tile)](
            gates, packed, bias.contiguous(), out, gates if cells is None else cells, _encode(sweeps), B, H, W,
            S=S, D=D, P=_padded(D), TILE=tile, DIAGONAL=diagonal, KEEP=save, PRECISION=_precision(),
            num_warps=_warps(D, tile),
        )  # fmt: skip
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
    weight_hh, grad_out = weight_hh.contiguous(), grad_out.contiguous()
    grad_gates, tile, precision = torch.empty_like(gates), _tile(D), _precision()
    parts = min(PROGRAMS, triton.cdiv(B * H * W, TOKEN_BLOCK))
    block = min(_padded(D), 64)
    blocks = triton.cdiv(D, block)
    weight_sums = torch.empty(parts, *weight_hh.shape, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty(parts, S, 4 * D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward[_grid(B, H, W, S, tile)](
            gates, cells, weight_hh, grad_out, grad_gates, _encode(sweeps), B, H, W,
            S=S, D=D, P=_padded(D), TILE=tile, DIAGONAL=diagonal, PRECISION=precision, num_warps=_warps(D, tile),
        )  # fmt: skip
        _weight_grad[(parts, S, 4 * blocks * (1 if diagonal else blocks))](
            grad_gates, out, weight_sums, bias_sums, _encode(sweeps), B * H * W, H, W,
            S=S, D=D, BLOCK=block, ROWS=TOKEN_BLOCK, DIAGONAL=diagonal, PRECISION=precision,
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


def _tile(D: int) -> int:
    """Sequences that a program walks side by side."""
    return 32 if D <= 64 else 16


def _warps(D: int, tile: int) -> int:
    return max(4, min(16, tile * _padded(D) // 512))


def _grid(B: int, H: int, W: int, S: int, tile: int) -> tuple[int, int]:
    return triton.cdiv(B * max(H, W), tile), S


def _precision() -> str:
    """How float32 products are rounded: as torch's own are."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
