"""Throughput of the training loop and the loader."""

import copy
import time

import pytest
import torch

from sequencer.config import compose
from sequencer.data import DataModule
from sequencer.measure import measure_loader, measure_loops, throughput
from sequencer.training import setup

SMALL = ["data.num_workers=0", "trainer.accelerator=cpu"]
SMALL_MODEL = "model.kwargs={layers: [1], patch_sizes: [4], embed_dims: [8], hidden_sizes: [2]}"


class Slow:
    """A loader that takes at least `seconds` for every batch."""

    def __init__(self, loader, seconds):
        self.loader, self.seconds, self.sampler = loader, seconds, loader.sampler

    def __iter__(self):
        for batch in self.loader:
            time.sleep(self.seconds)
            yield batch


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_loader_and_model(monkeypatch, delay):
    original = DataModule.train_dataloader
    monkeypatch.setattr(DataModule, "train_dataloader", lambda self: Slow(original(self), delay))
    config = compose(["data=digits", "data.batch_size=4", *SMALL, SMALL_MODEL])
    loader, model = measure_loader(config, seconds=0.5)
    if delay:
        assert 1 / delay < loader <= 4 / delay  # images, not batches
        assert model > loader
    else:
        assert loader > 4 / 0.1
    assert model > 1


def test_both_loops_take_the_same_steps(monkeypatch):
    built = []

    def build_parts(config, bare, clock, data):
        parts = setup.build_parts(config, bare, clock, data=data)
        built.append((parts, bare, copy.deepcopy(parts.model.state_dict())))
        return parts

    monkeypatch.setattr(throughput, "build_parts", build_parts)
    overrides = ["data.batch_size=2", "optim.opt=nadamw", "optim.min_lr=1e-4", *SMALL, SMALL_MODEL]
    config = compose(["experiment=cifar10_cpu", *overrides])
    seconds = measure_loops(config, batches=3, rounds=2)
    assert list(seconds) == ["bare loop", "Lightning"]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    ((parts, bare, start),) = built
    steps = {float(state["step"]) for state in bare.optimizer.state.values()}
    assert parts.trainer.global_step == 3 * 3  # with the epoch of warm-up
    assert steps == {9.0}
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (bare.optimizer, parts.trainer.optimizers[0])]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0] < config.optim.lr / 2  # the end of the schedule
    for model in (parts.model, bare.model):
        assert not torch.equal(model.state_dict()["head.fc.weight"], start["head.fc.weight"])
