"""The linear layer of all blocks."""

import torch.nn as nn
from timm.layers import register_notrace_module
from torch import Tensor

from sequencer.ops import linear


@register_notrace_module  # torch.fx keeps it as a leaf: its product is chosen when it runs
class Linear(nn.Linear):
    """`torch.nn.Linear`, by the fastest matrix products of this machine; see `sequencer.ops.products`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
