"""Muon's update of all matrices of one shape at a time.

timm's `Muon` orthogonalises one matrix after another by 15 small products each, which take longer to start than to
compute: some 50 ms an update on two CPU cores for the 46 matrices of `sequencer2d_p4_32`, whatever the batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import muon
from torch import Tensor

_update = muon._single_tensor_muon  # private; read in timm 1.0.31


def update_by_shape(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_bufs: Sequence[Tensor], **settings: Any
) -> None:
    """Makes timm's update of the parameters and momenta, with one batch of products for the matrices of a shape.

    The result is timm's but for rounding. Convolutions, and shapes that stand alone, are left to timm.

    Args:
        params: The parameters, of which matrices have shape `M N`.
        grads: Their gradients.
        momentum_bufs: Their momenta.
        settings: The other arguments of timm's function.
    """
    groups: dict[object, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for index, tensors in enumerate(zip(params, grads, momentum_bufs, strict=True)):
        param = tensors[0]
        groups[(param.shape, param.dtype, param.device) if param.ndim == 2 else index].append(tensors)
    for group in groups.values():
        columns = [list(column) for column in zip(*group, strict=True)]
        if len(group) == 1:
            _update(*columns, **settings)
            continue
        # timm updates a convolution `M N K` as K matrices where it is told to
        stacked = [torch.stack(column).movedim(0, -1) for column in columns]
        _update(*([tensor] for tensor in stacked), **settings | {"conv_mode": "batched", "normalize_spatial": False})
        for column, tensor in zip(columns[::2], stacked[::2], strict=True):  # parameters and momenta
            torch._foreach_copy_(column, list(tensor.unbind(-1)))


def install() -> None:
    """Lets timm's `Muon` update by shape, in this process."""
    muon._single_tensor_muon = update_by_shape
