"""The table of named models; importing this module registers them with timm.

`import sequencer` has this module imported as soon as timm is imported, which `sequencer.layers` does as well. The
classes of the models are therefore imported when a model is built, not here.

Numbers beside a name are parameters at 1,000 classes. `sequencer2d_s`, `_m` and `_l` replace timm's entries of the
same names with equivalent models: the same state dict, the same logits, the same published weights.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class Variant(NamedTuple):
    """A named model: its class in `sequencer.models`, its arguments, and the images that it is meant for."""

    model: Literal["Sequencer2d", "VSequencer"]
    args: dict[str, Any]
    img_size: int = 224
    in_chans: int = 3


S = {
    "layers": (4, 3, 8, 3),
    "patch_sizes": (7, 2, 1, 1),
    "embed_dims": (192, 384, 384, 384),
    "hidden_sizes": (48, 96, 96, 96),
}
M = S | {"layers": (4, 3, 14, 3)}
L = S | {"layers": (8, 8, 16, 4)}
S_H2X = S | {"hidden_sizes": (96, 192, 192, 192)}
V = {
    "layers": (4, 3, 8, 3),
    "patch_sizes": (14, 1, 1, 1),
    "embed_dims": (384, 384, 384, 384),
    "hidden_sizes": (192, 192, 192, 192),
}
TINY = {"layers": (2, 4), "embed_dims": (96, 192), "hidden_sizes": (24, 48)}

VARIANTS = {
    # the paper's models (table 1), and the same at the resolution of its fine-tuning
    "sequencer2d_s": Variant("Sequencer2d", S),  # 27.7M
    "sequencer2d_m": Variant("Sequencer2d", M),  # 38.3M
    "sequencer2d_l": Variant("Sequencer2d", L),  # 54.3M
    "sequencer2d_s_392": Variant("Sequencer2d", S, img_size=392),
    "sequencer2d_m_392": Variant("Sequencer2d", M, img_size=392),
    "sequencer2d_l_392": Variant("Sequencer2d", L, img_size=392),
    "sequencer2d_l_d4_3x": Variant(  # 96.3M
        "Sequencer2d", L | {"embed_dims": (256, 512, 512, 512), "hidden_sizes": (64, 128, 128, 128)}
    ),
    # its ablations
    "sequencer2d_s_unidirectional": Variant("Sequencer2d", S | {"bidirectional": False}),
    "sequencer2d_s_add": Variant("Sequencer2d", S | {"union": "add"}),
    "sequencer2d_s_h2x": Variant("Sequencer2d", S_H2X),
    "sequencer2d_s_without_fc": Variant("Sequencer2d", S | {"with_fc": False}),
    "sequencer2d_vertical": Variant("Sequencer2d", S_H2X | {"union": "vertical", "with_fc": False}),
    "sequencer2d_s_horizontal": Variant("Sequencer2d", S_H2X | {"union": "horizontal", "with_fc": False}),
    "gru_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "gru"}),
    "rnn_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "rnn"}),
    "v_sequencer_s": Variant("VSequencer", V),
    "v_sequencer_s_h": Variant("VSequencer", S_H2X),
    "v_sequencer_s_pe": Variant("VSequencer", V | {"ape": True}),
    # other cells in the same backbone
    "indylstm_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "indylstm"}),
    "peephole_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "peephole_lstm"}),
    "lstm1997_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "lstm1997"}),
    # for small images; the suffix is the size meant, the total stride is 2, 4 and 8
    "sequencer2d_t_8": Variant(
        "Sequencer2d",
        {"layers": (2, 2), "patch_sizes": (1, 2), "embed_dims": (64, 128), "hidden_sizes": (16, 32)},
        img_size=8,
        in_chans=1,
    ),
    "sequencer2d_t_32": Variant("Sequencer2d", TINY | {"patch_sizes": (2, 2)}, img_size=32),
    "sequencer2d_t_64": Variant("Sequencer2d", TINY | {"patch_sizes": (4, 2)}, img_size=64),
}

PUBLISHED = {  # name -> weights that timm publishes, by tag
    "sequencer2d_s": "in1k",
    "sequencer2d_m": "in1k",
    "sequencer2d_l": "in1k",
}


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
