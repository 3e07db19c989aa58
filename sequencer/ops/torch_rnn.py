"""torch's own recurrent kernels (cuDNN on a GPU, oneDNN on a CPU) as functions of tensors."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from sequencer.ops.reference import Weights, autocast_dtype

# The weights are separate parameters, which cuDNN copies into one buffer at each call; they are small compared with the
# activations.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}


def rnn(x: Float[Tensor, "N T C"], layers: list[tuple[Weights, ...]], cell: str) -> Float[Tensor, "N T K"]:
    """Runs stacked layers of one or two directions each, as `sequencer.ops.reference.rnn` does.

    Only the cells in `FUNCTIONS` are supported. On a GPU the result is differentiable once.
    """
    flat = [tensor for directions in layers for w in directions for tensor in w if tensor is not None]
    dtype = autocast_dtype(x)
    if dtype is not None:  # torch's own autocast wrapper casts to float16, whatever dtype is set
        with torch.autocast(x.device.type, enabled=False):
            return _call(cell, x.to(dtype), [tensor.to(dtype) for tensor in flat], layers)
    return _call(cell, x, flat, layers)


def _call(cell: str, x: Tensor, flat: list[Tensor], layers: list[tuple[Weights, ...]]) -> Tensor:
    directions = len(layers[0])
    zeros = x.new_zeros(len(layers) * directions, x.shape[0], layers[0][0].weight_hh.shape[1])
    state = (zeros, zeros) if cell == "lstm" else zeros
    # cuDNN has no backward pass after a forward pass in inference mode, but modules in eval mode may need gradients
    train = torch.is_grad_enabled()
    return FUNCTIONS[cell](x, state, flat, True, len(layers), 0.0, train, directions == 2, True)[0]


Shape: TypeAlias = Sequence[int]
aten = torch.ops.aten


def _flops(x: Shape, weights: Sequence[Shape]) -> int:
    return 2 * x[0] * x[1] * sum(weight[0] * weight[1] for weight in weights if len(weight) == 2)


def _onednn(x: Shape, weight_ih: Shape, weight_hh: Shape, *_: Any, **__: Any) -> int:
    return _flops(x, [weight_ih, weight_hh])


def _cudnn(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _flops(x, weights)


for operator, formula, passes in (  # torch has no formulas for these and counts 0 FLOPs
    (aten.mkldnn_rnn_layer, _onednn, 1),
    (aten.mkldnn_rnn_layer_backward, _onednn, 2),
    (aten._cudnn_rnn, _cudnn, 1),
    (aten._cudnn_rnn_backward, _cudnn, 2),
):
    if operator not in flop_registry:
        register_flop_formula(operator)(lambda *args, _f=formula, _n=passes, **kwargs: _n * _f(*args, **kwargs))
