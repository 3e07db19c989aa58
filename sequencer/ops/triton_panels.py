"""Triton kernels for hidden sizes that are three times a power of two, in three panels without padding.

A panel is `Q = D / 3` units. One load, one product and one store serve all four gates of a panel, as `4 Q` columns in
the order i, f, g, o; the order of the gates in memory is that of the other kernels. State and weights are on chip, and
loads of the next steps are issued asynchronously, as in `triton_resident`.
"""

from typing import no_type_check

import triton
import triton.language as tl

from sequencer.ops.triton_cells import previous_token, sequences, step, step_back
from sequencer.ops.triton_resident import SIZES


@triton.jit
@no_type_check
def _columns(D: tl.constexpr, Q: tl.constexpr):
    """Returns the offsets of the first panel's columns in the gates of a token, which are stored as `[4, D]`."""
    j = tl.arange(0, 4 * Q)
    return j // Q * D + j % Q


@triton.jit
@no_type_check
def _split(x, TILE: tl.constexpr, Q: tl.constexpr):
    """Splits `TILE x 4Q` into the four gates, `TILE x Q` each."""
    x = tl.permute(tl.reshape(x, (TILE, 2, 2, Q)), (0, 3, 1, 2))
    a, b = tl.split(x)
    i, g = tl.split(a)
    f, o = tl.split(b)
    return i, f, g, o


@triton.jit
@no_type_check
def _join(i, f, g, o, TILE: tl.constexpr, Q: tl.constexpr):
    """Reverses `_split`."""
    x = tl.join(tl.join(i, g), tl.join(f, o))
    return tl.reshape(tl.permute(x, (0, 2, 3, 1)), (TILE, 4 * Q))


@triton.jit
@no_type_check
def _panel_forward(
    at_gates, at_out, at_cells, mask, h0, h1, h2, w0, w1, w2, c,
    KEEP: tl.constexpr, APPROXIMATE: tl.constexpr, TILE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Computes a step of one panel from the outputs of all three; returns its output and cell state."""
    x = tl.load(at_gates, mask=mask, other=0.0).to(tl.float32)
    x = tl.dot(h0, w0, x)
    x = tl.dot(h1, w1, x)
    x = tl.dot(h2, w2, x)
    i, f, g, o = _split(x, TILE, Q)
    i, f, g, o, c, h = step(i, f, g, o, c, APPROXIMATE)
    h = h.to(h0.dtype)
    tl.store(at_out, h, mask=mask)
    if KEEP:
        tl.store(at_gates, _join(i, f, g, o, TILE, Q).to(h0.dtype), mask=mask)
        tl.store(at_cells, c.to(h0.dtype), mask=mask)
    return h, c


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def forward_panels(
    gates, weight, out, cells, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, APPROXIMATE: tl.constexpr,
    Q: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    _, valid, token, steps, stride = sequences(directions, B, H, W, TILE)
    q = tl.arange(0, Q)
    columns = _columns(D, Q)
    mask = valid[:, None]
    row = (token * S + s)[:, None] * D
    at_gates = gates + 4 * row + columns[None, :]
    at_out = out + row + q[None, :]
    at_cells = cells + row + q[None, :]
    hop = stride.to(tl.int64) * (S * D)
    # tile k, n: from the units of panel k in the previous step to the gates of panel n
    tile = weight + s * 4 * D * D + columns[None, :] * D + q[:, None]
    w00, w10, w20 = tl.load(tile), tl.load(tile + Q), tl.load(tile + 2 * Q)
    tile += Q * D
    w01, w11, w21 = tl.load(tile), tl.load(tile + Q), tl.load(tile + 2 * Q)
    tile += Q * D
    w02, w12, w22 = tl.load(tile), tl.load(tile + Q), tl.load(tile + 2 * Q)
    zero = tl.zeros((TILE, Q), dtype=out.dtype.element_ty)
    h0, h1, h2 = zero, zero, zero
    zero = tl.zeros((TILE, Q), dtype=tl.float32)
    c0, c1, c2 = zero, zero, zero
    for _ in tl.range(0, steps, num_stages=STAGES):
        n0, c0 = _panel_forward(
            at_gates, at_out, at_cells, mask, h0, h1, h2, w00, w10, w20, c0, KEEP, APPROXIMATE, TILE, Q
        )
        n1, c1 = _panel_forward(
            at_gates + Q, at_out + Q, at_cells + Q, mask, h0, h1, h2, w01, w11, w21, c1, KEEP, APPROXIMATE, TILE, Q
        )
        n2, c2 = _panel_forward(
            at_gates + 2 * Q, at_out + 2 * Q, at_cells + 2 * Q,
            mask, h0, h1, h2, w02, w12, w22, c2, KEEP, APPROXIMATE, TILE, Q,
        )  # fmt: skip
        h0, h1, h2 = n0, n1, n2
        at_gates += 4 * hop
        at_out += hop
        at_cells += hop


@triton.jit
@no_type_check
def _panel_backward(
    at_gates, at_grad, at_out, at_cells, mask, inner, dh, dc, c,
    APPROXIMATE: tl.constexpr, TILE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Returns the gradients of a panel's preactivations and previous cell state, and the previous cell state."""
    x = tl.load(at_gates, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(at_cells, mask=inner, other=0.0).to(tl.float32)
    dh += tl.load(at_out, mask=mask, other=0.0).to(tl.float32)
    i, f, g, o = _split(x, TILE, Q)
    i, f, g, o, dc = step_back(i, f, g, o, dh, dc, c, before, APPROXIMATE)
    d = _join(i, f, g, o, TILE, Q).to(at_grad.dtype.element_ty)
    tl.store(at_grad, d, mask=mask)
    return d, dc, before


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def backward_panels(
    gates, cells, weight, grad_out, grad_gates, directions, B, H, W,
    S: tl.constexpr, D: tl.constexpr, APPROXIMATE: tl.constexpr,
    Q: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    _, valid, start, steps, stride = sequences(directions, B, H, W, TILE)
    q = tl.arange(0, Q)
    columns = _columns(D, Q)
    mask = valid[:, None]
    row = ((start + (steps - 1) * stride) * S + s)[:, None] * D
    at_gates = gates + 4 * row + columns[None, :]
    at_grad = grad_gates + 4 * row + columns[None, :]
    at_out = grad_out + row + q[None, :]
    at_cells = cells + row + q[None, :]
    hop = stride.to(tl.int64) * (S * D)
    # tile n, k: from the gates of panel n to the units of panel k in the previous step
    tile = weight + s * 4 * D * D + columns[:, None] * D + q[None, :]
    w00, w01, w02 = tl.load(tile), tl.load(tile + Q), tl.load(tile + 2 * Q)
    tile += Q * D
    w10, w11, w12 = tl.load(tile), tl.load(tile + Q), tl.load(tile + 2 * Q)
    tile += Q * D
    w20, w21, w22 = tl.load(tile), tl.load(tile + Q), tl.load(tile + 2 * Q)
    zero = tl.zeros((TILE, Q), dtype=tl.float32)
    dh0, dh1, dh2 = zero, zero, zero
    zero = tl.zeros((TILE, Q), dtype=tl.float32)
    dc0, dc1, dc2 = zero, zero, zero
    c0 = tl.load(at_cells, mask=mask, other=0.0).to(tl.float32)
    c1 = tl.load(at_cells + Q, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(at_cells + 2 * Q, mask=mask, other=0.0).to(tl.float32)
    for t in tl.range(0, steps, num_stages=STAGES):
        at_cells -= hop
        inner = mask & (t < steps - 1)
        d, dc0, c0 = _panel_backward(
            at_gates, at_grad, at_out, at_cells, mask, inner, dh0, dc0, c0, APPROXIMATE, TILE, Q
        )
        n0, n1, n2 = tl.dot(d, w00), tl.dot(d, w01), tl.dot(d, w02)
        d, dc1, c1 = _panel_backward(
            at_gates + Q, at_grad + Q, at_out + Q, at_cells + Q, mask, inner, dh1, dc1, c1, APPROXIMATE, TILE, Q
        )
        n0, n1, n2 = tl.dot(d, w10, n0), tl.dot(d, w11, n1), tl.dot(d, w12, n2)
        d, dc2, c2 = _panel_backward(
            at_gates + 2 * Q, at_grad + 2 * Q, at_out + 2 * Q, at_cells + 2 * Q,
            mask, inner, dh2, dc2, c2, APPROXIMATE, TILE, Q,
        )  # fmt: skip
        dh0, dh1, dh2 = tl.dot(d, w20, n0), tl.dot(d, w21, n1), tl.dot(d, w22, n2)
        at_gates -= 4 * hop
        at_grad -= 4 * hop
        at_out -= hop


@triton.jit(do_not_specialize=["directions", "tokens", "H", "W"])
@no_type_check
def sums_panels(
    grad_gates, out, weight_sums, bias_sums, directions, tokens, H, W,
    S: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes one partial sum of the gradients of `weight_hh` and the bias.

    A program handles one panel, one part of the tokens and one direction. The panels of a part run side by side, so
    that the L2 cache serves the outputs to all three.
    """
    n, part, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q = tl.arange(0, Q)
    columns = _columns(D, Q) + n * Q
    zero = tl.zeros((4 * Q, Q), dtype=tl.float32)
    a0, a1, a2 = zero, zero, zero
    bias = tl.zeros((4 * Q,), dtype=tl.float32)
    for first in tl.range(part * ROWS, tokens, tl.num_programs(1) * ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        before, inner = previous_token(directions, s, token, tokens, H, W)
        row = (token.to(tl.int64) * S + s)[:, None] * D
        d = tl.load(grad_gates + 4 * row + columns[None, :], mask=(token < tokens)[:, None], other=0.0)
        at_out = out + (before.to(tl.int64) * S + s)[:, None] * D + q[None, :]
        h0 = tl.load(at_out, mask=inner[:, None], other=0.0)
        h1 = tl.load(at_out + Q, mask=inner[:, None], other=0.0)
        h2 = tl.load(at_out + 2 * Q, mask=inner[:, None], other=0.0)
        bias += tl.sum(d.to(tl.float32), axis=0)
        transposed = tl.trans(d)
        a0, a1, a2 = tl.dot(transposed, h0, a0), tl.dot(transposed, h1, a1), tl.dot(transposed, h2, a2)
    row = (part * S + s) * 4 * D + columns
    tl.store(bias_sums + row, bias)
    at = weight_sums + row.to(tl.int64)[:, None] * D + q[None, :]
    tl.store(at, a0)
    tl.store(at + Q, a1)
    tl.store(at + 2 * Q, a2)
