"""What the Triton kernels share: activations, the steps of an LSTM, gates in memory, and the sequences of a program.

Shape letters: `TILE` sequences of a program, `D` hidden size, `P` units of a block, padded to a power of two.
"""

import os
from typing import no_type_check

import torch
import triton
import triton.language as tl

# Triton decides on its interpreter, which has no inline assembly, when it decorates a kernel; ROCm has another assembly
# RET505: Triton also compiles what follows a branch that returns, unless it is the other branch
PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
@no_type_check  # Triton compiles the undecorated function
def _expit2(x):
    """Returns 1 / (1 + 2^x) with a relative error of about 4e-7, for inputs and outputs of two bytes."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505
        return 1.0 / (1.0 + tl.exp2(x))


@triton.jit
@no_type_check
def sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return _expit2(-1.4426950408889634 * x)
    else:  # noqa: RET505
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
@no_type_check
def tanh(x, APPROXIMATE: tl.constexpr):
    """Returns tanh(x), with an absolute error of about 3e-7 if APPROXIMATE."""
    if APPROXIMATE:
        return 2.0 * _expit2(-2.885390081777927 * x) - 1.0
    else:  # noqa: RET505
        # exp(-2|x|) cannot overflow; near zero, where 1 - e suffers from cancellation, a series is used
        e = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        z = x * x
        near = 1.0 + z * (-0.333333333 + z * (0.133333333 + z * (-0.053968254 + z * 0.021869488)))
        return tl.where(tl.abs(x) < 0.15, x * near, tl.where(x < 0, -far, far))


@triton.jit
@no_type_check
def sequences(directions, B, H, W, TILE: tl.constexpr):
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
def previous_token(directions, s, token, tokens, H, W):
    """Returns the token of the step before in direction `s`, and whether `token` exists and has one."""
    code = (directions >> (2 * s)) & 3
    vertical = code < 2
    backwards = code % 2
    stride = tl.where(vertical, W, 1)
    step = tl.where(vertical, token // W % H, token % W)
    step = tl.where(backwards == 1, tl.where(vertical, H, W) - 1 - step, step)
    return token + tl.where(backwards == 1, stride, -stride), (token < tokens) & (step > 0)


@triton.jit
@no_type_check
def load4(p, offset, mask):
    """Loads the blocks of the gates i, f, g, o, which start `offset` elements apart."""
    i = tl.load(p, mask=mask, other=0.0)
    f = tl.load(p + offset, mask=mask, other=0.0)
    g = tl.load(p + 2 * offset, mask=mask, other=0.0)
    o = tl.load(p + 3 * offset, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
@no_type_check
def load4_float32(p, offset, mask):
    i, f, g, o = load4(p, offset, mask)
    return i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)


@triton.jit
@no_type_check
def store4(p, offset, mask, i, f, g, o):
    kept = p.dtype.element_ty
    tl.store(p, i.to(kept), mask=mask)
    tl.store(p + offset, f.to(kept), mask=mask)
    tl.store(p + 2 * offset, g.to(kept), mask=mask)
    tl.store(p + 3 * offset, o.to(kept), mask=mask)


@triton.jit
@no_type_check
def step(i, f, g, o, c, APPROXIMATE: tl.constexpr):
    """Computes a step of an LSTM from the preactivations of its gates and the previous cell state.

    Returns:
        The gates, the cell state and the output.
    """
    i, f, g, o = sigmoid(i, APPROXIMATE), sigmoid(f, APPROXIMATE), tanh(g, APPROXIMATE), sigmoid(o, APPROXIMATE)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c, APPROXIMATE)


@triton.jit
@no_type_check
def step_back(i, f, g, o, dh, dc, c, c_before, APPROXIMATE: tl.constexpr):
    """Returns the gradients of the preactivations of i, f, g, o and of the previous cell state."""
    tanh_c = tanh(c, APPROXIMATE)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * c_before * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    d_o = dh * tanh_c * o * (1.0 - o)
    return d_i, d_f, d_g, d_o, dc * f
