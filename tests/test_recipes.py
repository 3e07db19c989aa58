"""The paper's recipes: twenty updates of each, with a small model on a small set of the same layout."""

import csv
import importlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from torchvision import datasets

from sequencer.config.errors import RequestError
from sequencer.config.request import compose, to_config
from sequencer.config.sources import Sources
from sequencer.data import open_split
from sequencer.models import create_model
from sequencer.training import plan, run

TINY = {"layers": [1], "patch_sizes": [14], "embed_dims": [16], "hidden_sizes": [4]}
SHORT = [
    "model.kwargs={layers: [1], patch_sizes: [14], embed_dims: [16], hidden_sizes: [4]}",
    "data.batch_size=4",
    "data.eval_batch_size=8",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.limit_train_batches=20",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "trainer.max_epochs=1",
    "optim.warmup_epochs=0.25",
    "optim.cooldown_epochs=0",
]

# what the papers' table says: images a batch, peak rate, decay, epochs in all, warm-up, drop path, image size
VALUES = {
    "imagenet_s": (2048, 2e-3, 0.05, 310, 20, 0.1, 224),
    "imagenet_m": (1536, 1.5e-3, 0.05, 310, 20, 0.2, 224),
    "imagenet_l": (1024, 1e-3, 0.05, 310, 20, 0.4, 224),
    "imagenet_l_392": (512, 5e-5, 1e-8, 30, 0, 0.4, 392),
    "transfer_cifar10": (512, 1e-4, 1e-4, 200, 5, 0.1, 224),
    "transfer_cifar100": (512, 1e-4, 1e-4, 200, 5, 0.1, 224),
    "transfer_flowers102": (512, 1e-4, 1e-4, 200, 5, 0.1, 224),
    "transfer_stanford_cars": (512, 1e-4, 1e-4, 200, 5, 0.1, 224),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    config = to_config(compose([f"experiment={name}"]))
    found = (
        config.data.batch_size,
        config.optim.lr,
        config.optim.weight_decay,
        config.trainer.max_epochs,
        config.optim.warmup_epochs,
        config.model.drop_path_rate,
        config.model.img_size,
    )
    assert found == VALUES[name]
    assert config.optim.opt == "adamw"
    assert config.optim.ema_decay is None
    assert config.data.augment.auto_augment == "rand-m9-mstd0.5-inc1"
    assert config.data.augment.reprob == (0.25 if name.startswith("imagenet") else 0)
    assert config.trainer.gradient_clip_val == (1.0 if name.startswith("transfer") else None)
    assert (config.init_from is None) == (name in ("imagenet_s", "imagenet_m", "imagenet_l"))
    text = Path(f"conf/experiment/{name}.yaml").read_text()
    assert ("# Unverified: " in text) == (name != "imagenet_s")


def photograph(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    Image.fromarray(random.randint(256, size=(20 + seed % 3, 24, 3), dtype=np.uint8)).save(path)
    return path


def imagenet(root: Path) -> None:
    for index in range(1000):
        path = photograph(root / "train" / f"n{index:08}" / "0.jpg", index)
        other = root / "val" / f"n{index:08}" / "0.jpg"
        other.parent.mkdir(parents=True)
        other.hardlink_to(path)


def flowers102(root: Path) -> None:
    """Two images a class to train, one to validate, one to test."""
    folder = root / "flowers-102"
    labels = np.tile(np.arange(1, 103), 4)
    for index in range(len(labels)):
        photograph(folder / "jpg" / f"image_{index + 1:05}.jpg", index)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    ids = np.arange(1, len(labels) + 1)
    savemat(folder / "setid.mat", {"trnid": ids[:204], "valid": ids[204:306], "tstid": ids[306:]})


def stanford_cars(root: Path) -> None:
    """Ten images a class to train, of which one validates; one to test."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([f"car {k}" for k in range(196)], object)})
    lists = {"cars_train": folder / "devkit" / "cars_train_annos.mat"}
    lists["cars_test"] = folder / "cars_test_annos_withlabels.mat"
    for (part, path), copies in zip(lists.items(), (10, 1), strict=True):
        first = photograph(folder / part / "00000.jpg", 0)
        rows = []
        for index in range(196 * copies):
            name = f"{index:05}.jpg"
            if index:
                (folder / part / name).hardlink_to(first)
            rows.append((name, index % 196 + 1))
        savemat(path, {"annotations": np.array(rows, dtype=[("fname", object), ("class", np.uint8)])})


MAKERS = {"imagenet": imagenet, "flowers102": flowers102, "stanford_cars": stanford_cars}


@pytest.fixture
def made(tmp_path, monkeypatch, request):
    """`made(name)` is the root of a small set of the layout of that name."""

    def make(name: str) -> Path:
        if name.startswith("cifar"):
            return request.getfixturevalue("made_root")
        monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: self._images_folder.is_dir())
        MAKERS[name](tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", VALUES)
def test_twenty_updates(name, made, tmp_path):
    arguments = [f"experiment={name}", f"run_dir={tmp_path / 'run'}", *SHORT]
    whole = to_config(compose([f"experiment={name}"]))
    arguments += [f"data.root={made(whole.data.name)}"]
    if whole.init_from:  # weights of the same small model, at 224 px for 1,000 classes
        torch.manual_seed(0)
        weights = create_model("sequencer2d_s", **TINY).state_dict()
        save_file(weights, tmp_path / "published.safetensors")
        arguments += [f"init_from={tmp_path / 'published.safetensors'}"]
    summary = run(to_config(compose(arguments)))
    assert summary["updates"] == 20
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert np.isfinite(float(row["train/loss"]))
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert ("test/top1" in summary) == (whole.data.name != "imagenet")


def test_flowers_have_three_parts_of_their_own(made):
    config = to_config(compose(["data=flowers102", f"data.root={made('flowers102')}"])).data
    parts = {part: open_split(config, part, lambda image: image) for part in ("train", "val", "test")}
    assert {part: len(images) for part, images in parts.items()} == {"train": 204, "val": 102, "test": 102}
    assert parts["train"].class_names[0] == "pink primrose"
    image, label = parts["val"][3]
    assert (image.mode, label, parts["val"].ids[3]) == ("RGB", 3, "flowers-102/jpg/image_00208.jpg")
    assert not set(parts["train"].ids) & set(parts["test"].ids)


def test_cars_give_a_tenth_of_their_training_images(made):
    config = to_config(compose(["data=stanford_cars", f"data.root={made('stanford_cars')}"])).data
    parts = {part: open_split(config, part, lambda image: image) for part in ("train", "val", "test")}
    assert {part: len(images) for part, images in parts.items()} == {"train": 1764, "val": 196, "test": 196}
    assert sorted(parts["val"].labels) == list(range(196))
    assert parts["test"].class_names[195] == "car 195"
    assert parts["test"][5][1] == 5
    assert asdict(config)["num_classes"] == 196


@pytest.mark.parametrize(
    ("name", "what"), [("flowers102", "flowers-102/jpg"), ("stanford_cars", "stanford_cars/devkit")]
)
def test_a_set_that_is_not_there(name, what, tmp_path):
    config = to_config(compose([f"data={name}", f"data.root={tmp_path}"])).data
    with pytest.raises(RequestError, match=what) as error:
        open_split(config, "train", lambda image: image)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("name", VALUES)
def test_the_plan_of_a_recipe(name, made, tmp_path, monkeypatch, capsys):
    # the package's name `plan` is the function
    monkeypatch.setattr(importlib.import_module("sequencer.measure.plan"), "SECONDS", 0.05)
    whole = to_config(compose([f"experiment={name}"]))
    arguments = [f"experiment={name}", f"run_dir={tmp_path / 'run'}", *SHORT, f"data.root={made(whole.data.name)}"]
    arguments += ["init_from=null", "trainer.limit_train_batches=2", f"trainer.max_epochs={whole.trainer.max_epochs}"]
    found = plan(to_config(compose(arguments)), Sources(arguments))
    printed = capsys.readouterr().out
    assert found.updates == 2 * whole.trainer.max_epochs
    assert f"conf/experiment/{name}.yaml" in printed
    assert "forecast: " in printed
    assert found.problems == []
    assert not (tmp_path / "run").exists()
