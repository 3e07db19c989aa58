"""The model folder, in timm's hub layout with a model card, and its upload to a hub."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from timm.models import save_for_hf

import sequencer
from sequencer.export.card import LOCAL, model_card
from sequencer.files import apply_umask, finite, writing
from sequencer.models import PREPROCESSING, LoadedModel

CARD = "README.md"
CONFUSION = "confusion.png"
UPLOADED = (CARD, CONFUSION, "config.json", "model.safetensors")


def save_model_folder(loaded: LoadedModel, folder: Path, confusion: Path | None = None) -> None:
    """Writes a model folder. An existing folder is replaced after the new one is complete.

    Args:
        loaded: The model, on the CPU.
        folder: The folder, which need not exist.
        confusion: A picture of the confusion matrix for the model card, if there is one.

    Raises:
        WriteError: The folder cannot be written; an existing one is unchanged.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write_model_folder(loaded, partial, confusion=confusion)
            for path in partial.iterdir():
                apply_umask(path)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_model_folder(loaded: LoadedModel, folder: Path, name: str = LOCAL, confusion: Path | None = None) -> None:
    """Writes a model folder's files into `folder`, which is created if it does not exist.

    Args:
        loaded: The model, on the CPU.
        folder: The folder.
        name: The name by which `timm.create_model` loads the folder, for the model card.
        confusion: A picture of the confusion matrix for the model card, if there is one.
    """
    save_for_hf(loaded.model, str(folder), safe_serialization=True, **_configuration(loaded))
    if confusion is not None:
        shutil.copyfile(confusion, folder / CONFUSION)
    text = model_card(loaded, name, CONFUSION if confusion is not None else None)
    (folder / CARD).write_text(text, encoding="utf-8")


def confusion_of(loaded: LoadedModel) -> Path | None:
    """Returns the picture of the confusion matrix in the model folder that a model was loaded from, if there is one."""
    path = Path(loaded.source).with_name(CONFUSION) if loaded.source.endswith("config.json") else None
    return path if path is not None and path.is_file() else None


def push(folder: Path, repo_id: str) -> str:
    """Uploads an exported model folder to a hub. An existing model card is kept, with its picture.

    Args:
        folder: The folder, with its model card; other files in it are left out.
        repo_id: `ORG/NAME`.

    Returns:
        The address of the repository.

    Raises:
        OSError: The hub cannot be reached or refuses the upload.
        ValueError: The name of the repository is not valid.
    """
    hub = HfApi(library_name="sequencer", library_version=sequencer.__version__)
    address = hub.create_repo(repo_id, exist_ok=True)
    kept = [CARD, CONFUSION] if hub.file_exists(address.repo_id, CARD) else []
    hub.upload_folder(
        repo_id=address.repo_id,
        folder_path=folder,
        allow_patterns=[name for name in UPLOADED if name not in kept],
        commit_message="Add model",
    )
    return str(address)


def _configuration(loaded: LoadedModel) -> dict[str, Any]:
    """Returns the arguments of timm's function that writes `config.json`.

    This package's own entries are at the top level, because timm rejects unknown keys inside `pretrained_cfg`. Numbers
    that are not finite become null, because timm would write them as JSON that only Python reads.
    """
    cfg = {key: loaded.pretrained_cfg[key] for key in PREPROCESSING}
    config = {"pretrained_cfg": cfg, "slot": loaded.slot} | loaded.about
    if loaded.class_names:
        config["label_names"] = list(loaded.class_names)
    return finite({"model_config": config, "model_args": loaded.model_args})
