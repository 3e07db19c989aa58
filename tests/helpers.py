"""What several test modules share."""

import csv
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

from sequencer.config.schema import DataConfig
from sequencer.export import save_model_folder
from sequencer.models import LoadedModel, create_model, timm_preprocessing

SCRIPTS = Path(__file__).parents[1] / "scripts"
ARGS = {"layers": [1], "patch_sizes": [2], "embed_dims": [16], "hidden_sizes": [4]}  # of a model small enough for tests
DIGITS = DataConfig(
    name="digits",
    num_classes=10,
    in_chans=1,
    img_size=8,
    mean=[0.3],
    std=[0.4],
    default_model="sequencer2d_t_8",
    num_workers=0,
)

# overrides of a run of two short epochs, which takes about a second
SMALL = [
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "optim.warmup_epochs=0",
    "trainer.limit_train_batches=4",
    "trainer.enable_progress_bar=false",
    "data.num_workers=0",
    "data.batch_size=32",
]
SMALL_MODEL = "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}"


def save_run(folder: Path, data: DataConfig, class_names: list[str], **entries) -> Path:
    """Writes the files of a run folder that evaluation reads: untrained weights and the configuration.

    The head is drawn at random, because a new head is zero. `entries` are added to the data section.
    """
    torch.manual_seed(0)
    size = {"in_chans": data.in_chans, "img_size": data.img_size}
    model = create_model("sequencer2d_t_8", num_classes=len(class_names), **size, **ARGS)
    torch.nn.init.normal_(model.get_classifier().weight)
    about = {"config": {"data": asdict(data) | entries}}
    cfg = timm_preprocessing(asdict(data))
    loaded = LoadedModel(model, "sequencer2d_t_8", "raw", tuple(class_names), cfg, size | ARGS, about)
    save_model_folder(loaded, folder / "model")
    (folder / "config.yaml").touch()
    return folder


def exit_code(script: ModuleType, arguments: list[str]) -> int:
    """The exit code of a script, whether its work or argparse ends it."""
    try:
        return script.main(arguments)
    except SystemExit as error:
        return error.code


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
