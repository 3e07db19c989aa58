"""The paper's recipes: their values, and a few updates of each with a small model on a small set of the same layout."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from torchvision import datasets

from sequencer.config import Config, compose
from sequencer.config.command import parse_command
from sequencer.config.errors import RequestError
from sequencer.config.schema import leaves
from sequencer.config.sources import Sources
from sequencer.data import open_split
from sequencer.measure import measurement, plan
from sequencer.models import create_model
from sequencer.training import run

pytestmark = pytest.mark.usefixtures("unrendered")
TINY = {"layers": [1], "patch_sizes": [14], "embed_dims": [16], "hidden_sizes": [4]}
SHORT = [
    "model.kwargs={layers: [1], patch_sizes: [14], embed_dims: [16], hidden_sizes: [4]}",
    "data.batch_size=4",
    "data.eval_batch_size=8",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "trainer.max_epochs=1",
    "logger.report=false",
    "optim.warmup_epochs=0.25",
    "optim.cooldown_epochs=0",
]
IMAGENET = ["imagenet_s", "imagenet_m", "imagenet_l", "imagenet_l_392"]
TRANSFER = ["transfer_cifar10", "transfer_cifar100", "transfer_flowers102", "transfer_stanford_cars"]

# options of timm's train.py that the README and the defaults of the paper's repository give; `devices` is the number
# of processes, each with `batch-size` images
REPOSITORY = {
    "imagenet_s": "devices=8 batch-size=256 epochs=300 cooldown-epochs=10 warmup-epochs=20 warmup-lr=1e-6 lr=2e-3"
    " opt=adamw weight-decay=0.05 sched=cosine drop-path=0.1 aa=rand-m9-mstd0.5-inc1 reprob=0.25 smoothing=0.1"
    " mixup=0.8 cutmix=1.0 clip-grad=None img-size=224 crop-pct=0.875 interpolation=bicubic",
    "imagenet_l_392": "devices=8 batch-size=64 epochs=30 cooldown-epochs=0 warmup-epochs=0 lr=5e-5 opt=adamw"
    " weight-decay=1e-8 drop-path=0.4 img-size=392 crop-pct=1.0 clip-grad=None",
    "transfer_cifar10": "devices=4 batch-size=128 epochs=200 cooldown-epochs=0 warmup-epochs=5 warmup-lr=1e-6 lr=1e-4"
    " opt=adamw weight-decay=1e-4 drop-path=0.1 reprob=0 clip-grad=1 img-size=224",
}


def as_options(config: Config, devices: int) -> dict[str, object]:
    """A configuration in the options of timm's train.py."""
    augment, optim, data = config.data.augment, config.optim, config.data
    return {
        "devices": devices,
        "batch-size": data.batch_size / devices,
        "epochs": config.trainer.max_epochs - optim.cooldown_epochs,
        "cooldown-epochs": optim.cooldown_epochs,
        "warmup-epochs": optim.warmup_epochs,
        "warmup-lr": optim.warmup_lr,
        "lr": optim.lr,
        "opt": optim.opt,
        "weight-decay": optim.weight_decay,
        "sched": optim.sched,
        "drop-path": config.model.drop_path_rate,
        "aa": augment.auto_augment,
        "reprob": augment.reprob,
        "smoothing": augment.smoothing,
        "mixup": augment.mixup,
        "cutmix": augment.cutmix,
        "clip-grad": config.trainer.gradient_clip_val,
        "img-size": data.img_size,
        "crop-pct": data.crop_pct,
        "interpolation": data.interpolation,
    }


@pytest.mark.parametrize("name", REPOSITORY)
def test_options_of_the_repository(name):
    expected = dict(option.split("=") for option in REPOSITORY[name].split())
    found = as_options(compose([f"experiment={name}"]), int(expected["devices"]))
    for option, text in expected.items():
        value = found[option]
        assert (float(text) if isinstance(value, int | float) else text) == (value if value is not None else "None")


def differing(first: str, second: str) -> set[str]:
    """The keys in which two recipes differ."""
    one, other = (leaves(dataclasses.asdict(compose([f"experiment={name}"]))) for name in (first, second))
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} - {"name", "run_dir"}


@pytest.mark.parametrize("name", ["imagenet_m", "imagenet_l"])
def test_larger_models_train_as_the_small_one(name):
    """They differ from S in the model, its drop path and the batch, and by the paper's rule in the learning rate."""
    expected = {"model.name", "model.drop_path_rate", "data.batch_size", "optim.lr"}
    assert differing("imagenet_s", name) == expected
    config = compose([f"experiment={name}"])
    assert config.model.name == name.replace("imagenet", "sequencer2d")
    assert config.optim.lr == pytest.approx(5e-4 * config.data.batch_size / 512)


@pytest.mark.parametrize("name", TRANSFER[1:])
def test_other_sets_are_fine_tuned_as_cifar10(name):
    """They differ in the set, how it is split, and a crop that is the default of the set."""
    found = {key for key in differing("transfer_cifar10", name) if not key.startswith("data.")}
    assert found <= {"model.num_classes"}
    config, cifar10 = (compose([f"experiment={recipe}"]).data for recipe in (name, TRANSFER[0]))
    assert dataclasses.replace(config.augment, crop_padding=0) == cifar10.augment
    assert (config.mean, config.std, config.img_size) == (cifar10.mean, cifar10.std, cifar10.img_size)


@pytest.mark.parametrize("name", IMAGENET + TRANSFER)
def test_unverified_values_are_named(name):
    assert ("# Unverified: " in Path(f"conf/experiment/{name}.yaml").read_text()) == (name != "imagenet_s")
    config = compose([f"experiment={name}"])
    assert (config.init_from is None) == (name in ("imagenet_s", "imagenet_m", "imagenet_l"))


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
    for (images, path), copies in zip(lists.items(), (10, 1), strict=True):
        first = photograph(folder / images / "00000.jpg", 0)
        rows = []
        for index in range(196 * copies):
            name = f"{index:05}.jpg"
            if index:
                (folder / images / name).hardlink_to(first)
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


# M and L differ from S in numbers only
@pytest.mark.parametrize("name", ["imagenet_s", "imagenet_l_392", *TRANSFER])
def test_a_few_updates(name, made, tmp_path):
    arguments = [f"experiment={name}", f"run_dir={tmp_path / 'run'}", *SHORT]
    whole = compose([f"experiment={name}"])
    arguments += [f"data.root={made(whole.data.name)}"]
    if whole.init_from:  # weights of the same small model, at 224 px for 1,000 classes
        torch.manual_seed(0)
        weights = create_model("sequencer2d_s", **TINY).state_dict()
        save_file(weights, tmp_path / "published.safetensors")
        arguments += [f"init_from={tmp_path / 'published.safetensors'}"]
    summary = run(compose(arguments))
    assert summary["updates"] == 4
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert np.isfinite(float(row["train/loss"]))
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert ("test/top1" in summary) == (whole.data.name != "imagenet")


def test_flowers_have_three_splits(made):
    config = compose(["data=flowers102", f"data.root={made('flowers102')}"]).data
    splits = {name: open_split(config, name, lambda image: image) for name in ("train", "val", "test")}
    assert {name: len(images) for name, images in splits.items()} == {"train": 204, "val": 102, "test": 102}
    assert splits["train"].class_names[0] == "pink primrose"
    image, label = splits["val"][3]
    assert (image.mode, label, splits["val"].ids[3]) == ("RGB", 3, "flowers-102/jpg/image_00208.jpg")
    assert not set(splits["train"].ids) & set(splits["test"].ids)


def test_a_tenth_of_the_training_images_of_cars_validates(made):
    config = compose(["data=stanford_cars", f"data.root={made('stanford_cars')}"]).data
    splits = {name: open_split(config, name, lambda image: image) for name in ("train", "val", "test")}
    assert {name: len(images) for name, images in splits.items()} == {"train": 1764, "val": 196, "test": 196}
    assert sorted(splits["val"].labels) == list(range(196))
    assert splits["test"].class_names[195] == "car 195"
    assert splits["test"][5][1] == 5
    assert config.num_classes == 196


@pytest.mark.parametrize(
    ("name", "what"), [("flowers102", "flowers-102/jpg"), ("stanford_cars", "stanford_cars/devkit")]
)
def test_missing_set(name, what, tmp_path):
    config = compose([f"data={name}", f"data.root={tmp_path}"]).data
    with pytest.raises(RequestError, match=what) as error:
        open_split(config, "train", lambda image: image)
    assert len(str(error.value).splitlines()) == 2


def test_plan_of_a_recipe(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measurement, "SECONDS", 0.05)
    name = "transfer_flowers102"
    whole = compose([f"experiment={name}"])
    arguments = [f"experiment={name}", f"run_dir={tmp_path / 'run'}", *SHORT, f"data.root={made(whole.data.name)}"]
    arguments += ["init_from=null", "trainer.limit_train_batches=2", f"trainer.max_epochs={whole.trainer.max_epochs}"]
    found = plan(compose(arguments), Sources(parse_command(arguments)))
    assert found.updates == 2 * whole.trainer.max_epochs
    assert f"conf/experiment/{name}.yaml" in capsys.readouterr().out
    assert found.problems == []
    assert not (tmp_path / "run").exists()
