"""Residual blocks, downsampling and stages of a Sequencer, on token maps `B H W C`."""

import torch
import torch.nn as nn
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sequencer.layers.linear import Linear

LAYER_NORM_EPS = 1e-6
# Bytes between the layers of an MLP that stay in a core's cache; larger arrays are also costly to allocate. Fewer than
# four such parts are no faster than the whole.
HIDDEN_BYTES = 2**22


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, with the parameter names of `timm.layers.Mlp`.

    Without gradients, large inputs on a CPU are computed in parts, which is up to 1.5 times as fast.

    Args:
        dim: Channels `C`.
        hidden_size: Channels between the layers.
        drop: Dropout probability after each layer.
    """

    def __init__(self, dim: int, hidden_size: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_size)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_size, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        tracing = type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if tracing or torch.is_grad_enabled() or x.device.type != "cpu":
            return self._whole(x)
        rows = max(1, HIDDEN_BYTES // (self.fc1.out_features * x.element_size()))
        if x.numel() < 4 * rows * x.shape[-1]:
            return self._whole(x)
        return torch.cat([self._whole(part) for part in x.reshape(-1, x.shape[-1]).split(rows)]).view(x.shape)

    def _whole(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class SequencerBlock(nn.Module):
    """A residual block that mixes tokens, then channels (Tatsunami and Taki 2022, figure 1).

    Computes `x + DropPath(mix(LN(x)))`, then `x + DropPath(MLP(LN(x)))`.

    Args:
        dim: Channels `C`.
        rnn_tokens: The token mixer, a module that keeps the shape of its input.
        mlp_ratio: Ratio of the MLP's hidden size to `dim`.
        drop: Dropout probability inside the MLP.
        drop_path: Probability that a branch is dropped for a sample.
    """

    def __init__(
        self, dim: int, rnn_tokens: nn.Module, mlp_ratio: float = 3.0, drop: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.rnn_tokens = rnn_tokens
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp_channels = Mlp(dim, int(mlp_ratio * dim), drop=drop)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = x + self.drop_path(self.rnn_tokens(self.norm1(x)))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class Downsample2d(nn.Module):
    """Merges each patch of `patch_size` x `patch_size` tokens into one token by a convolution.

    Tokens that are left over at the bottom and right edges are dropped.
    """

    def __init__(self, input_dim: int, output_dim: int, patch_size: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(input_dim, output_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 C2"]:
        return self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """A downsampling module followed by the blocks of one resolution.

    With `grad_checkpointing` the activations inside each block are computed again in the backward pass.
    """

    def __init__(self, downsample: nn.Module, blocks: list[SequencerBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 C2"]:
        # the output of the convolution is a permuted view, which every layer norm of the stage would copy
        x = self.downsample(x).contiguous()
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x
