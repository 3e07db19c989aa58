"""The optimizer does what its configuration says."""

import copy
import math
from itertools import pairwise

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import sequencer  # noqa: F401
from sequencer.config import compose
from sequencer.config.schema import OptimConfig
from sequencer.training import muon
from sequencer.training.optim import build_optimizer, build_schedule, describe_groups, describe_phases, fit_phases


@pytest.fixture
def model() -> torch.nn.Module:
    return timm.create_model("sequencer2d_t_8", num_classes=10)


def test_only_matrices_decay(model):
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    in_groups = sum(len(group["params"]) for group in optimizer.param_groups)
    assert in_groups == len(list(model.parameters()))


def test_position_embedding_is_spared():
    model = timm.create_model("v_sequencer_s_pe", img_size=28, layers=(1,) * 4)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    group = next(
        group for group in optimizer.param_groups if any(p is model.absolute_pos_embed for p in group["params"])
    )
    assert group["weight_decay"] == 0.0


def test_layer_decay_stands_in_the_learning_rate(model):
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all("lr_scale" not in group for group in optimizer.param_groups)
    # depth: stem, 1 block, (downsampling, 2 blocks), norm and head
    assert rates[id(model.head.fc.weight)] == 1.0
    last_block, first_block = model.stages[1].blocks[1], model.stages[0].blocks[0]
    assert rates[id(last_block.norm1.weight)] == 0.5
    assert rates[id(first_block.norm1.weight)] < rates[id(last_block.norm1.weight)]
    assert rates[id(model.stem.proj.weight)] == min(rates.values())


def test_layer_decay_reaches_the_update(model):
    optimizer = build_optimizer(model, OptimConfig(opt="momentum", lr=1.0, layer_decay=0.5, weight_decay=0.0))
    build_schedule(optimizer, OptimConfig(sched="constant", lr=1.0), updates=10, updates_per_epoch=5).step_update(3)
    before = model.stem.proj.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stem_rate = next(g["lr"] for g in optimizer.param_groups if any(p is model.stem.proj.weight for p in g["params"]))
    assert stem_rate < 0.5
    torch.testing.assert_close(before - model.stem.proj.weight, torch.full_like(before, stem_rate))


def rates(config: OptimConfig, updates: int, updates_per_epoch: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(optimizer, config, updates, updates_per_epoch)
    values = [optimizer.param_groups[0]["lr"]]
    for update in range(1, updates):
        schedule.step_update(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_cosine_with_warmup_and_cooldown():
    config = OptimConfig(lr=1.0, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01, cooldown_epochs=1)
    values = rates(config, updates=100, updates_per_epoch=10)
    assert values[0] == 0.1
    assert values[10] == pytest.approx(0.1 + 0.9 * 10 / 20)
    assert values[45] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert values[90:] == pytest.approx([0.01] * 10)
    assert all(a != b for a, b in pairwise(values[:90]))  # stepped at every update


def test_linear_and_constant():
    linear = rates(OptimConfig(lr=1.0, sched="linear", min_lr=0.0), updates=10, updates_per_epoch=5)
    assert linear == pytest.approx([1 - step / 10 for step in range(10)])
    constant = rates(
        OptimConfig(lr=1.0, sched="constant", warmup_epochs=1, warmup_lr=0.0), updates=10, updates_per_epoch=4
    )
    assert constant == pytest.approx([0, 0.25, 0.5, 0.75] + [1.0] * 6)


def test_phases_that_would_fill_a_run_take_half_of_it():
    config = OptimConfig(lr=1.0, warmup_epochs=20, warmup_lr=0.0, min_lr=0.0, cooldown_epochs=10)
    assert fit_phases(config, 310) == (20, 10)
    assert fit_phases(config, 1) == pytest.approx((1 / 3, 1 / 6))
    short = compose(["optim.warmup_epochs=3", "optim.cooldown_epochs=0", "trainer.max_epochs=2"])
    assert describe_phases(short) == ["warm-up shortened from 3 epochs to 1: the run has 2"]
    values = rates(config, updates=60, updates_per_epoch=60)
    assert values[:20] == pytest.approx([step / 20 for step in range(20)])
    assert values[50:] == pytest.approx([0.0] * 10)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lion", "adafactor"])
def test_timm_optimizers(model, opt):
    optimizer = build_optimizer(model, OptimConfig(opt=opt, lr=1e-3))
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    before = model.head.fc.bias.detach().clone()
    optimizer.step()
    assert model.head.fc.bias.isfinite().all()
    assert type(optimizer).__name__.lower().startswith(opt[:4])
    assert (before != model.head.fc.bias).all()


def test_betas_and_eps_are_passed_on(model):
    group = build_optimizer(model, OptimConfig(opt_betas=[0.8, 0.95], opt_eps=1e-6)).param_groups[0]
    assert tuple(group["betas"]) == (0.8, 0.95)
    assert group["eps"] == 1e-6


def test_group_table_counts_everything(model):
    rows = describe_groups(model, build_optimizer(model, OptimConfig(layer_decay=0.9)))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert {row["weight_decay"] for row in rows} == {0.0, 0.05}


@pytest.mark.parametrize("opt", ["muon", "nmuon"])
def test_muon_by_shape_makes_timms_update(opt):
    model = timm.create_model("sequencer2d_t_8", num_classes=10)
    other = copy.deepcopy(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    ours, timms = build_optimizer(model, OptimConfig(opt=opt, **settings)), create_optimizer_v2(other, opt, **settings)
    for _ in range(3):
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        ours.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("timm.optim.muon._single_tensor_muon", muon._update)
            timms.step()
    for parameter, twin, start in zip(model.parameters(), other.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=1e-4)  # three updates move a weight by some 1e-2
        assert not torch.equal(parameter, start)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        if "momentum_buffer" in timms.state[twin]:
            assert torch.equal(ours.state[parameter]["momentum_buffer"], timms.state[twin]["momentum_buffer"])
