"""The description stored in an exported file, and what can load a model."""

from typing import Any

from timm.models import get_arch_name

from sequencer.models import PREPROCESSING, LoadedModel
from sequencer.variants import PUBLISHED, VARIANTS

UNALTERED = {"num_classes", "in_chans", "img_size", "drop_rate", "drop_path_rate"}  # timm's models take these as well


def describe_export(loaded: LoadedModel, img_size: int, preprocessing: bool) -> dict[str, Any]:
    """Builds the description of an exported file, which `sequencer.models.load_exported` reads.

    Args:
        loaded: The model.
        img_size: Height and width of the images that it is exported for, in pixels.
        preprocessing: Whether normalisation and softmax are part of the exported file.

    Returns:
        A dictionary of JSON types.
    """
    channels = loaded.pretrained_cfg["input_size"][0]
    cfg = {key: loaded.pretrained_cfg[key] for key in PREPROCESSING}
    about = dict(loaded.about)
    if loaded.data is not None:
        about["config"] = loaded.about["config"] | {"data": loaded.data | {"img_size": img_size}}
    return {
        "arch": loaded.arch,
        "slot": loaded.slot,
        "num_classes": loaded.model.num_classes,
        "label_names": loaded.class_names,
        "pretrained_cfg": cfg | {"input_size": [channels, img_size, img_size]},
        "model_args": loaded.model_args,
        "about": about,
        "preprocessing": preprocessing,
    }


def loads_with_timm(loaded: LoadedModel) -> bool:
    """Whether timm loads the weights without this package.

    It does for models of its own, and for those of this package's models that equal timm's, unless they are altered.
    """
    arch = get_arch_name(loaded.arch)
    return arch not in VARIANTS or (arch in PUBLISHED and loaded.model_args.keys() <= UNALTERED)
