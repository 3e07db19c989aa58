"""LSTM and IndyLSTM in every sweep at once, as an operator that torch knows: autograd, torch.compile, FLOP counts.

A sweep is a direction of a token map: 0 runs down the columns, 1 up, 2 along the rows, 3 back. All sweeps of a layer
share one input projection and one launch. The work is done by `sequencer.ops.cpu` or `sequencer.ops.triton_kernels`,
which have the same functions; `B H W C` is the token map, `S` the number of sweeps, `D` hidden size.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sequencer.ops import cpu, triton_kernels
from sequencer.ops.reference import Weights, autocast_dtype

CELLS = ("lstm", "indylstm")
_BACKENDS: dict[str, ModuleType] = {"fused": cpu, "triton": triton_kernels}


class Packed(NamedTuple):
    """The weights of all sweeps of a layer side by side."""

    weight_ih: Float[Tensor, "S4D C"]
    weight_hh: Float[Tensor, "S 4D D"] | Float[Tensor, "S 4D"]
    bias: Float[Tensor, "S 4D"]
    panels: Tensor | None = None  # weight_hh in the order in which the kernel reads it


def pack(weights: Sequence[Weights]) -> Packed:
    """One `Weights` a sweep, differentiably."""
    return Packed(
        torch.cat([w.weight_ih for w in weights]),
        torch.stack([w.weight_hh for w in weights]),
        torch.stack([w.bias_ih if w.bias_hh is None else w.bias_ih + w.bias_hh for w in weights]),
    )


def pack_once(weights: Sequence[Weights], backend: str, dtype: torch.dtype) -> Packed:
    """The same for inference, with what the kernel would otherwise make at each call."""
    weight_ih, weight_hh, bias, _ = pack(weights)
    weight_hh = weight_hh.to(dtype)
    return Packed(weight_ih.to(dtype), weight_hh, bias.to(dtype), _BACKENDS[backend].pack(weight_hh))


def run(x: Float[Tensor, "B H W C"], packed: Packed, sweeps: list[int], backend: str, recompute: bool) -> Tensor:
    """Outputs `[B, H, W, S D]` of all sweeps, from a zero state; autocast is honoured, bfloat16 included.

    With `recompute` the backward pass runs the forward pass again instead of keeping gates and cells.
    """
    device = x.device.type
    dtype = autocast_dtype(device) or x.dtype
    *tensors, panels = packed
    weight_ih, weight_hh, bias = (t.to(dtype) for t in tensors)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)) and not recompute
    return sweep(x.to(dtype), weight_ih, weight_hh, bias, panels, sweeps, backend, keep)[0]


@torch.library.custom_op("sequencer::sweep", mutates_args=())
def sweep(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    panels: Tensor | None,
    sweeps: Sequence[int],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the gates and cells that the backward pass needs; these are empty unless `keep`."""
    module = _BACKENDS[backend]
    with torch.autocast(x.device.type, enabled=False):
        panels = module.pack(weight_hh) if panels is None else panels
        out, gates, cells = module.forward(x, weight_ih, panels, bias, sweeps, keep)
    return out, x.new_empty(0) if gates is None else gates, x.new_empty(0) if cells is None else cells


@sweep.register_fake
def _(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    panels: Tensor | None,
    sweeps: Sequence[int],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, _ = x.shape
    rows, width = bias.numel(), bias.numel() // 4
    out = x.new_empty(B, H, W, width)
    if not keep:
        return out, x.new_empty(0), x.new_empty(0)
    dtype = _BACKENDS[backend].saved_dtype(x.dtype)
    gates, cells = (x.new_empty(B * H * W, columns, dtype=dtype) for columns in (rows, width))
    return out, gates, cells


@torch.library.custom_op("sequencer::sweep_backward", mutates_args=())
def sweep_backward(
    grad_out: Tensor,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    sweeps: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight_ih, weight_hh and bias."""
    module = _BACKENDS[backend]
    with torch.autocast(x.device.type, enabled=False):
        if not gates.numel():
            _, gates, cells = module.forward(x, weight_ih, module.pack(weight_hh), bias, sweeps, True)
        return module.backward(grad_out, x, weight_ih, weight_hh, sweeps, out, gates, cells)


@sweep_backward.register_fake
def _(grad_out: Tensor, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight_ih, weight_hh, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight_ih, weight_hh, bias, _, ctx.sweeps, ctx.backend, _ = inputs
    ctx.save_for_backward(x, weight_ih, weight_hh, bias, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    grads = sweep_backward(grad_out, *ctx.saved_tensors, ctx.sweeps, ctx.backend)
    return *grads, None, None, None, None


def _twice(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the fused recurrences are differentiable once; for higher derivatives choose the reference backend: "
        "SEQUENCER_BACKEND=reference"
    )


sweep.register_autograd(_backward, setup_context=_save)
sweep_backward.register_autograd(_twice)


Shape: TypeAlias = Sequence[int]


def _multiplications(x: Shape, weight_ih: Shape, weight_hh: Shape) -> int:
    return x[0] * x[1] * x[2] * (weight_ih[0] * weight_ih[1] + math.prod(weight_hh))


@register_flop_formula(torch.ops.sequencer.sweep)
def _forward_flops(x: Shape, weight_ih: Shape, weight_hh: Shape, *_: Any, **__: Any) -> int:
    return 2 * _multiplications(x, weight_ih, weight_hh)


@register_flop_formula(torch.ops.sequencer.sweep_backward)
def _backward_flops(_: Any, x: Shape, weight_ih: Shape, weight_hh: Shape, *__: Any, **___: Any) -> int:
    return 4 * _multiplications(x, weight_ih, weight_hh)
