"""scripts/evaluate.py: what it prints and writes, and how it ends."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sequencer.config.schema import DataConfig
from sequencer.data import eval_transform, open_split
from sequencer.export import save_model_folder
from sequencer.models import LoadedModel, create_model, load_model, preprocessing

SCRIPTS = Path(__file__).parents[1] / "scripts"
ARGS = {"layers": [1], "patch_sizes": [2], "embed_dims": [16], "hidden_sizes": [4]}
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


@pytest.fixture
def script(load_script):
    return load_script("evaluate")


def save_run(folder: Path, data: DataConfig, class_names: list[str], **entries) -> Path:
    """What evaluation reads of a run: untrained weights with a head that is not zero, and the configuration."""
    torch.manual_seed(0)
    size = {"in_chans": data.in_chans, "img_size": data.img_size}
    model = create_model("sequencer2d_t_8", num_classes=len(class_names), **size, **ARGS)
    torch.nn.init.normal_(model.get_classifier().weight)
    about = {"config": {"data": asdict(data) | entries}}
    cfg = preprocessing(asdict(data))
    loaded = LoadedModel(model, "sequencer2d_t_8", "raw", tuple(class_names), cfg, size | ARGS, about)
    save_model_folder(loaded, folder / "model")
    (folder / "config.yaml").touch()
    return folder


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", DIGITS, list("0123456789"))


def exit_code(script: ModuleType, arguments: list[str]) -> int:
    """That of a script, whoever ends it: its work or argparse."""
    try:
        return script.main(arguments)
    except SystemExit as error:
        return error.code


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_run(script, run_folder, capsys):
    assert script.main([str(run_folder), "--device", "cpu"]) == 0
    images = open_split(DIGITS, "test", eval_transform(DIGITS))
    logits = load_model(run_folder).model(torch.stack([image for image, _ in images]))
    hits = logits.argmax(1).numpy() == images.labels
    result = json.loads((run_folder / "evaluation" / "evaluation.json").read_text())
    assert result.pop("loss") == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(images.labels)).item(), rel=1e-5
    )
    assert result["top5_low"] < result["top5"] < result["top5_high"]
    assert result["top1_low"] < result["top1"] < result["top1_high"]
    assert result["time/images_per_s"] == pytest.approx(len(images) / result["time/evaluation_s"])
    assert result["top5"] > result["top1"] > 0
    assert {key: value for key, value in result.items() if not key.startswith(("top5", "top1_", "time/"))} == {
        "model": str(run_folder),
        "arch": "sequencer2d_t_8",
        "slot": "raw",
        "data": "digits",
        "split": "test",
        "img_size": 8,
        "crop_pct": 1.0,
        "flip": False,
        "top1": hits.mean(),
        "total": len(images),
        "unreadable": 0,
    }
    table = read_csv(run_folder / "evaluation" / "per_class.csv")
    assert [row["class"] for row in table] == list("0123456789")
    assert sum(int(row["support"]) for row in table) == len(images)
    assert float(table[3]["recall"]) == pytest.approx(hits[images.labels == 3].mean())
    rows = read_csv(run_folder / "evaluation" / "predictions.csv")
    assert [row["id"] for row in rows] == [str(index) for index in images.indices]
    assert [row["class"] for row in rows] == [str(label) for label in images.labels]
    assert [row["predicted"] for row in rows] == [str(label) for label in logits.argmax(1).tolist()]
    assert [row["rank"] == "1" for row in rows] == hits.tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-5)
    printed = capsys.readouterr()
    assert f"{hits.mean():.2%}" in printed.out
    assert max(map(len, printed.out.splitlines()[:-1])) <= 80
    assert printed.err == ""


def test_arguments(script, run_folder, tmp_path, capsys):
    output = tmp_path / "elsewhere"
    arguments = [str(run_folder / "model"), "--split", "val", "--batch-size", "7", "--output", str(output)]
    assert script.main(arguments) == 0
    assert json.loads((output / "evaluation.json").read_text())["split"] == "val"
    assert not (run_folder / "evaluation").exists()
    assert "digits, val part" in capsys.readouterr().out


def test_size_crop_and_mirror_images(script, run_folder, tmp_path):
    config = replace(DIGITS, img_size=12, crop_pct=0.75)
    images = torch.stack([image for image, _ in open_split(config, "test", eval_transform(config))])
    model = load_model(run_folder).model
    expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)).argmax(1)
    assert script.main([str(run_folder), "--img-size", "12", "--crop-pct", "0.75", "--flip", "--output", "out"]) == 0
    result = json.loads(Path("out/evaluation.json").read_text())
    assert (result["img_size"], result["crop_pct"], result["flip"]) == (12, 0.75, True)
    assert [int(row["predicted"]) for row in read_csv(Path("out/predictions.csv"))] == expected.tolist()


def test_any_number_of_processes_counts_the_same(run_of_30_classes, tmp_path):
    """60 images, of which one cannot be read, in 1, 2 and 3 shares."""
    (run_of_30_classes.parent / "images" / "val" / "[class] 00" / "0.png").write_bytes(b"no image")
    config = json.loads((run_of_30_classes / "model" / "config.json").read_text())
    config["config"]["data"] |= {"max_bad_share": 0.5, "eval_batch_size": 4}
    (run_of_30_classes / "model" / "config.json").write_text(json.dumps(config))
    found, losses = [], []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(SCRIPTS / "evaluate.py"), str(run_of_30_classes), "--device", "cpu", "--output", str(output)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("part, 59 images") == 1
        result = json.loads((output / "evaluation.json").read_text())
        rows = [(row["id"], row["predicted"], row["rank"]) for row in read_csv(output / "predictions.csv")]
        assert len({name for name, *_ in rows}) == 59
        assert rows[0][0] == "[class] 00/1.png"
        exact = {key: result[key] for key in ("top1", "top5", "top1_low", "total", "unreadable")}
        found.append((exact, rows, (output / "per_class.csv").read_text()))
        losses.append(result["loss"])
    assert found[0] == found[1] == found[2]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)


def test_a_run_of_another_version(script, tmp_path):
    folder = save_run(tmp_path / "old", DIGITS, list("0123456789"), a_key_of_old=1, augment={"another": 2})
    assert script.main([str(folder)]) == 0


def test_file_with_architecture(script, tmp_path):
    model = create_model("sequencer2d_t_8", num_classes=10, in_chans=1)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    arguments = ["weights.safetensors", "--arch", "sequencer2d_t_8"]
    assert script.main(arguments) == 2
    assert script.main([*arguments, "--data", "digits", "--num-workers", "0"]) == 0
    assert json.loads(Path("evaluation/evaluation.json").read_text())["total"] == 359


def test_other_data_set_keeps_the_preprocessing_of_the_model(script, run_folder):
    args = script.parse([str(run_folder), "--data", "mnist", "--data-root", "a folder"])
    config = script.data_config(args, load_model(run_folder))
    assert (config.name, config.root) == ("mnist", "a folder")
    assert preprocessing(asdict(config)) == preprocessing(asdict(DIGITS))


@pytest.fixture
def folder_of_30_classes(tmp_path):
    """An image folder with val/ only."""
    for index in range(30):
        folder = tmp_path / "images" / "val" / f"[class] {index:02d}"
        folder.mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (12, 10), (8 * index, 50 * copy, 200 - 6 * index)).save(folder / f"{copy}.png")
    return tmp_path / "images"


@pytest.fixture
def run_of_30_classes(tmp_path, folder_of_30_classes):
    data = replace(DIGITS, name="imagefolder", root=str(folder_of_30_classes), num_classes=None, in_chans=3, img_size=8)
    names = sorted(path.name for path in (folder_of_30_classes / "val").iterdir())
    return save_run(tmp_path / "run", data, names)


def test_many_classes(script, run_of_30_classes, capsys):
    assert script.main([str(run_of_30_classes)]) == 0
    printed = capsys.readouterr().out
    assert "imagefolder, val part, 60 images" in printed
    assert "the 10 classes of lowest recall, out of 30" in printed
    assert printed.count("[class] ") == 10
    table = read_csv(run_of_30_classes / "evaluation" / "per_class.csv")
    assert len(table) == 30
    assert all(row["support"] == "2" for row in table)
    assert any(row["precision"] == "" for row in table)  # never predicted


def test_classes_with_other_names_are_noted(script, run_of_30_classes, folder_of_30_classes, capsys):
    (folder_of_30_classes / "val" / "[class] 00").rename(folder_of_30_classes / "val" / "[class] 0")
    assert script.main([str(run_of_30_classes)]) == 0
    assert "note: 1 classes have other names" in capsys.readouterr().err


def test_too_many_unreadable_images_end_the_work(script, run_of_30_classes, folder_of_30_classes, capsys):
    (folder_of_30_classes / "val" / "[class] 00" / "0.png").write_bytes(b"no image")
    assert script.main([str(run_of_30_classes)]) == 1
    assert "1 of 60 val images cannot be read, more than data.max_bad_share=0.01 allows" in check_error(capsys)
    assert [path.name for path in (run_of_30_classes / "evaluation").iterdir()] == ["bad_samples.csv"]


def check_error(capsys) -> str:
    """At most two lines and no traceback, on standard error alone; returns them."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert 1 <= len(printed.err.splitlines()) <= 2
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no file or folder"),
        (["nowhere", "--data", "digits"], "nowhere is neither a file or folder nor a timm model name"),
        (["RUN", "--data", "digit"], "invalid choice: 'digit'"),
        (["RUN", "--batch-size", "0"], "--batch-size: 0 is less than 1"),
        (["RUN", "--num-workers", "two"], "--num-workers: two is not an integer"),
        (["RUN", "--img-size", "9"], "takes no images of 9 px"),
        (["RUN", "--crop-pct", "87.5"], "--crop-pct: 87.5 is not a number above 0 and up to 1"),
        (["RUN", "--slot", "ema"], "holds the raw weights alone, not the ema ones"),
        (["RUN", "--splitt", "val"], "unrecognized arguments: --splitt"),
        (["RUN/model/config.json"], "config.json"),
        (["RUN", "--data", "mnist", "--data-root", "nothing"], "data=mnist: no complete set in"),
        (["RUN", "--data", "cifar100", "--data-root", "nothing"], "data=cifar100"),
        (["RUN", "--output", "RUN/config.yaml"], "config.yaml cannot be written: File exists"),
    ],
)
def test_wrong_requests(script, run_folder, capsys, arguments, message):
    arguments = [argument.replace("RUN", str(run_folder)) for argument in arguments]
    assert exit_code(script, arguments) == 2
    assert message in check_error(capsys)
    assert not Path("evaluation").exists()


def test_other_number_of_classes(script, run_folder, folder_of_30_classes, capsys):
    assert script.main([str(run_folder), "--data", "imagefolder", "--data-root", str(folder_of_30_classes)]) == 2
    assert "the model has 10 classes, the data set 30" in check_error(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(script, run_folder, capsys):
    assert script.main([str(run_folder), "--device", "cuda"]) == 2
    assert "--device cuda" in check_error(capsys)


def test_interrupted(script, run_folder, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sequencer.evaluation.evaluate", interrupt)
    assert script.main([str(run_folder)]) == 130
    assert check_error(capsys) == "interrupted\n"


def test_debug_shows_the_traceback(script, run_folder, capsys):
    assert script.main([str(run_folder), "--data", "mnist", "--data-root", "nothing", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_does_not_import_torch():
    command = [sys.executable, "-X", "importtime", str(SCRIPTS / "evaluate.py"), "--help"]
    root = str(SCRIPTS.parent)
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root, "COLUMNS": "80"})
    assert done.returncode == 0
    assert "MODEL" in done.stdout
    assert " torch\n" not in done.stderr
