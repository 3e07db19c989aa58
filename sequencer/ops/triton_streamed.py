"""Triton kernels that read the recurrent weights from global memory at each step, for float32 and large hidden sizes.

A program processes the units in blocks and keeps its state in global memory. Its threads read outputs of the step
before that others wrote, so that no load of the time loop may be issued ahead.
"""

from typing import no_type_check

import triton
import triton.language as tl

from sequencer.ops.triton_cells import load4, load4_float32, sequences, step, step_back, store4
from sequencer.ops.triton_resident import SIZES


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def forward_streamed(
    gates, weight, out, cells, state, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
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
            at = gates + 4 * row + u[None, :]
            i, f, g, o = load4_float32(at, D, mask)
            for depth in tl.range(0, D, BLOCK, num_stages=1):
                k = depth + tl.arange(0, BLOCK)
                h = tl.load(out + before + k[None, :], mask=inner & (k < D)[None, :], other=0.0)
                square = weight + s * 4 * D * D + u[None, :] * D + k[:, None]
                w_i, w_f, w_g, w_o = load4(square, D * D, unit[None, :] & (k < D)[:, None])
                i = tl.dot(h, w_i, i, input_precision=PRECISION)
                f = tl.dot(h, w_f, f, input_precision=PRECISION)
                g = tl.dot(h, w_g, g, input_precision=PRECISION)
                o = tl.dot(h, w_o, o, input_precision=PRECISION)
            c = tl.load(carried + u[None, :], mask=mask, other=0.0)
            i, f, g, o, c, h = step(i, f, g, o, c, False)
            tl.store(carried + u[None, :], c, mask=mask)
            tl.store(out + row + u[None, :], h.to(out.dtype.element_ty), mask=mask)
            if KEEP:
                store4(at, D, mask, i, f, g, o)
                tl.store(cells + row + u[None, :], c.to(cells.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # in the next step, other threads of the program read these outputs
        token += stride


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def backward_streamed(
    gates, cells, weight, grad_out, grad_gates, state, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    n, valid, start, steps, stride = sequences(directions, B, H, W, TILE)
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
            for depth in tl.range(0, 4 * D, BLOCK, num_stages=1):
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
            i, f, g, o = load4_float32(gates + 4 * row + u[None, :], D, mask)
            i, f, g, o, dc = step_back(i, f, g, o, dh, dc, c, c_before, False)
            tl.store(carried + u[None, :], dc, mask=mask)
            store4(grad_gates + 4 * row + u[None, :], D, mask, i, f, g, o)
        tl.debug_barrier()  # in the next step, other threads of the program read these gradients
        token -= stride
