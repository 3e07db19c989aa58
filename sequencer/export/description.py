"""The description stored in an exported file, and the model card of a hub repository."""

from typing import Any

from sequencer.models import PREPROCESSING, LoadedModel

CITATION = """@inproceedings{tatsunami2022sequencer,
  title = {Sequencer: Deep {LSTM} for Image Classification},
  author = {Tatsunami, Yuki and Taki, Masato},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}"""

USAGE = """
```python
import timm, torch
from PIL import Image

import sequencer  # registers the architecture; timm itself has sequencer2d_s, _m and _l

model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.open("photograph.jpg").convert("{mode}")
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)
```
"""


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


def model_card(loaded: LoadedModel, name: str) -> dict[str, Any]:
    """Builds the contents of a model card, in the form that timm's `generate_readme` takes.

    Args:
        loaded: The model.
        name: The name by which `timm.create_model` loads the model, e.g. `hf-hub:ORG/NAME`.
    """
    metrics = loaded.about.get("metrics", {})
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    details = {
        "Architecture": loaded.arch,
        "Parameters": f"{parameters:,}",
        "Image size": " x ".join(str(extent) for extent in loaded.pretrained_cfg["input_size"]),
        "Classes": loaded.model.num_classes,
        "Weights": "exponential moving average" if loaded.slot == "ema" else "without moving average",
        "Dataset": loaded.data and loaded.data["name"],
        "Results": {
            f"{split} {metric}": f"{metrics[f'{split}/{key}']:.2%}"
            for split in ("test", "val_ema", "val")
            for key, metric in (("top1", "top-1"), ("top5", "top-5"))
            if metrics.get(f"{split}/{key}") is not None
        },
        "Commit": loaded.about.get("commit"),
        "Made with": loaded.about.get("versions"),
    }
    return {
        "license": "apache-2.0",
        "description": f"An image classifier of the Sequencer family: `{loaded.arch}`, trained with Sequencer.",
        "details": {key: value for key, value in details.items() if value},
        "usage": USAGE.format(name=name, mode="L" if loaded.pretrained_cfg["input_size"][0] == 1 else "RGB"),
        "citation": CITATION,
    }
