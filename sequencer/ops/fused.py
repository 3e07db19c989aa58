"""Recurrences in up to four directions of a token map, as a custom operator of torch.

The operator supports autograd, `torch.compile` and FLOP counting. Directions are integers: 0 scans the columns from top
to bottom, 1 from bottom to top, 2 scans the rows from left to right, 3 from right to left. All directions of a layer
share one input projection and one kernel launch. The kernels are in `sequencer.ops.cpu` and
`sequencer.ops.triton_kernels`, modules with the same functions.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `S` number of directions, `D` hidden size, `G`
gates of the cell, `J` biases of a unit: one a gate, then that of the recurrent term of n of a GRU, or the three weights
of peepholes.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sequencer.ops import cpu, triton_kernels
from sequencer.ops.reference import CELLS, Weights, autocast_dtype, scan


class Kept(NamedTuple):
    """Values that the backward pass reads, a token and direction, in multiples of `D`.

    Attributes:
        gates: The activated gates: i, f, g, o of an LSTM, without f in that of 1997; r, z, n of a GRU; none of a plain
            RNN.
        cells: The cell state of an LSTM, the recurrent term of n of a GRU (`W_hn h + b_hn`), none of a plain RNN.
    """

    gates: int
    cells: int


KEPT = {
    "lstm": Kept(4, 1),
    "peephole_lstm": Kept(4, 1),
    "indylstm": Kept(4, 1),
    "lstm1997": Kept(3, 1),
    "gru": Kept(3, 1),
    "rnn": Kept(0, 0),  # its derivatives follow from the outputs
    "rnn_relu": Kept(0, 0),
}
_BACKENDS: dict[str, ModuleType] = {"fused": cpu, "triton": triton_kernels}


class Packed(NamedTuple):
    """The parameters of all directions of a layer, stacked in the order of the directions."""

    weight_ih: Float[Tensor, "SGD C"]
    weight_hh: Float[Tensor, "S GD D"] | Float[Tensor, "S GD"]
    bias: Float[Tensor, "S JD"]
    panels: Tensor | None = None  # weight_hh in the kernel's own layout, see the backend's `pack`


def pack(weights: Sequence[Weights], cell: str) -> Packed:
    """Stacks the parameters of all directions of a layer, given as one `Weights` a direction; differentiable.

    The rows of the bias are `b_ih + b_hh`, those of a GRU `b_ir + b_hr, b_iz + b_hz, b_in, b_hn`; those of an LSTM with
    peepholes are followed by the peepholes' weights.

    Raises:
        ValueError: Their shapes are not those of one layer; the kernels do not check them again.
    """
    S, G, C = len(weights), CELLS[cell].gates, weights[0].weight_ih.shape[-1]
    D = weights[0].weight_hh.shape[0] // G
    packed = Packed(
        torch.cat([w.weight_ih for w in weights]),
        torch.stack([w.weight_hh for w in weights]),
        torch.stack([_pack_bias(w, cell, D) for w in weights]),
    )
    expected = [(S * G * D, C), (S, G * D) if CELLS[cell].diagonal else (S, G * D, D), (S, biases(cell) * D)]
    shapes = [tuple(t.shape) for t in packed[:3]]
    if shapes != expected:
        raise ValueError(f"weights of a recurrence that do not fit together: stacked shapes {shapes}")
    return packed


def biases(cell: str) -> int:
    """Returns the number of biases of a unit, the weights of peepholes included."""
    return 4 if cell == "gru" else CELLS[cell].gates + 3 * CELLS[cell].peephole


def _pack_bias(w: Weights, cell: str, D: int) -> Tensor:
    if cell == "gru" and w.bias_hh is not None:
        return torch.cat([w.bias_ih[: 2 * D] + w.bias_hh[: 2 * D], w.bias_ih[2 * D :], w.bias_hh[2 * D :]])
    bias = w.bias_ih if w.bias_hh is None else w.bias_ih + w.bias_hh
    return bias if w.weight_ch is None else torch.cat([bias, w.weight_ch])


def pack_once(weights: Sequence[Weights], cell: str, backend: str, dtype: torch.dtype) -> Packed:
    """Stacks the parameters for inference, cast to `dtype` and with the recurrent weights in the kernel's layout."""
    weight_ih, weight_hh, bias, _ = pack(weights, cell)
    weight_hh = weight_hh.to(dtype)
    return Packed(weight_ih.to(dtype), weight_hh, bias.to(dtype), _BACKENDS[backend].pack(weight_hh, cell))


def run(
    x: Float[Tensor, "B H W C"], packed: Packed, cell: str, directions: list[int], backend: str, recompute: bool
) -> Tensor:
    """Runs one layer in all `directions`, from a zero state.

    Args:
        x: Token map, float32, bfloat16 or float16. Under autocast the layer runs in autocast's dtype.
        packed: Parameters, stacked in the order of `directions`.
        cell: One of `KEPT`.
        directions: Direction codes, see the module's docstring.
        backend: `fused` or `triton`.
        recompute: If True, the backward pass computes gates and cells again instead of keeping them.

    Returns:
        Outputs `[B, H, W, S D]`.
    """
    dtype = autocast_dtype(x) or x.dtype
    *tensors, panels = packed
    weight_ih, weight_hh, bias = (t.to(dtype) for t in tensors)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)) and not recompute
    return scan2d(x.to(dtype), weight_ih, weight_hh, bias, panels, cell, directions, backend, keep)[0]


@torch.library.custom_op("sequencer::scan2d", mutates_args=())
def scan2d(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    panels: Tensor | None,
    cell: str,
    directions: Sequence[int],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns outputs, and the gates and cells that the backward pass reads, which are empty unless `keep`."""
    module = _BACKENDS[backend]
    with torch.autocast(x.device.type, enabled=False):
        panels = module.pack(weight_hh, cell) if panels is None else panels
        out, gates, cells = module.forward(x, weight_ih, panels, bias, cell, directions, keep)
    return out, x.new_empty(0) if gates is None else gates, x.new_empty(0) if cells is None else cells


@scan2d.register_fake
def _(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    panels: Tensor | None,
    cell: str,
    directions: Sequence[int],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, _ = x.shape
    width = bias.numel() // biases(cell)
    out = x.new_empty(B, H, W, width)
    dtype = _BACKENDS[backend].saved_dtype(x.dtype)
    gates, cells = (
        x.new_empty(B * H * W, n * width, dtype=dtype) if keep and n else x.new_empty(0) for n in KEPT[cell]
    )
    return out, gates, cells


@torch.library.custom_op("sequencer::scan2d_backward", mutates_args=())
def scan2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    cell: str,
    directions: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight_ih, weight_hh and bias."""
    module = _BACKENDS[backend]
    with torch.autocast(x.device.type, enabled=False):
        if KEPT[cell].gates and not gates.numel():
            _, gates, cells = module.forward(x, weight_ih, module.pack(weight_hh, cell), bias, cell, directions, True)
        return module.backward(grad_out, x, weight_ih, weight_hh, bias, cell, directions, out, gates, cells)


@scan2d_backward.register_fake
def _(grad_out: Tensor, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight_ih, weight_hh, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight_ih, weight_hh, bias, _, ctx.cell, ctx.directions, ctx.backend, _ = inputs
    ctx.save_for_backward(x, weight_ih, weight_hh, bias, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    grads = scan2d_backward(grad_out, *ctx.saved_tensors, ctx.cell, ctx.directions, ctx.backend)
    return *grads, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, ctx.cell, ctx.directions, _ = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiates the gradients by the reference, which is differentiable any number of times."""
    further = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(upstream[0].device.type, enabled=False):
        # views, since the upstream gradient may itself be a function of the other tensors
        saved = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
        grad_out, x, weight_ih, weight_hh, bias = saved
        out = _scan_by_reference(x, weight_ih, weight_hh, bias, ctx.cell, ctx.directions)
        gradients = torch.autograd.grad(out, saved[1:], grad_out, create_graph=True)
        grads = torch.autograd.grad(gradients, saved, upstream, create_graph=further, allow_unused=True)
    return *grads, None, None, None, None, None, None


def _scan_by_reference(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, cell: str, directions: Sequence[int]
) -> Tensor:
    """Returns the outputs of `scan2d`."""
    outputs = []
    for direction, w_ih, w_hh, b in zip(directions, weight_ih.chunk(len(directions)), weight_hh, bias, strict=True):
        tokens = x.transpose(1, 2) if direction < 2 else x
        b_ih, b_hh, w_ch = b[: len(w_ih)], None, b[len(w_ih) :] if CELLS[cell].peephole else None
        if cell == "gru":
            *b_rz, b_in, b_hn = b.chunk(4)
            b_ih, b_hh = torch.cat([*b_rz, b_in]), F.pad(b_hn, (2 * len(b_hn), 0))
        elif CELLS[cell].bias_hh:
            b_hh = torch.zeros_like(b_ih)
        y = scan(tokens.flatten(0, 1), Weights(w_ih, w_hh, b_ih, b_hh, w_ch), cell, reverse=direction % 2 == 1)
        y = y.unflatten(0, tokens.shape[:2])
        outputs.append(y.transpose(1, 2) if direction < 2 else y)
    return torch.cat(outputs, dim=-1)


scan2d.register_autograd(_backward, setup_context=_save)
scan2d_backward.register_autograd(_double_backward, setup_context=_save_backward)


Shape: TypeAlias = Sequence[int]


def _multiplications(x: Shape, weight_ih: Shape, weight_hh: Shape) -> int:
    return x[0] * x[1] * x[2] * (weight_ih[0] * weight_ih[1] + math.prod(weight_hh))


@register_flop_formula(torch.ops.sequencer.scan2d)
def _forward_flops(x: Shape, weight_ih: Shape, weight_hh: Shape, *_: Any, **__: Any) -> int:
    return 2 * _multiplications(x, weight_ih, weight_hh)


@register_flop_formula(torch.ops.sequencer.scan2d_backward)
def _backward_flops(_: Any, x: Shape, weight_ih: Shape, weight_hh: Shape, *__: Any, **___: Any) -> int:
    return 4 * _multiplications(x, weight_ih, weight_hh)
