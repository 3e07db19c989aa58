"""Triton kernels that keep the state in registers and all recurrent weights on chip, for any hidden size.

The hidden size `D` is padded to `P`, a power of two. Loads of the next steps are issued asynchronously (STAGES): the
rows of different steps are different tokens, so that gates can be overwritten in place meanwhile.
"""

from typing import no_type_check

import triton
import triton.language as tl

from sequencer.ops.triton_cells import load4, load4_float32, sequences, step, step_back, store4

SIZES = ["directions", "B", "H", "W"]  # a value of 1, or a multiple of 16, is not compiled for


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def forward_resident(
    gates, weight, out, cells, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, DIAGONAL: tl.constexpr, KEEP: tl.constexpr, APPROXIMATE: tl.constexpr,
    P: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    _, valid, token, steps, stride = sequences(directions, B, H, W, TILE)
    u = tl.arange(0, P)
    unit = u < D
    mask = valid[:, None] & unit[None, :]
    if DIAGONAL:
        w_i, w_f, w_g, w_o = load4_float32(weight + s * 4 * D + u, D, unit)
    else:  # transposed: rows are units of the previous step, columns units of this step
        square = weight + s * 4 * D * D + u[None, :] * D + u[:, None]
        w_i, w_f, w_g, w_o = load4(square, D * D, unit[None, :] & unit[:, None])
    row = (token * S + s)[:, None] * D
    at_gates = gates + 4 * row + u[None, :]
    at_out = out + row + u[None, :]
    at_cells = cells + row + u[None, :]
    hop = stride.to(tl.int64) * (S * D)
    h = tl.zeros((TILE, P), dtype=tl.float32)
    c = tl.zeros((TILE, P), dtype=tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        i, f, g, o = load4_float32(at_gates, D, mask)
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
        i, f, g, o, c, h = step(i, f, g, o, c, APPROXIMATE)
        tl.store(at_out, h.to(out.dtype.element_ty), mask=mask)
        if KEEP:
            store4(at_gates, D, mask, i, f, g, o)
            tl.store(at_cells, c.to(cells.dtype.element_ty), mask=mask)
        at_gates += 4 * hop
        at_out += hop
        at_cells += hop


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def backward_resident(
    gates, cells, weight, grad_out, grad_gates, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, DIAGONAL: tl.constexpr, APPROXIMATE: tl.constexpr,
    P: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    _, valid, start, steps, stride = sequences(directions, B, H, W, TILE)
    u = tl.arange(0, P)
    unit = u < D
    mask = valid[:, None] & unit[None, :]
    if DIAGONAL:
        w_i, w_f, w_g, w_o = load4_float32(weight + s * 4 * D + u, D, unit)
    else:
        square = weight + s * 4 * D * D + u[:, None] * D + u[None, :]
        w_i, w_f, w_g, w_o = load4(square, D * D, unit[None, :] & unit[:, None])
    row = ((start + (steps - 1) * stride) * S + s)[:, None] * D
    at_gates = gates + 4 * row + u[None, :]
    at_grad = grad_gates + 4 * row + u[None, :]
    at_out = grad_out + row + u[None, :]
    at_cells = cells + row + u[None, :]
    hop = stride.to(tl.int64) * (S * D)
    dh = tl.zeros((TILE, P), dtype=tl.float32)
    dc = tl.zeros((TILE, P), dtype=tl.float32)
    c = tl.load(at_cells, mask=mask, other=0.0).to(tl.float32)
    for t in tl.range(0, steps, num_stages=STAGES):
        at_cells -= hop
        c_before = tl.load(at_cells, mask=mask & (t < steps - 1), other=0.0).to(tl.float32)
        dh += tl.load(at_out, mask=mask, other=0.0).to(tl.float32)
        i, f, g, o = load4_float32(at_gates, D, mask)
        i, f, g, o, dc = step_back(i, f, g, o, dh, dc, c, c_before, APPROXIMATE)
        store4(at_grad, D, mask, i, f, g, o)
        if DIAGONAL:
            dh = i * w_i[None, :] + f * w_f[None, :] + g * w_g[None, :] + o * w_o[None, :]
        else:
            dh = tl.dot(i.to(w_i.dtype), w_i)
            dh = tl.dot(f.to(w_f.dtype), w_f, dh)
            dh = tl.dot(g.to(w_g.dtype), w_g, dh)
            dh = tl.dot(o.to(w_o.dtype), w_o, dh)
        c = c_before
        at_gates -= 4 * hop
        at_grad -= 4 * hop
        at_out -= hop
