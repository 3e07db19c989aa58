"""Parameter groups, optimizer and schedule, from timm's factories."""

from dataclasses import replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from sequencer.config.schema import Config, OptimConfig
from sequencer.training import muon


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer, with parameter groups by weight decay and, with `layer_decay`, by depth.

    timm stores the factor of a depth in its group as `lr_scale`, which only timm's schedules apply; here it is
    multiplied into the group's `lr`, which is then the learning rate that the group really has.
    """
    muon.install()
    extra: dict[str, Any] = {"betas": config.opt_betas, "eps": config.opt_eps}
    optimizer = create_optimizer_v2(
        model,
        opt=config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=config.layer_decay,
        **{name: value for name, value in extra.items() if value is not None},
    )
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)
    return optimizer


def try_optimizer(config: OptimConfig) -> None:
    """Makes two updates of a tiny model, in which settings fail that an optimizer accepts when it is built.

    The kernels that some optimizers compile are not compiled, and the random state of torch is restored.

    Raises:
        ValueError: the optimizer takes another number of betas.
        Exception: what the optimizer or the schedule raises.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2))
        own = build_optimizer(model, replace(config, layer_decay=None, opt_betas=None)).defaults.get("betas")
        if config.opt_betas is not None and own is not None and len(config.opt_betas) != len(own):
            raise ValueError(f"it takes {len(own)} betas, not {len(config.opt_betas)}")
        optimizer = build_optimizer(model, replace(config, layer_decay=None))
        schedule = build_schedule(optimizer, config, updates=2, updates_per_epoch=1)

        def loss() -> float:
            optimizer.zero_grad()
            value = model(torch.ones(2, 1, 2, 2)).square().mean()
            value.backward()
            return value.item()

        for update in (1, 2):
            optimizer.step(loss)
            schedule.step_update(update)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, updates: int, updates_per_epoch: float
) -> Scheduler:
    """Builds the schedule of the learning rate over the updates of a run.

    Args:
        optimizer: its groups' `lr` are the peak learning rates.
        config: shape of the schedule: warm-up, then a fall to `min_lr` or none, then cool-down.
        updates: updates of the run, warm-up and cool-down included.
        updates_per_epoch: converts the lengths of warm-up and cool-down, which are in epochs.

    Returns:
        A schedule whose `step_update(n)` sets the learning rates after `n` updates.
    """
    warmup_epochs, cooldown_epochs = fit_phases(config, updates / updates_per_epoch)
    warmup = min(round(warmup_epochs * updates_per_epoch), updates - 1)
    falling = max(updates - round(cooldown_epochs * updates_per_epoch), warmup + 1)
    common: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": config.warmup_lr,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if config.sched == "constant":
        return StepLRScheduler(optimizer, decay_t=updates, decay_rate=1.0, **common)
    if config.sched == "linear":
        return PolyLRScheduler(optimizer, t_initial=falling, power=1.0, lr_min=config.min_lr, **common)
    return CosineLRScheduler(optimizer, t_initial=falling, lr_min=config.min_lr, **common)


def fit_phases(config: OptimConfig, epochs: float) -> tuple[float, float]:
    """Returns the epochs of warm-up and cool-down: those of the configuration, or half of a run that they would fill.

    Args:
        config: The configuration.
        epochs: Epochs of the run.
    """
    asked = config.warmup_epochs + config.cooldown_epochs
    factor = epochs / 2 / asked if asked >= epochs else 1.0
    return config.warmup_epochs * factor, config.cooldown_epochs * factor


def describe_phases(config: Config) -> list[str]:
    """Says by how much warm-up and cool-down are shortened, if they are."""
    optim, epochs = config.optim, config.trainer.max_epochs
    warmup, cooldown = fit_phases(optim, epochs)
    shortened = [
        f"{name} shortened from {asked:g} epoch{'s' * (asked != 1)} to {given:.3g}"
        for name, asked, given in (
            ("warm-up", optim.warmup_epochs, warmup),
            ("cool-down", optim.cooldown_epochs, cooldown),
        )
        if given != asked
    ]
    return [f"{', '.join(shortened)}: the run has {epochs}"] if shortened else []


def describe_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """Describes each parameter group: its size, peak learning rate, weight decay and the name of its first tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {
            "parameters": sum(parameter.numel() for parameter in group["params"]),
            "lr": group.get("initial_lr", group["lr"]),
            "weight_decay": group["weight_decay"],
            "first": names[id(group["params"][0])],
        }
        for group in optimizer.param_groups
    ]
