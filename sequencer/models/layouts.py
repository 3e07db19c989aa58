"""Conversion of state-dict keys between timm's names, which this package uses, and other names.

The paper's repository names block i of a stage `blocks.<stage>.<i>`. Its downsampling convolution is the last entry of
the previous stage, and its head is `head`.
"""

import re
from typing import Any

from torch import Tensor, nn

WRAPPERS = ("_orig_mod.", "module.", "model.")  # torch.compile, DistributedDataParallel, LightningModule


def strip_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that wrapping modules add to every name."""
    while state_dict and (prefix := _common_prefix(state_dict)):
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return {name.replace("._orig_mod.", "."): tensor for name, tensor in state_dict.items()}


def _common_prefix(state_dict: dict[str, Tensor]) -> str | None:
    return next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in state_dict)), None)


def to_timm_layout(state_dict: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Renames the keys of the paper's repository to timm's; any other state dict is returned unchanged.

    Args:
        state_dict: The state dict.
        model: Not used; timm passes the model to a filter function of pretrained weights.
    """
    if not any(re.match(r"blocks\.\d+\.\d+\.", name) for name in state_dict) or "stem.proj.weight" not in state_dict:
        return state_dict
    return {_to_timm_name(name): tensor for name, tensor in state_dict.items()}


def _to_timm_name(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.\d+\.down\.(.+)", name):
        return f"stages.{int(match[1]) + 1}.downsample.down.{match[2]}"
    name = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def to_paper_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames timm's keys to those of the paper's repository; the inverse of `to_timm_layout`."""
    lengths: dict[int, int] = {}
    for name in state_dict:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            stage, block = int(match[1]), int(match[2])
            lengths[stage] = max(lengths.get(stage, 0), block + 1)

    def rename(name: str) -> str:
        if match := re.fullmatch(r"stages\.(\d+)\.downsample\.down\.(.+)", name):
            before = int(match[1]) - 1
            return f"blocks.{before}.{lengths[before]}.down.{match[2]}"
        name = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.\2.", name)
        return re.sub(r"^head\.fc\.", "head.", name)

    return {rename(name): tensor for name, tensor in state_dict.items()}
