"""Sequencer: deep recurrent networks for image classification (Tatsunami and Taki 2022, arXiv 2205.01972).

A model consists of a patch embedding, stages of blocks that mix tokens by recurrence and channels by an MLP, a mean
over tokens, and a linear head. `Sequencer2d` scans columns and rows of the token map, `VSequencer` reads all tokens as
one sequence. Images are `B C H W`, tokens `B H W C`. Module names and state-dict keys are those of timm.
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
    register_notrace_function,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
)
from timm.models import named_apply
from torch import Tensor

from sequencer.layers import LAYER_NORM_EPS, RNN, Downsample2d, RNN1d, RNN2d, SequencerBlock, Stage
from sequencer.timm_internals import feature_take_indices


class Sequencer(nn.Module):
    """The architecture shared by all models, for any token mixer.

    Maps images `B C H W`, normalised and of a floating-point dtype, to logits `B num_classes`.

    Args:
        token_mixer: Function `(channels, hidden_size) -> module`. The module must keep the shape of a `B H W C` map.
        num_classes: Number of outputs of the head; 0 leaves the head out.
        img_size: Height and width that the model is made for, in pixels. It accepts images of any size of at least the
            total stride. Each convolution drops the pixels or tokens at the bottom and right edges that do not fill
            one of its patches, as in timm.
        in_chans: Channels of the images.
        global_pool: One of timm's pooling types; `''` keeps the token map.
        layers: Number of blocks of each stage.
        patch_sizes: Stride of the convolution before each stage.
        embed_dims: Channels of each stage.
        hidden_sizes: Hidden size per direction in each stage.
        mlp_ratios: Ratio of the MLPs' hidden size to the channels in each stage; 3 by default.
        drop_rate: Dropout probability before the head.
        proj_drop_rate: Dropout probability inside the MLPs.
        drop_path_rate: Stochastic-depth probability of the last block. The probabilities of the blocks increase
            linearly from 0.

    Raises:
        ValueError: The lists that describe the stages have different lengths, or `img_size` is smaller than the total
            stride.
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
        check_input_size(*to_2tuple(img_size), self.total_stride)

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
        named_apply(_init_weights, self)

    def init_weights(self) -> None:
        """Draws all parameters anew, as the constructor does; needed after `to_empty`."""
        for module in self.modules():
            if isinstance(module, RNN):
                module.init_weights()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        named_apply(_init_weights, self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's grouping of parameters by depth, for layer-wise learning-rate decay."""
        block: list[tuple[str, tuple[int, ...] | None]] = [(r"^stages\.(\d+)", None)]
        if not coarse:
            block = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.downsample", (0,))]
        return {"stem": r"^stem|absolute_pos_embed", "blocks": [*block, (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {"absolute_pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables or disables recomputation of each block's activations in the backward pass."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by one for `num_classes` classes, initialised like the first; 0 removes the head."""
        weight = next(self.parameters())
        self.num_classes = num_classes
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool)
        self.head.to(weight.device, weight.dtype).train(self.training)  # timm 1.0.22 resets to the defaults
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool
        _init_weights(self.head.fc, "head.fc")

    def forward_embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H2 W2 C2"]:
        """Converts images to tokens."""
        check_input_size(x.shape[-2], x.shape[-1], self.total_stride)
        return self.stem(x)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H2 W2 C2"]:
        return self.norm(self.stages(self.forward_embed(x)))

    def forward_head(self, x: Float[Tensor, "B H W C"], pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _take_indices(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Returns the indices of the chosen stages, and the largest of them.

        `indices` is a number of stages counted from the end, a list of indices, or None for all stages.
        """
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
        """Returns the output of the backbone and the outputs of chosen stages; timm's interface.

        Args:
            x: Images.
            indices: Number of stages counted from the end, a list of stage indices, or None for all stages.
            norm: Whether to apply the final layer norm to the output of the last stage.
            stop_early: Whether to stop after the last chosen stage.
            output_fmt: Format of the intermediate outputs, `NCHW` or `NHWC`.
            intermediates_only: Whether to return only the list of intermediate outputs.

        Raises:
            ValueError: `output_fmt` is unknown, or the size of the images is not valid.
        """
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
        """Removes the modules that the stages in `indices` do not need; returns the indices of these stages."""
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
    """Sequencer2D: its blocks scan the columns and the rows of the token map (Tatsunami and Taki 2022, section 3).

    Args:
        cell: One of `sequencer.ops.CELLS`.
        num_rnn_layers: Number of stacked recurrent layers in each token mixer.
        bidirectional: Whether columns and rows are scanned in both directions.
        union: `cat`, `add`, `vertical` or `horizontal`; see `sequencer.layers.RNN2d`.
        with_fc: Whether each token mixer ends with a linear layer.
        **backbone: Arguments of `Sequencer`.

    Raises:
        ValueError: As `Sequencer` and `sequencer.layers.RNN2d`.
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
    """Vanilla Sequencer: its blocks read all tokens, in raster order, as one sequence.

    See Tatsunami and Taki 2022, section 4.3.

    Args:
        cell: One of `sequencer.ops.CELLS`.
        num_rnn_layers: Number of stacked recurrent layers in each token mixer.
        bidirectional: Whether the sequence is scanned in both directions.
        ape: Whether to add a learned absolute position embedding to the tokens of the stem. It is resampled for images
            of other sizes than `img_size`.
        shuffle: Whether to permute the tokens in training, by one random permutation for all images of a batch.
        **backbone: Arguments of `Sequencer`.

    Raises:
        ValueError: As `Sequencer` and `sequencer.layers.RNN1d`.
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

    def init_weights(self) -> None:
        super().init_weights()
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward_embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H2 W2 C2"]:
        x = super().forward_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(self.absolute_pos_embed, [x.shape[1], x.shape[2]])
        return shuffle_tokens(x) if self.shuffle and self.training else x


@register_notrace_function  # a leaf for torch.fx, which ignores names with an underscore
def check_input_size(height: int, width: int, total_stride: int) -> None:
    """Checks that an image gives at least one token in the last stage.

    Raises:
        ValueError: Its height or width is smaller than the total stride.
    """
    for name, size in (("height", height), ("width", width)):
        if size < total_stride:
            raise ValueError(f"input {name} {size} is smaller than the total stride {total_stride}")


@register_notrace_function  # a leaf for torch.fx, which ignores names with an underscore
def shuffle_tokens(x: Tensor) -> Tensor:
    """Permutes the tokens of maps `B H W C`, by one random permutation for all of them."""
    tokens = x.flatten(1, 2)
    return tokens[:, torch.randperm(tokens.shape[1], device=x.device)].reshape(x.shape)


def _init_weights(module: nn.Module, name: str) -> None:
    """Initialises a linear or convolutional layer as the paper's code does.

    Recurrences initialise themselves, and layer norms keep torch's initialisation. The head starts at zero, so that the
    first predictions are uniform.
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
