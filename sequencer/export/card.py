"""The model card, the `README.md` of a model folder and of a repository on a hub."""

import importlib.resources
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_arch_name

from sequencer.evaluation import describe_figures
from sequencer.export.description import loads_with_timm
from sequencer.models import KeyFigures, LoadedModel
from sequencer.printing import printable
from sequencer.variants import VARIANTS

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
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)"""
MOST_NAMES = 100  # of classes in a model card
SPLITS = {"test": "test", "val": "validation"}
METRICS = {  # by their names in summary.json: type on a hub, name, and format
    "top1": ("accuracy", "top-1", ".2%"),
    "balanced": ("balanced_accuracy", "balanced accuracy", ".2%"),
    "top5": ("top_5_accuracy", "top-5", ".2%"),
    "loss": ("loss", "loss", ".4f"),
}
CALIBRATION = ("expected_calibration_error", "calibration error")


def model_card(loaded: LoadedModel, name: str, picture: str | None = None) -> str:
    """Builds a model card.

    It states no licence: that is for the author of the weights, whose images and first weights have licences too.

    Args:
        loaded: The model.
        name: The name by which `timm.create_model` loads the model, e.g. `hf-hub:ORG/NAME`.
        picture: Name of the picture of the confusion matrix, if there is one beside the card.
    """
    alone, ours = loads_with_timm(loaded), get_arch_name(loaded.arch) in VARIANTS
    evaluations = list(_evaluations(loaded))
    header = ModelCardData(
        library_name="timm" if alone else None,  # a hub shows how to load the model with it
        pipeline_tag="image-classification",
        tags=["image-classification", *(["timm"] if alone else [])],
        model_name=loaded.arch if evaluations else None,
        eval_results=evaluations or None,
    )
    figures, names = _figures(loaded), [escape(name) for name in loaded.class_names or ()]
    confusion = figures.confusion if figures and figures.confusion and len(figures.confusion) == len(names) else None
    imports = "" if alone else "\nimport sequencer\n"
    mode = "L" if loaded.pretrained_cfg["input_size"][0] == 1 else "RGB"
    loading = TIMM_ALONE if alone else NEEDS_THIS_PACKAGE
    card = ModelCard.from_template(
        header,
        template_str=(importlib.resources.files("sequencer.export") / "templates" / "card.md").read_text("utf-8"),
        arch=loaded.arch,
        summary=f"An image classifier{' of the Sequencer family' if ours else ''}: `{loaded.arch}`.",
        details=_details(loaded, names),
        measured_on=f"On {figures.images:,} images of the {SPLITS[figures.split]} split:" if figures else "",
        results=_results(loaded),
        picture=picture,
        class_names=names,
        confusion=list(zip(names, confusion, strict=True)) if confusion else None,
        use=_use(loaded),
        limits=list(_limits(loaded)),
        loading=loading + (" FOLDER is the folder that holds this file." if name == LOCAL else ""),
        usage=USAGE.format(imports=imports, name=name, mode=mode),
        citation=CITATION if ours else "",
    )
    return str(card) + "\n"


def escape(text: object) -> str:
    """Escapes what Markdown and HTML would take for their own in a name."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", printable(text))


def _figures(loaded: LoadedModel) -> KeyFigures | None:
    return KeyFigures(**found) if (found := loaded.about.get("figures")) else None


def _metrics(loaded: LoadedModel) -> Iterator[tuple[str, str, float]]:
    """Yields split, metric and value of the results in `summary.json` that are those of these weights."""
    metrics = loaded.about.get("metrics", {})
    for split, prefix in (("test", "test"), ("val", "val_ema" if loaded.slot == "ema" else "val")):
        for metric in METRICS:
            value = metrics.get(f"{prefix}/{metric}")
            if isinstance(value, int | float) and math.isfinite(value):
                yield split, metric, value


def _evaluations(loaded: LoadedModel) -> Iterator[EvalResult]:
    """Yields the results in the form that a hub reads."""
    data = str((loaded.data or {}).get("name", "unknown"))

    def result(split: str, kind: str, name: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=data,
            dataset_name=data,
            dataset_split=SPLITS[split],
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )

    for split, metric, value in _metrics(loaded):
        yield result(split, *METRICS[metric][:2], value)
    if (figures := _figures(loaded)) and figures.calibration_error is not None:
        yield result(figures.split, *CALIBRATION, figures.calibration_error)


def _results(loaded: LoadedModel) -> list[tuple[str, str, str]]:
    """Returns name, value and note of the results: the key figures, and the metrics that are not among them."""
    figures = _figures(loaded)
    rows = describe_figures(figures) if figures else []
    for split, metric, value in _metrics(loaded):
        if figures and split == figures.split and metric in ("top1", "loss"):
            continue
        _, name, form = METRICS[metric]
        note = "the epoch was chosen on these images" if split == "val" else ""
        rows.append((f"{SPLITS[split]} {name}", format(value, form), note))
    return rows


def _details(loaded: LoadedModel, names: list[str]) -> list[tuple[str, str]]:
    channels, height, width = loaded.pretrained_cfg["input_size"]
    details = {
        "Architecture": loaded.arch,
        "Arguments": printable(", ".join(f"{key}={value}" for key, value in loaded.model_args.items())),
        "Parameters": f"{sum(parameter.numel() for parameter in loaded.model.parameters()):,}",
        "Images": f"{height} x {width} pixels, {channels} channel{'s' * (channels != 1)}",
        "Classes": _list_classes(loaded, names),
        "Weights": "exponential moving average" if loaded.slot == "ema" else "without moving average",
        "Average": f"of {len(averaged)} models" if (averaged := loaded.about.get("averaged")) else "",
        "Data set": _describe_data(loaded),
        "Commit": escape(loaded.about.get("commit") or ""),
        "Made with": escape(", ".join(f"{key} {value}" for key, value in loaded.about.get("versions", {}).items())),
        "Licence": "for the author to state, by `license:` in the header of this file",
    }
    return [(key, value) for key, value in details.items() if value]


def _list_classes(loaded: LoadedModel, names: list[str]) -> str:
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{loaded.model.num_classes}{': ' if names else ''}{', '.join(names[:MOST_NAMES])}{more}"


def _describe_data(loaded: LoadedModel) -> str:
    """Names the data set with the number of images of its splits; empty if it is not known."""
    if not (loaded.data and loaded.data.get("name")):
        return ""
    names = {"train": "training", "val": "validation", "test": "test"}
    images = [f"{number:,} {names.get(name, escape(name))}" for name, number in loaded.about.get("images", {}).items()]
    return escape(loaded.data["name"]) + (f": {_join(images)} images" if images else "")


def _use(loaded: LoadedModel) -> str:
    _, height, width = loaded.pretrained_cfg["input_size"]
    data = (loaded.data or {}).get("name")
    trained = f" It was trained on the data set {escape(data)}." if data else ""
    number = loaded.model.num_classes
    return f"The model assigns an image, seen at {height} x {width} pixels, to one of {number} classes.{trained}"


def _limits(loaded: LoadedModel) -> Iterator[str]:
    config, figures = loaded.about.get("config", {}), _figures(loaded)
    yield (
        "Every image gets one of these classes, also one that shows none of them or several; a high probability does "
        "not say that the image is of a known kind."
    )
    yield (
        "The results hold for images like those of the data set. Other cameras, places, people or preparations can "
        "give worse ones; measure them on images of your own before you rely on the model."
    )
    if figures and figures.split == "val":
        yield (
            "There was no test split: the results are those of the validation images, on which the epoch was chosen, "
            "and are too good by an unknown amount."
        )
    if figures and figures.calibration_error is not None:
        error = 100 * figures.calibration_error
        yield (
            f"Its probabilities differ from the share of right answers by {error:.1f} percentage points on average "
            "(expected calibration error)."
        )
    else:
        yield "Whether its probabilities are calibrated has not been measured."
    if config.get("init_from"):
        yield "Training started from the weights of another model, whose data, licence and limits hold here too."
    yield (
        "It has not been examined for bias between groups of people, for damaged images or for images made to deceive "
        "it. It is not meant for decisions about people, or where a wrong class can do harm, without a person's review."
    )


def _join(parts: Iterable[Any]) -> str:
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last
