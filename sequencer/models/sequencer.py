"""Sequencer: deep recurrent networks for image classification (Tatsunami and Taki 2022, arXiv 2205.01972).

A stem of patches, stages of blocks that mix tokens by recurrence and channels by an MLP, a mean over tokens and a
linear head. `Sequencer2d` sweeps columns and rows, `VSequencer` reads all tokens as one sequence. Images are
`B 3 H W` at the boundary, tokens `B H W C` inside. Module names, and with them the state-dict keys, are timm's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from timm.layers import (
    ClassifierHead,
    PatchEmbed,
    lecun_normal_,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
)
from timm.models import named_apply
from timm.models._features import feature_take_indices
from torch import Tensor

from sequencer.layers import LAYER_NORM_EPS, Downsample2d, RNN1d, RNN2d, SequencerBlock, Stage


class Sequencer(nn.Module):
    """The backbone, for any token mixer.

    Args:
        token_mixer: `(channels, hidden_size) -> module` that keeps the shape of a `B H W C` map.
        num_classes: size of the head; 0 leaves the head out.
        img_size: height and width the model is meant for; any multiple of the total stride may be fed.
        in_chans: image channels.
        global_pool: timm's pooling names; `''` keeps the map.
        layers, patch_sizes, embed_dims, hidden_sizes, mlp_ratios: one entry a stage: blocks, stride of the
            convolution that leads to it, channels, hidden size per direction, MLP width over channels.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout inside the MLPs.
        drop_path_rate: stochastic depth of the last block; the rates grow linearly from 0 over all blocks.

    Raises:
        ValueError: stages of unequal description, or `img_size` no multiple of the total stride.
    """

    norm: nn.Module

    def __init__(
        self,
        token_mixer: Callable[[int, int], nn.Module],
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        global_pool: str = "avg",
        layers: Sequence[int] = (4, 3, 8, 3),
        patch_sizes: Sequence[int] = (7, 2, 1, 1),
        embed_dims: Sequence[int] = (192, 384, 384, 384),
        hidden_sizes: Sequence[int] = (48, 96, 96, 96),
        mlp_ratios: Sequence[float] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        mlp_ratios = mlp_ratios or [3.0] * len(layers)
        if len({len(x) for x in (layers, patch_sizes, embed_dims, hidden_sizes, mlp_ratios)}) != 1:
            raise ValueError("layers, patch_sizes, embed_dims, hidden_sizes and mlp_ratios need one entry per stage")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.output_fmt, self.feature_dim = "NHWC", -1
        strides = list(accumulate(patch_sizes, lambda a, b: a * b))
        self.total_stride = strides[-1]
        self.check_input_size(*to_2tuple(img_size))

        self.stem = PatchEmbed(None, patch_sizes[0], in_chans, embed_dims[0], flatten=False, output_fmt=self.output_fmt)
        self.stages, self.feature_info = nn.Sequential(), []
        depth = sum(layers)
        rates = iter([drop_path_rate * k / max(depth - 1, 1) for k in range(depth)])
        for i, dim in enumerate(embed_dims):
            downsample = Downsample2d(embed_dims[i - 1], dim, patch_sizes[i]) if i else nn.Identity()
            blocks = [
                SequencerBlock(dim, token_mixer(dim, hidden_sizes[i]), mlp_ratios[i], proj_drop_rate, next(rates))
                for _ in range(layers[i])
            ]
            self.stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": strides[i], "module": f"stages.{i}"})
        self.norm = nn.LayerNorm(self.num_features, eps=LAYER_NORM_EPS)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
        )
        self.init_weights()

    def init_weights(self) -> None:
        named_apply(_init_weights, self)

    def check_input_size(self, height: int, width: int) -> None:
        """Raises ValueError, naming the nearest sizes that work, unless both are multiples of the total stride."""
        stride = self.total_stride
        for name, size in (("height", height), ("width", width)):
            if size % stride or size == 0:
                below, above = size // stride * stride, (size // stride + 1) * stride
                nearest = f"{below} and {above}" if below else f"{above}"
                raise ValueError(
                    f"input {name} {size} is not a multiple of the total stride {stride}; nearest: {nearest}"
                )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning-rate decay."""
        block: list[tuple[str, tuple[int, ...] | None]] = [(r"^stages\.(\d+)", None)]
        if not coarse:
            block = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.downsample", (0,))]
        return {"stem": r"^stem|absolute_pos_embed", "blocks": [*block, (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {"absolute_pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, initialised as the first was; 0 classes removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool
        _init_weights(self.head.fc, "head.fc")

    def forward_embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H2 W2 C2"]:
        """Image to tokens."""
        self.check_input_size(*x.shape[-2:])
        return self.stem(x)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H2 W2 C2"]:
        return self.norm(self.stages(self.forward_embed(x)))

    def forward_head(self, x: Float[Tensor, "B H W C"], pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _take_indices(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """The stages meant: the last `n`, those named, or all; and the last of them."""
        return feature_take_indices(len(self.stages), list(indices) if isinstance(indices, Sequence) else indices)

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, and of the backbone; arguments as in timm."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, not {output_fmt!r}")
        wanted, last_wanted = self._take_indices(indices)
        final = len(self.stages) - 1
        x, intermediates = self.forward_embed(x), []
        for i, stage in enumerate(self.stages[: last_wanted + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                feature = self.norm(x) if norm and i == final else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == final else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the stages in `indices` do not need; returns their indices."""
        wanted, last = self._take_indices(indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted


class Sequencer2d(Sequencer):
    """Sequencer whose blocks sweep the columns and the rows of the token map.

    Args:
        cell: one of `sequencer.ops.CELLS`.
        num_rnn_layers: recurrent layers one upon another in each sweep.
        bidirectional: both directions of each sweep.
        union: `cat`, `add`, `vertical` or `horizontal`; see `sequencer.layers.RNN2d`.
        with_fc: close each token mixer with a linear layer.
        **backbone: arguments of `Sequencer`.
    """

    def __init__(
        self,
        *,
        cell: str = "lstm",
        num_rnn_layers: int = 1,
        bidirectional: bool = True,
        union: str = "cat",
        with_fc: bool = True,
        **backbone,
    ) -> None:
        mixer = partial(
            RNN2d, cell=cell, num_layers=num_rnn_layers, bidirectional=bidirectional, union=union, with_fc=with_fc
        )
        super().__init__(mixer, **backbone)


class VSequencer(Sequencer):
    """Vanilla Sequencer: tokens in raster order as one sequence (Tatsunami and Taki 2022, section 4.3).

    Args:
        cell, num_rnn_layers, bidirectional: as in `Sequencer2d`.
        ape: add a learned absolute position embedding after the stem; it is resampled for other input sizes.
        shuffle: in training, permute the tokens at random, once per batch, alike for all its images.
        **backbone: arguments of `Sequencer`.
    """

    def __init__(
        self,
        *,
        cell: str = "lstm",
        num_rnn_layers: int = 1,
        bidirectional: bool = True,
        ape: bool = False,
        shuffle: bool = False,
        **backbone,
    ) -> None:
        super().__init__(partial(RNN1d, cell=cell, num_layers=num_rnn_layers, bidirectional=bidirectional), **backbone)
        self.shuffle = shuffle
        self.absolute_pos_embed = None
        if ape:
            patch = self.stem.proj.kernel_size[0]
            height, width = to_2tuple(backbone.get("img_size", 224))
            self.absolute_pos_embed = nn.Parameter(
                torch.empty(1, height // patch, width // patch, self.stem.proj.out_channels)
            )
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward_embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H2 W2 C2"]:
        x = super().forward_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(self.absolute_pos_embed, list(x.shape[1:3]))
        if self.shuffle and self.training:
            tokens = x.flatten(1, 2)
            x = tokens[:, torch.randperm(tokens.shape[1], device=x.device)].reshape(x.shape)
        return x


def _init_weights(module: nn.Module, name: str) -> None:
    """The paper's initialisation; recurrences have their own, and layer norms keep torch's.

    The head starts at zero, so that the first loss is that of a uniform guess.
    """
    if isinstance(module, nn.Linear):
        if name.startswith("head"):
            nn.init.zeros_(module.weight)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6 if "mlp" in name else 0.0)
    elif isinstance(module, nn.Conv2d):
        lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
