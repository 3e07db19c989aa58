"""Small runs on the digits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sequencer.config.request import compose, to_config
from sequencer.config.schema import Config

# two short epochs of a network that learns nothing worth knowing, in about a second
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


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """`config(*overrides, run_dir="run")` composes a small run on the digits into `tmp_path / run_dir`."""

    def build(*overrides: str, run_dir: str = "run") -> Config:
        model = [] if any(override.startswith("model.name=") for override in overrides) else [SMALL_MODEL]
        return to_config(compose([*SMALL, *model, f"run_dir={tmp_path / run_dir}", *overrides]))

    return build
