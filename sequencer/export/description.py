"""The description stored in an exported file, and the model card of a repository on a hub."""

from typing import Any

from huggingface_hub import ModelCardData
from timm.models import get_arch_name

from sequencer.models import PREPROCESSING, LoadedModel
from sequencer.printing import printable
from sequencer.variants import PUBLISHED, VARIANTS

CITATION = """@inproceedings{tatsunami2022sequencer,
  title = {Sequencer: Deep {LSTM} for Image Classification},
  author = {Tatsunami, Yuki and Taki, Masato},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}"""

LOCAL = "local-dir:FOLDER"  # a folder that may be moved: its card names no path
TIMM_ALONE = "It loads with timm alone."
NEEDS_THIS_PACKAGE = (
    "It needs the package `sequencer`, whose import adds the architecture to timm; timm alone cannot load it."
)
USAGE = """import timm, torch
from PIL import Image
{imports}
model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.open("photograph.jpg").convert("{mode}")
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)
"""
CARD = """---
{header}
---
# {arch}

{summary}

## Details

{details}

## Usage

{loading}

```python
{usage}```
"""
MOST_NAMES = 100  # of classes in a model card
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


def model_card(loaded: LoadedModel, name: str) -> str:
    """Builds a model card, the `README.md` of a repository on a hub.

    It states no licence: that is for the author of the weights, whose images and first weights have licences too.

    Args:
        loaded: The model.
        name: The name by which `timm.create_model` loads the model, e.g. `hf-hub:ORG/NAME`.
    """
    alone, ours = loads_with_timm(loaded), get_arch_name(loaded.arch) in VARIANTS
    header = ModelCardData(
        library_name="timm" if alone else None,  # a hub shows how to load the model with it
        pipeline_tag="image-classification",
        tags=["image-classification", *(["timm"] if alone else [])],
    )
    mode = "L" if loaded.pretrained_cfg["input_size"][0] == 1 else "RGB"
    imports = "" if alone else "\nimport sequencer\n"
    loading = TIMM_ALONE if alone else NEEDS_THIS_PACKAGE
    text = CARD.format(
        header=header.to_yaml(),
        arch=loaded.arch,
        summary=f"An image classifier{' of the Sequencer family' if ours else ''}: `{loaded.arch}`.",
        details=_list_details(loaded),
        loading=loading + (" FOLDER is the folder that holds this file." if name == LOCAL else ""),
        usage=USAGE.format(imports=imports, name=name, mode=mode),
    )
    return text + (f"\n## Citation\n\n```bibtex\n{CITATION}\n```\n" if ours else "")


def _list_details(loaded: LoadedModel) -> str:
    metrics = loaded.about.get("metrics", {})
    results = {
        f"{split} {metric}": f"{value:.2%}"
        for split in ("test", "val_ema", "val")
        for key, metric in (("top1", "top-1"), ("top5", "top-5"))
        if isinstance(value := metrics.get(f"{split}/{key}"), int | float)
    }
    details = {
        "Architecture": loaded.arch,
        "Arguments": ", ".join(f"{key}={value}" for key, value in loaded.model_args.items()),
        "Parameters": f"{sum(parameter.numel() for parameter in loaded.model.parameters()):,}",
        "Image size": " x ".join(str(extent) for extent in loaded.pretrained_cfg["input_size"]),
        "Classes": _list_classes(loaded),
        "Weights": "exponential moving average" if loaded.slot == "ema" else "without moving average",
        "Data set": loaded.data and loaded.data.get("name"),
        **results,
        "Commit": loaded.about.get("commit"),
        "Made with": ", ".join(f"{key} {value}" for key, value in loaded.about.get("versions", {}).items()),
        "Licence": "for the author to state, by `license:` in the header of this file",
    }
    return "\n".join(f"- **{key}:** {printable(value)}" for key, value in details.items() if value)


def _list_classes(loaded: LoadedModel) -> str:
    number, names = loaded.model.num_classes, loaded.class_names or ()
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{number}{': ' if names else ''}{', '.join(names[:MOST_NAMES])}{more}"
