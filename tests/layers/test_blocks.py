"""Blocks, downsampling and stages."""

import pytest
import torch
from torch import nn

from sequencer.layers import RNN2d, SequencerBlock, Stage
from sequencer.layers.blocks import Downsample2d


def test_block_is_two_residual_branches():
    torch.manual_seed(0)
    block, x = SequencerBlock(8, RNN2d(8, 4)), torch.randn(2, 3, 4, 8)

    def normalised(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias

    mlp = block.mlp_channels
    assert mlp.fc1.out_features == 3 * 8
    middle = x + block.rnn_tokens(normalised(x, block.norm1))
    expected = middle + mlp.fc2(nn.functional.gelu(mlp.fc1(normalised(middle, block.norm2))))
    torch.testing.assert_close(block(x), expected)


def test_drop_path_drops_whole_samples_in_training_only():
    torch.manual_seed(0)
    block, x = SequencerBlock(8, RNN2d(8, 4), drop_path=0.5), torch.randn(64, 2, 2, 8)
    untouched = (block(x) == x).flatten(1).all(1)
    assert 4 <= untouched.sum() <= 32  # 16 are expected: both branches are dropped with probability 1/4
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_downsampling_merges_patches():
    torch.manual_seed(0)
    layer, x = Downsample2d(3, 5, 2), torch.randn(2, 4, 6, 3)
    patches = x.reshape(2, 2, 2, 3, 2, 3).permute(0, 1, 3, 5, 2, 4)  # B, rows, columns, C, 2, 2
    expected = torch.einsum("bhwcij,kcij->bhwk", patches, layer.down.weight) + layer.down.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_changes_only_memory(drop_path):
    torch.manual_seed(0)
    stage = Stage(Downsample2d(6, 8, 2), [SequencerBlock(8, RNN2d(8, 4), drop_path=drop_path) for _ in range(3)])
    x = torch.randn(4, 4, 4, 6)
    upstream = torch.randn(4, 2, 2, 8)
    results, saved = [], []
    for checkpointing in (False, True):
        stage.grad_checkpointing = checkpointing
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = stage(x)
        saved.append(count)
        results.append([outputs, *torch.autograd.grad(outputs, list(stage.parameters()), upstream, allow_unused=True)])
    plain, checkpointed = results
    assert [g is None for g in plain] == [g is None for g in checkpointed]
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True) if a is not None)
    assert saved[1] < saved[0] / 3
