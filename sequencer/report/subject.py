"""A finished run as the page shows it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sequencer.config.schema import Config
from sequencer.data import Split, eval_transform, has_test_split, open_split, train_transform
from sequencer.evaluation import Collector, evaluate
from sequencer.machine import describe_device
from sequencer.models import LoadedModel
from sequencer.report.results import Results, examine

ORIGIN = "origin.json"  # in a run folder: the command, and the source of each value


@dataclass(frozen=True)
class Subject:
    """A finished run, as the page shows it."""

    config: Config
    summary: dict[str, Any]  # of `summary.json`
    origin: dict[str, Any]  # of `origin.json`; empty if there is none
    facts: dict[str, str]  # commit, versions and hardware
    model: nn.Module  # in eval mode, on `device`
    device: torch.device
    split_name: Literal["val", "test"]
    split: Split  # the images that the model was evaluated on
    train: Split  # with the transforms of training


def make_subject(
    config: Config,
    summary: dict[str, Any],
    loaded: LoadedModel,
    device: torch.device,
    run_dir: Path,
    split_name: Literal["val", "test"],
    split: Split,
    train: Split,
) -> Subject:
    """Gathers what the page of a run shows; moves the model to `device`."""
    about = loaded.about
    facts = {
        "commit": about.get("commit") or "not known",
        "versions": ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items()),
        "evaluated on": describe_device(device),
    }
    model = loaded.model.to(device).eval()
    return Subject(config, summary, read_origin(run_dir), facts, model, device, split_name, split, train)


def open_subject(
    config: Config, summary: dict[str, Any], loaded: LoadedModel, device: torch.device, run_dir: Path
) -> tuple[Subject, Results]:
    """Opens the data of a finished run and evaluates its model for its page.

    Args:
        config: Of the run.
        summary: The content of its `summary.json`.
        loaded: Its model.
        device: Where the model is evaluated.
        run_dir: Its folder.

    Raises:
        RequestError: A split is missing.
    """
    name: Literal["val", "test"] = "test" if has_test_split(config.data) else "val"
    split = open_split(config.data, name, eval_transform(config.data))
    train = open_split(config.data, "train", train_transform(config.data))
    subject = make_subject(config, summary, loaded, device, run_dir, name, split, train)
    collector = Collector(len(split), len(split.class_names))
    evaluate(subject.model, split.evaluation_loader(config.data), len(split.class_names), device, collector=collector)
    return subject, examine(subject.model, name, collector.predictions(), loaded.pretrained_cfg["input_size"])


def read_origin(run_dir: Path) -> dict[str, Any]:
    """Reads `origin.json` of a run; empty if there is none that can be read."""
    try:
        content = json.loads((run_dir / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
