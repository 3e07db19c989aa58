"""A Triton kernel for the gradients of the recurrent weights and the biases, for any hidden size."""

from typing import no_type_check

import triton
import triton.language as tl

from sequencer.ops.triton_cells import previous_token


@triton.jit(do_not_specialize=["directions", "tokens", "H", "W"])
@no_type_check
def sums(
    grad_gates, out, weight_sums, bias_sums, directions, tokens, H, W,
    S: tl.constexpr, D: tl.constexpr, G: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes one partial sum of the gradients of `weight_hh` and the bias.

    `grad_gates` holds the gradients of the recurrent terms of G gates. A program handles one gate and a block of
    BLOCK x BLOCK units, one part of the tokens, and one direction.
    """
    z, part, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    columns: tl.constexpr = 1 if DIAGONAL else blocks
    q = z // (blocks * columns)
    u = z // columns % blocks * BLOCK + tl.arange(0, BLOCK)
    k = u if DIAGONAL else z % columns * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,) if DIAGONAL else (BLOCK, BLOCK), dtype=tl.float32)
    bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in tl.range(part * ROWS, tokens, tl.num_programs(1) * ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        before, inner = previous_token(directions, s, token, tokens, H, W)
        d = tl.load(
            grad_gates + ((token.to(tl.int64) * S + s) * G + q)[:, None] * D + u[None, :],
            mask=(token < tokens)[:, None] & (u < D)[None, :],
            other=0.0,
        )
        h = tl.load(
            out + (before.to(tl.int64) * S + s)[:, None] * D + k[None, :],
            mask=inner[:, None] & (k < D)[None, :],
            other=0.0,
        )
        bias += tl.sum(d.to(tl.float32), axis=0)
        if DIAGONAL:
            total += tl.sum(d.to(tl.float32) * h.to(tl.float32), axis=0)
        else:
            total = tl.dot(tl.trans(d), h, total, input_precision=PRECISION)
    row = ((part * S + s) * G + q).to(tl.int64) * D + u
    if DIAGONAL:
        tl.store(weight_sums + row, total, mask=u < D)
    else:
        tl.store(weight_sums + row[:, None] * D + k[None, :], total, mask=(u < D)[:, None] & (k < D)[None, :])
    if z % columns == 0:
        tl.store(bias_sums + row, bias, mask=u < D)
