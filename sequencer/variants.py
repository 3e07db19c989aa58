"""The registration of the named models with timm, which importing this module does.

`import sequencer` has this module imported as soon as timm is imported, which `sequencer.layers` does as well. The
classes of the models are therefore imported when a model is built, not here.

`sequencer2d_s`, `_m` and `_l` replace timm's entries of the same names with equivalent models: the same state dict, the
same logits, the same published weights.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sequencer.model_table import PUBLISHED, VARIANTS, Variant

__all__ = ["PUBLISHED", "VARIANTS", "Variant", "register"]


def _pretrained_cfg(name: str, variant: Variant) -> dict[str, Any]:
    source = {"hf_hub_id": "timm/"} if name in PUBLISHED else {}
    total_stride = math.prod(variant.args["patch_sizes"])
    return source | {
        "num_classes": 1000,
        "input_size": (variant.in_chans, variant.img_size, variant.img_size),
        "pool_size": (variant.img_size // total_stride,) * 2,
        "crop_pct": 0.875 if variant.img_size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN if variant.in_chans == 3 else (0.5,),
        "std": IMAGENET_DEFAULT_STD if variant.in_chans == 3 else (0.5,),
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "Sequencer: Deep LSTM for Image Classification",
        "paper_ids": "arXiv:2205.01972",
        "origin_url": "https://github.com/okojoalg/sequencer",
    }


default_cfgs: dict[str, Any] = {}  # timm's register_model looks for this name in the module of an entry point


def register(name: str, variant: Variant) -> None:
    """Registers a model with timm; `timm.create_model(name)` builds it.

    Args:
        name: a new name, or one that is to be replaced.
        variant: its class, arguments and images.
    """
    tag = f".{PUBLISHED[name]}" if name in PUBLISHED else ""
    default_cfgs.update(generate_default_cfgs({name + tag: _pretrained_cfg(name, variant)}))
    VARIANTS[name] = variant
    register_model(_entrypoint(name, variant))


def _entrypoint(name: str, variant: Variant) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        models = importlib.import_module("sequencer.models")
        arguments = {"img_size": variant.img_size} | variant.args | kwargs
        _check_feature_cls(arguments)
        stages = range(len(arguments["layers"]))
        with nullcontext() if device is None else torch.device(device):
            model = build_model_with_cfg(
                getattr(models, variant.model),
                name,
                pretrained,
                pretrained_filter_fn=models.to_timm_layout,
                feature_cfg={
                    "feature_cls": "getter",
                    "output_fmt": "NHWC",
                    "out_indices": tuple(stages),
                    "flatten_sequential": True,
                },
                **arguments,
            )
        return model if dtype is None else model.to(dtype)

    create.__name__, create.__qualname__, create.__module__ = name, name, __name__
    return create


def _check_feature_cls(arguments: dict[str, Any]) -> None:
    """Checks that the features of a model with a position embedding or shuffled tokens are taken from its own forward.

    Raises:
        ValueError: timm would rebuild the model from its child modules, without either of them.
    """
    feature_cls = arguments.get("feature_cls", "getter")
    rebuilt = getattr(feature_cls, "__name__", feature_cls) not in (
        "getter",
        "fx",
        "FeatureGetterNet",
        "FeatureGraphNet",
    )
    if rebuilt and (arguments.get("ape") or arguments.get("shuffle")):
        raise ValueError(f"feature_cls={feature_cls!r} leaves out ape and shuffle of this model: use 'getter' or 'fx'")


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=f"Overwriting ({'|'.join(PUBLISHED)}) in registry")
    for name, variant in list(VARIANTS.items()):
        register(name, variant)
