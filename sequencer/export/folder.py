"""The model folder: timm's hub layout, `config.json` and `model.safetensors`; and its way to a hub."""

import shutil
from pathlib import Path
from typing import Any

from timm.models import push_to_hf_hub, save_for_hf

from sequencer.export.describe import model_card
from sequencer.models import PREPROCESSING, LoadedModel


def save_model_folder(loaded: LoadedModel, folder: Path) -> None:
    """Writes `folder`, replacing an older one only when the new one is complete. The model is on the CPU."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_model_folder(loaded, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_model_folder(loaded: LoadedModel, folder: Path) -> None:
    save_for_hf(loaded.model, str(folder), safe_serialization=True, **_configuration(loaded))


def push(loaded: LoadedModel, repo_id: str) -> str:
    """Uploads the model folder, with a card where there is none yet, through timm; returns its address.

    Raises:
        OSError, ValueError: of the hub's client.
    """
    card = model_card(loaded, f"hf-hub:{repo_id}")
    commit = push_to_hf_hub(loaded.model, repo_id, model_card=card, safe_serialization=True, **_configuration(loaded))
    return str(commit.repo_url)


def _configuration(loaded: LoadedModel) -> dict[str, Any]:
    """Arguments of timm's writers. Our entries stand on the top level of `config.json`, because timm refuses a key
    inside `pretrained_cfg` that it does not know.
    """
    cfg = {key: loaded.pretrained_cfg[key] for key in PREPROCESSING}
    config = {"pretrained_cfg": cfg, "slot": loaded.slot} | loaded.about
    if loaded.class_names:
        config["label_names"] = list(loaded.class_names)
    return {"model_config": config, "model_args": loaded.model_args}
