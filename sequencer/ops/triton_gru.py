"""Triton kernels of the GRU and of plain RNNs, which read the recurrent weights from global memory at each step.

They serve every hidden size and dtype in the way of `triton_streamed`. A plain RNN is computed as a GRU without its
gates r and z. In the code, g is the gate n of a GRU, and q its recurrent term, or the preactivation of a plain RNN.
"""

from typing import no_type_check

import triton
import triton.language as tl

from sequencer.ops.triton_cells import sequences, sigmoid, tanh
from sequencer.ops.triton_resident import SIZES


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def forward_gru_streamed(
    gates, weight, bias, out, cells, state, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, CELL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    G: tl.constexpr = 3 if CELL == "gru" else 1
    n, valid, start, steps, stride = sequences(directions, B, H, W, TILE)
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
            at = gates + G * row + u[None, :]
            if CELL == "gru":
                r = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                z = tl.load(at + D, mask=mask, other=0.0).to(tl.float32)
                b = tl.load(bias + (s * 4 + 3) * D + u, mask=unit, other=0.0).to(tl.float32)
                q = tl.zeros((TILE, BLOCK), dtype=tl.float32) + b[None, :]
            else:
                q = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            for depth in tl.range(0, D, BLOCK, num_stages=1):
                k = depth + tl.arange(0, BLOCK)
                h = tl.load(out + before + k[None, :], mask=inner & (k < D)[None, :], other=0.0)
                square = weight + s * G * D * D + u[None, :] * D + k[:, None]
                block = unit[None, :] & (k < D)[:, None]
                if CELL == "gru":
                    r = tl.dot(h, tl.load(square, mask=block, other=0.0), r, input_precision=PRECISION)
                    z = tl.dot(h, tl.load(square + D * D, mask=block, other=0.0), z, input_precision=PRECISION)
                q = tl.dot(h, tl.load(square + (G - 1) * D * D, mask=block, other=0.0), q, input_precision=PRECISION)
            if CELL == "gru":
                r, z = sigmoid(r, False), sigmoid(z, False)
                g = tanh(tl.load(at + 2 * D, mask=mask, other=0.0).to(tl.float32) + r * q, False)
                h = g + z * (tl.load(carried + u[None, :], mask=mask, other=0.0) - g)
                tl.store(carried + u[None, :], h, mask=mask)
                if KEEP:
                    kept = gates.dtype.element_ty
                    tl.store(at, r.to(kept), mask=mask)
                    tl.store(at + D, z.to(kept), mask=mask)
                    tl.store(at + 2 * D, g.to(kept), mask=mask)
                    tl.store(cells + row + u[None, :], q.to(kept), mask=mask)
            else:
                h = tanh(q, False) if CELL == "rnn" else tl.where(q < 0.0, 0.0, q)  # which keeps NaN
            tl.store(out + row + u[None, :], h.to(out.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # in the next step, other threads of the program read these outputs
        token += stride


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def backward_gru_streamed(
    gates, cells, weight, out, grad_out, grad_gates, grad_recurrent, state, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, CELL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the input projection and of the recurrent terms.

    In a GRU they differ in n, whose recurrent term is scaled by r. In a plain RNN they are one tensor.
    """
    s = tl.program_id(1)
    G: tl.constexpr = 3 if CELL == "gru" else 1
    n, valid, start, steps, stride = sequences(directions, B, H, W, TILE)
    carried = state + (n * S + s)[:, None] * D
    end = start + (steps - 1) * stride
    token = end
    kept = grad_gates.dtype.element_ty
    for _ in range(steps):
        row = (token * S + s)[:, None] * D
        before = ((token - stride) * S + s)[:, None] * D
        after = ((token + stride) * S + s)[:, None] * D
        inner = (valid & (token != end))[:, None]
        for first in range(0, D, BLOCK):
            u = first + tl.arange(0, BLOCK)
            unit = u < D
            mask = valid[:, None] & unit[None, :]
            dh = tl.load(grad_out + row + u[None, :], mask=mask, other=0.0).to(tl.float32)
            for depth in tl.range(0, G * D, BLOCK, num_stages=1):
                k = depth + tl.arange(0, BLOCK)
                d = tl.load(grad_recurrent + G * after + k[None, :], mask=inner & (k < G * D)[None, :], other=0.0)
                square = weight + s * G * D * D + k[:, None] * D + u[None, :]
                w = tl.load(square, mask=(k < G * D)[:, None] & unit[None, :], other=0.0)
                dh = tl.dot(d, w, dh, input_precision=PRECISION)
            if CELL == "gru":
                at = gates + 3 * row + u[None, :]
                r = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                z = tl.load(at + D, mask=mask, other=0.0).to(tl.float32)
                g = tl.load(at + 2 * D, mask=mask, other=0.0).to(tl.float32)
                q = tl.load(cells + row + u[None, :], mask=mask, other=0.0).to(tl.float32)
                h = tl.load(out + before + u[None, :], mask=mask & (token != start)[:, None], other=0.0)
                dh += tl.load(carried + u[None, :], mask=mask, other=0.0)
                tl.store(carried + u[None, :], dh * z, mask=mask)
                d_n = dh * (1.0 - z) * (1.0 - g * g)
                d_r = (d_n * q * r * (1.0 - r)).to(kept)
                d_z = (dh * (h.to(tl.float32) - g) * z * (1.0 - z)).to(kept)
                at = grad_gates + 3 * row + u[None, :]
                tl.store(at, d_r, mask=mask)
                tl.store(at + D, d_z, mask=mask)
                tl.store(at + 2 * D, d_n.to(kept), mask=mask)
                at = grad_recurrent + 3 * row + u[None, :]
                tl.store(at, d_r, mask=mask)
                tl.store(at + D, d_z, mask=mask)
                tl.store(at + 2 * D, (d_n * r).to(kept), mask=mask)
            else:
                h = tl.load(out + row + u[None, :], mask=mask, other=0.0).to(tl.float32)
                d = dh * (1.0 - h * h) if CELL == "rnn" else tl.where(h > 0.0, dh, 0.0)
                tl.store(grad_recurrent + row + u[None, :], d.to(kept), mask=mask)
        tl.debug_barrier()  # in the next step, other threads of the program read these gradients
        token -= stride
