"""scripts/analyze.py robustness: tables, files, resumption and exit codes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from sequencer.analysis import natural
from sequencer.config import DataConfig
from tests.helpers import DIGITS, exit_code, read_csv, save_run

IMAGENET = DataConfig(name="imagenet", num_classes=1000, img_size=8, num_workers=0, mean=[0.5], std=[0.2])
SYNSETS = ImageNetInfo("imagenet-1k").label_names()


@pytest.fixture
def script(load_script):
    return load_script("analyze")


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", DIGITS, list("0123456789"))


@pytest.fixture
def imagenet_run(tmp_path):
    return save_run(tmp_path / "run", IMAGENET, SYNSETS)


def save_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(256, size=(8, 8, 3), dtype=np.uint8)).save(path, "PNG")


def test_corruptions_are_computed_once(script, run_folder, capsys, monkeypatch):
    from sequencer.analysis import robustness

    command = ["robustness", str(run_folder), "--limit", "6", "--num-workers", "0", "--batch-size", "6"]
    folder = run_folder / "analysis"
    calls = []
    predict = robustness.predict_classes

    def counted(classify, loader, device, description):
        calls.append(description)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return predict(classify, loader, device, description)

    monkeypatch.setattr(robustness, "predict_classes", counted)
    assert exit_code(script, command) == 1
    assert list(json.loads((folder / "robustness.json").read_text())["pieces"]) == [
        "clean",
        "cifar gaussian_noise 1",
        "cifar gaussian_noise 2",
    ]
    assert exit_code(script, command) == 0
    assert len(calls) == 4 + 68
    assert calls[:5] == [
        "clean (1 of 71)",
        "cifar gaussian_noise 1 (2 of 71)",
        "cifar gaussian_noise 2 (3 of 71)",
        "cifar gaussian_noise 3 (4 of 71)",
        "cifar gaussian_noise 3 (1 of 68)",
    ]
    capsys.readouterr()
    assert exit_code(script, command) == 0
    assert len(calls) == 4 + 68
    shown = capsys.readouterr().out
    rows = read_csv(folder / "robustness.csv")
    assert len(rows) == 71
    assert {row["images"] for row in rows} == {"6"}
    mean = np.mean([float(row["top1"]) for row in rows[1:]])
    assert f"mean over corruptions and severities: {mean:.2%}\n" in shown
    assert "\nfrost is left out: it needs photographs that are not part of this package\n" in shown
    with Image.open(folder / "robustness.png") as picture:
        assert picture.width > 1000
    assert exit_code(script, [*command[:2], "--limit", "5"]) == 2
    error = capsys.readouterr().err
    assert "robustness.json holds other results: images (6 images " in error
    assert error.endswith("\nname another folder with --output\n")
    assert exit_code(script, [*command, "--seed", "1"]) == 2
    assert "holds other results: seed (0 there, 1 here)" in capsys.readouterr().err


def test_attacks_are_added_to_what_is_there(script, run_folder, capsys):
    pytest.importorskip("captum")
    command = ["robustness", str(run_folder), "--corruptions", "none", "--num-workers", "0", "--batch-size", "100"]
    assert exit_code(script, command) == 0
    assert exit_code(script, [*command, "--attacks", "pgd,fgsm"]) == 0
    rows = {row["piece"]: float(row["top1"]) for row in read_csv(run_folder / "analysis" / "robustness.csv")}
    assert list(rows) == ["clean", "pgd", "fgsm"]
    assert rows["clean"] > rows["fgsm"]
    assert rows["clean"] > rows["pgd"]
    assert f"PGD     {rows['pgd']:.2%}\n" in capsys.readouterr().out


def test_stored_arrays(script, run_folder, tmp_path, capsys):
    stored = tmp_path / "CIFAR-10-C"
    stored.mkdir()
    generator = np.random.RandomState(0)
    np.save(stored / "frost.npy", generator.randint(256, size=(10, 8, 8, 3), dtype=np.uint8))
    np.save(stored / "labels.npy", np.arange(10, dtype=np.uint8))
    command = ["robustness", str(run_folder), "--stored", str(stored), "--num-workers", "0", "--batch-size", "100"]
    assert exit_code(script, command) == 0
    rows = read_csv(run_folder / "analysis" / "robustness.csv")
    assert [(row["piece"], row["images"]) for row in rows[1:]] == [(f"stored frost {k}", "2") for k in range(1, 6)]
    assert "frost is left out" not in capsys.readouterr().out
    (stored / "labels.npy").unlink()
    assert exit_code(script, [*command, "--output", str(tmp_path / "other")]) == 2
    assert "labels.npy: " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attacks", "cw"], "argument --attacks: cw is none of fgsm, pgd"),
        (["--stored", "x", "--corruptions", "cifar"], "--stored and --corruptions cifar: give one of them"),
        (["--stored", "x"], "--stored x: there is no array such as gaussian_noise.npy"),
        (["--clean-root", "x"], "--clean-root goes with --variant"),
        (["--variant", "a"], "--variant a needs --data-root, the folder of its classes"),
        (["--variant", "a", "--data-root", "x", "--attacks", "fgsm"], "--attacks does not go with --variant"),
        (["--variant", "a", "--data-root", "x"], "--variant needs a model of the 1,000 classes of ImageNet"),
    ],
)
def test_wrong_requests(options, message, script, run_folder, capsys):
    assert exit_code(script, ["robustness", str(run_folder), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (run_folder / "analysis").exists()


@pytest.mark.parametrize(
    ("options", "package"),
    [(["--attacks", "fgsm"], "captum"), (["--corruptions", "imagenet"], "imagecorruptions-imaug")],
)
def test_missing_packages(options, package, script, run_folder, capsys, monkeypatch):
    import _cli

    monkeypatch.setattr(_cli, "find_spec", lambda name: None)
    assert exit_code(script, ["robustness", str(run_folder), *options]) == 2
    assert f"needs {package}: python -m pip install {package}\n" in capsys.readouterr().err


def test_masks_of_200_classes(script, imagenet_run, tmp_path, capsys):
    """Predictions are among the classes of the set, and the clean images are of these classes only."""
    chosen = list(range(3, 1000, 5))[:200]
    for index in chosen:
        save_image(tmp_path / "a" / SYNSETS[index] / "1.png", index)
    for index in (*chosen[:7], 4, 6):
        save_image(tmp_path / "val" / SYNSETS[index] / "1.png", 1000 + index)
    command = ["robustness", str(imagenet_run), "--variant", "a", "--data-root", str(tmp_path / "a")]
    command += ["--clean-root", str(tmp_path), "--batch-size", "100", "--num-workers", "0"]
    assert exit_code(script, command) == 0
    rows = read_csv(imagenet_run / "analysis" / "robustness.csv")
    assert [(row["piece"], row["images"]) for row in rows] == [
        ("a clean, same 200 classes", "7"),
        ("a ImageNet-A", "200"),
    ]
    from sequencer.data import eval_transform, read_image
    from sequencer.models import load_model

    model = load_model(imagenet_run).model
    images = [eval_transform(IMAGENET)(read_image(tmp_path / "a" / SYNSETS[i] / "1.png")) for i in chosen]
    with torch.inference_mode():
        logits = model(torch.stack(images))
    hits = sum(chosen[k] == i for k, i in zip(logits[:, chosen].argmax(dim=1).tolist(), chosen, strict=True))
    assert rows[1]["hits"] == str(hits)
    assert "clean, same 200 classes" in capsys.readouterr().out
    (tmp_path / "a" / SYNSETS[3]).rename(tmp_path / "a" / "n00000000")
    assert exit_code(script, command) == 2
    assert "n00000000 is neither a synset of ImageNet-1k nor an index of a class" in capsys.readouterr().err
    (tmp_path / "a" / "n00000000").rename(tmp_path / "away")
    assert exit_code(script, command) == 2
    assert "/a: it has 199 classes, not 200" in capsys.readouterr().err


def test_labels_of_real(script, imagenet_run, tmp_path, capsys, monkeypatch):
    """The first image of the validation set has no label of ReaL, the second has 970 and 795."""
    monkeypatch.setitem(natural.VARIANTS, "real", natural.Variant("ImageNet, ReaL labels", 2))
    for number, index in ((1, 970), (2, 795)):
        save_image(tmp_path / "val" / SYNSETS[index] / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    command = ["robustness", str(imagenet_run), "--variant", "real", "--data-root", str(tmp_path / "val")]
    assert exit_code(script, [*command, "--num-workers", "0"]) == 0
    rows = {row["piece"]: row for row in read_csv(imagenet_run / "analysis" / "robustness.csv")}
    # predictions are among 795 and 970, both of which are right
    assert rows["real ImageNet, ReaL labels"]["images"] == "1"
    assert rows["real ImageNet, ReaL labels"]["hits"] == "1"
    assert rows["real clean, same 2 classes"]["images"] == "2"
    save_image(tmp_path / "val" / SYNSETS[795] / "other.png", 3)
    assert exit_code(script, command) == 2
    assert "other.png is not named as in ImageNet's validation set" in capsys.readouterr().err


def test_folders_of_imagenet_v2_are_indices():
    assert natural.class_indices(["10", "9", SYNSETS[7]]) == [10, 9, 7]
