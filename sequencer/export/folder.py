"""The model folder, in timm's hub layout (`config.json` and `model.safetensors`), and its upload to a hub."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import push_to_hf_hub, save_for_hf

from sequencer.export.description import model_card
from sequencer.files import finite, writing
from sequencer.models import PREPROCESSING, LoadedModel


def save_model_folder(loaded: LoadedModel, folder: Path) -> None:
    """Writes a model folder. An existing folder is replaced after the new one is complete.

    Args:
        loaded: The model, on the CPU.
        folder: The folder, which need not exist.

    Raises:
        WriteError: The folder cannot be written; an existing one is unchanged.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write_model_folder(loaded, partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_model_folder(loaded: LoadedModel, folder: Path) -> None:
    """Writes a model folder's files into `folder`, which is created if it does not exist."""
    save_for_hf(loaded.model, str(folder), safe_serialization=True, **_configuration(loaded))


def push(loaded: LoadedModel, repo_id: str) -> str:
    """Uploads a model folder to a hub by timm's own function. An existing model card is kept.

    Args:
        loaded: The model, on the CPU.
        repo_id: `ORG/NAME`.

    Returns:
        The address of the repository.

    Raises:
        OSError: The hub cannot be reached or refuses the upload.
        ValueError: The name of the repository is not valid.
    """
    card = model_card(loaded, f"hf-hub:{repo_id}")
    commit = push_to_hf_hub(loaded.model, repo_id, model_card=card, safe_serialization=True, **_configuration(loaded))
    return str(commit.repo_url)


def _configuration(loaded: LoadedModel) -> dict[str, Any]:
    """Returns the arguments of timm's functions that write `config.json`.

    This package's own entries are at the top level, because timm rejects unknown keys inside `pretrained_cfg`. Numbers
    that are not finite become null, because timm would write them as JSON that only Python reads.
    """
    cfg = {key: loaded.pretrained_cfg[key] for key in PREPROCESSING}
    config = {"pretrained_cfg": cfg, "slot": loaded.slot} | loaded.about
    if loaded.class_names:
        config["label_names"] = list(loaded.class_names)
    return finite({"model_config": config, "model_args": loaded.model_args})
