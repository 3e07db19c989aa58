"""The cache of packed weights: it follows the parameters, whatever changes them, and costs one packing."""

import copy
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from sequencer.layers import RNN2d
from sequencer.ops import PackedWeights, Weights, cpu


def change_parameters(layer, how):
    with torch.no_grad():
        if how == "optimizer":
            with torch.enable_grad():
                layer(torch.randn(1, 2, 3, 8).to(layer.fc.weight.dtype)).square().sum().backward()
            torch.optim.SGD(layer.parameters(), lr=1.0).step()
        elif how == "load_state_dict":
            layer.load_state_dict({name: p + 0.1 for name, p in layer.state_dict().items()})
        elif how == "data swap":
            layer.rnn_h.weight_hh_l0.data = layer.rnn_h.weight_hh_l0.data * 2
        elif how == "data copy":
            layer.rnn_h.weight_hh_l0.data.mul_(2)
        elif how == "one element":
            layer.rnn_v.weight_ih_l0_reverse.data[3, 5] += 1
        elif how == "permuted":
            bias = layer.rnn_v.bias_hh_l0.data
            bias.copy_(bias.flip(0))


@pytest.mark.parametrize("how", ["optimizer", "load_state_dict", "data swap", "data copy", "one element", "permuted"])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_follow_the_parameters(how, grad_mode, dtype):
    torch.manual_seed(0)
    layer, x = RNN2d(8, 4, num_layers=2).to(dtype).eval(), torch.randn(2, 3, 4, 8).to(dtype)
    with grad_mode():
        before = layer(x)
        assert torch.equal(layer(x), before)
    change_parameters(layer, how)
    with grad_mode():
        after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x).detach())  # with gradients enabled, the cache is not used


@pytest.mark.skipif(bool(cpu.unavailable()), reason=f"no kernel: {cpu.unavailable()}")
@pytest.mark.parametrize("position", range(7))
def test_every_value_counts_in_a_checksum(position):
    """Seven bfloat16 values are no whole number of words."""
    values = torch.arange(7, dtype=torch.bfloat16)
    before = cpu.checksum([values], "rnn", torch.float32)
    values[position] += 1
    assert cpu.checksum([values], "rnn", torch.float32) != before


@pytest.mark.skipif(bool(cpu.unavailable()), reason=f"no kernel: {cpu.unavailable()}")
def test_weights_are_packed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "pack", lambda *args, pack=cpu.pack: calls.append(1) or pack(*args))
    layer, x = RNN2d(8, 4).eval(), torch.randn(1, 3, 4, 8)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        assert len(calls) == 1
        layer.train()
        layer.eval()
        layer(x)
    assert len(calls) == 2


def test_weights_packed_in_inference_mode_are_usable_outside():
    layer, x = RNN2d(8, 4).eval(), torch.randn(1, 3, 4, 8)
    with torch.inference_mode():
        inside = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), inside)


@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_weights_that_are_computed_anew_are_packed_anew(backend):
    """They may have the address and version of the former ones, whose memory has been freed."""
    if backend == "fused" and cpu.unavailable():
        pytest.skip(f"no kernel: {cpu.unavailable()}")
    packed = PackedWeights()
    for value in range(20):
        weights = Weights(torch.full((16, 4), value), torch.full((16, 4), value), torch.full((16,), value))
        weights = Weights._make(t if t is None else t.float() for t in weights)
        assert packed.get(0, [weights], "lstm", backend, torch.float32).weight_ih.unique() == value
        del weights


def test_copied_and_unpickled_modules_start_with_an_empty_cache():
    layer, x = RNN2d(8, 4).eval(), torch.randn(1, 3, 4, 8)
    with torch.no_grad():
        expected = layer(x)
        size = len(pickle.dumps(layer))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), ModelEmaV3(layer).module):
            assert torch.equal(twin(x), expected)
            nn.init.zeros_(twin.fc.weight)
            twin.rnn_v.weight_ih_l0.mul_(2)
        assert torch.equal(layer(x), expected)
    assert len(pickle.dumps(layer)) == size
