"""scripts/evaluate.py: output, files and exit codes."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sequencer.data import eval_transform, open_split
from sequencer.evaluation import evaluation_data
from sequencer.models import create_model, load_model, timm_preprocessing
from tests.helpers import DIGITS, SCRIPTS, exit_code, read_csv, save_run
from tests.processes import finish, start_ranks

SETTING = Path("evaluation", "digits-test-raw-8px-crop1")  # below the run
FOLDERS = Path("evaluation", "imagefolder-val-raw-8px-crop1")


@pytest.fixture
def script(load_script):
    return load_script("evaluate")


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", DIGITS, list("0123456789"))


def test_run(script, run_folder, capsys):
    assert script.main([str(run_folder), "--device", "cpu"]) == 0
    images = open_split(DIGITS, "test", eval_transform(DIGITS))
    logits = load_model(run_folder).model(torch.stack([image for image, _ in images]))
    hits = logits.argmax(1).numpy() == images.labels
    result = json.loads((run_folder / SETTING / "evaluation.json").read_text())
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
        "data_root": "data",
        "split": "test",
        "img_size": 8,
        "crop_pct": 1.0,
        "flip": False,
        "top1": hits.mean(),
        "balanced": pytest.approx(np.mean([hits[images.labels == label].mean() for label in range(10)])),
        "total": len(images),
        "unreadable": 0,
    }
    table = read_csv(run_folder / SETTING / "per_class.csv")
    assert [row["class"] for row in table] == list("0123456789")
    assert sum(int(row["support"]) for row in table) == len(images)
    assert float(table[3]["recall"]) == pytest.approx(hits[images.labels == 3].mean())
    rows = read_csv(run_folder / SETTING / "predictions.csv")
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
    assert "digits, val split" in capsys.readouterr().out


def test_size_crop_and_mirror_images(script, run_folder, tmp_path):
    config = replace(DIGITS, img_size=12, crop_pct=0.75)
    images = torch.stack([image for image, _ in open_split(config, "test", eval_transform(config))])
    model = load_model(run_folder).model
    expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)).argmax(1)
    assert script.main([str(run_folder), "--img-size", "12", "--crop-pct", "0.75", "--flip", "--output", "out"]) == 0
    result = json.loads(Path("out/evaluation.json").read_text())
    assert (result["img_size"], result["crop_pct"], result["flip"]) == (12, 0.75, True)
    assert [int(row["predicted"]) for row in read_csv(Path("out/predictions.csv"))] == expected.tolist()


def test_each_setting_has_its_folder_and_is_named(script, run_folder, capsys):
    assert script.main([str(run_folder), "--split", "val"]) == 0
    assert script.main([str(run_folder / "model"), "--split", "val", "--flip", "--img-size", "12"]) == 0
    printed = capsys.readouterr().out
    assert (
        "sequencer2d_t_8 (raw weights) on digits, val split\n143 images of 12 px, crop 1, with mirror images\n"
        in printed
    )
    names = ["digits-val-raw-12px-crop1-flip", "digits-val-raw-8px-crop1"]
    assert sorted(path.name for path in (run_folder / "evaluation").iterdir()) == names
    output = run_folder / "evaluation" / names[1]
    before = (output / "evaluation.json").read_bytes()
    assert script.main([str(run_folder), "--output", str(output)]) == 2
    assert capsys.readouterr().err == (
        f"error: {output} holds another evaluation: split (val there, test here)\nname another folder with --output\n"
    )
    assert (output / "evaluation.json").read_bytes() == before


def test_unbalanced_classes(script, tmp_path, capsys):
    for name, number in (("heather", 4), ("orchid", 2), ("snowdrop", 1)):
        (tmp_path / "images" / "valid" / name).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / "valid" / name / f"{index}.png")
    data = replace(DIGITS, name="imagefolder", root=str(tmp_path / "images"), num_classes=None, in_chans=3)
    folder = save_run(tmp_path / "run", data, ["heather", "orchid", "snowdrop"])
    assert script.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "   balanced accuracy 33.33%\n" in printed  # one of the three is predicted for every image
    assert "top-5" not in printed
    assert printed.count("never predicted: ") == 1
    result = json.loads((folder / FOLDERS / "evaluation.json").read_text())
    assert result["balanced"] == pytest.approx(1 / 3)
    assert not [key for key in result if key.startswith("top5")]


def test_missing_data_is_asked_for_by_the_flag_of_the_script(script, run_of_30_classes, folder_of_30_classes, capsys):
    folder_of_30_classes.rename(folder_of_30_classes.with_name("moved"))
    assert script.main([str(run_of_30_classes)]) == 2
    assert "\n--data-root DIR must name a folder with train/ and val/ (test/ is optional), each with a folder of" in (
        check_error(capsys)
    )


def test_three_ranks_give_the_results_of_one(script, run_of_30_classes, tmp_path):
    """59 images, of which one cannot be read: shares of 20, 20 and 19."""
    folder = run_of_30_classes.parent / "images" / "val"
    (folder / "[class] 00" / "0.png").write_bytes(b"no image")
    (folder / "[class] 29" / "1.png").unlink()
    config = json.loads((run_of_30_classes / "model" / "config.json").read_text())
    config["config"]["data"] |= {"max_bad_share": 0.5, "eval_batch_size": 4}
    (run_of_30_classes / "model" / "config.json").write_text(json.dumps(config))
    one, three = tmp_path / "one", tmp_path / "three"
    arguments = [str(run_of_30_classes), "--device", "cpu", "--output"]
    assert script.main([*arguments, str(one)]) == 0
    ranks = start_ranks(3, [*arguments, str(three)], tmp_path, script=SCRIPTS / "evaluate.py")
    assert finish(ranks).count("58 images of 8 px") == 1
    results = [json.loads((output / "evaluation.json").read_text()) for output in (one, three)]
    for name in ("top1", "top5", "top1_low", "total", "unreadable"):
        assert results[0][name] == results[1][name]
    assert (results[0]["total"], results[0]["unreadable"]) == (58, 1)
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    predictions = [read_csv(output / "predictions.csv") for output in (one, three)]
    ids = [row["id"] for row in predictions[0]]
    assert len(set(ids)) == 58
    assert ids[0] == "[class] 00/1.png"
    for name in ("id", "class", "predicted", "rank"):
        assert [row[name] for row in predictions[0]] == [row[name] for row in predictions[1]]
    for name in ("per_class.csv", "bad_samples.csv"):
        assert (one / name).read_text() == (three / name).read_text()


def test_a_run_of_another_version(script, tmp_path):
    folder = save_run(tmp_path / "old", DIGITS, list("0123456789"), a_key_of_old=1, augment={"another": 2})
    assert script.main([str(folder)]) == 0


def test_file_with_architecture(script, tmp_path):
    model = create_model("sequencer2d_t_8", num_classes=10, in_chans=1)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    arguments = ["weights.safetensors", "--arch", "sequencer2d_t_8"]
    assert script.main(arguments) == 2
    assert script.main([*arguments, "--data", "digits", "--num-workers", "0"]) == 0
    assert (
        json.loads(
            Path("outputs/evaluation/weights.safetensors-digits-test-raw-8px-crop1/evaluation.json").read_text()
        )["total"]
        == 359
    )


def test_other_data_set_keeps_the_preprocessing_of_the_model(run_folder):
    config = evaluation_data(load_model(run_folder), "mnist", root="a folder", eval_batch_size=7, num_workers=None)
    assert (config.name, config.root, config.eval_batch_size) == ("mnist", "a folder", 7)
    assert config.num_workers is not None
    assert timm_preprocessing(asdict(config)) == timm_preprocessing(asdict(DIGITS))


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
    assert "imagefolder, val split\n60 images of 8 px, crop 1\n" in printed
    assert "the 10 classes with the lowest recall, of 30" in printed
    assert printed.count("\n[class] ") == 10
    table = read_csv(run_of_30_classes / FOLDERS / "per_class.csv")
    assert len(table) == 30
    assert all(row["support"] == "2" for row in table)
    assert any(row["precision"] == "" for row in table)  # never predicted


def test_classes_with_other_names_are_noted(script, run_of_30_classes, folder_of_30_classes, caplog):
    (folder_of_30_classes / "val" / "[class] 00").rename(folder_of_30_classes / "val" / "[class] 0")
    assert script.main([str(run_of_30_classes)]) == 0
    assert "1 of 30 classes are named differently in the model and in the data set, e.g. [class] 00 and [class] 0;" in (
        caplog.text
    )


def test_too_many_unreadable_images_end_the_work(script, run_of_30_classes, folder_of_30_classes, capsys):
    (folder_of_30_classes / "val" / "[class] 00" / "0.png").write_bytes(b"no image")
    assert script.main([str(run_of_30_classes)]) == 1
    assert "1 of 60 val images cannot be read, more than data.max_bad_share=0.01 allows" in check_error(capsys)
    assert [path.name for path in (run_of_30_classes / FOLDERS).iterdir()] == ["bad_samples.csv"]
    Image.new("RGB", (12, 10)).save(folder_of_30_classes / "val" / "[class] 00" / "0.png")
    assert script.main([str(run_of_30_classes)]) == 0
    assert not (run_of_30_classes / FOLDERS / "bad_samples.csv").exists()  # that of the other evaluation


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
        (["RUN", "--data", "digit"], "; did you mean digits?\n"),
        (["RUN", "data.root=x"], "unrecognized arguments: data.root=x; did you mean --data-root?\n"),
        (["RUN", "--batch-size", "0"], "--batch-size: 0 is less than 1"),
        (["RUN", "--num-workers", "two"], "--num-workers: two is not an integer"),
        (["RUN", "--img-size", "1"], "takes no images of 1 px"),
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
    assert not (run_folder / "evaluation").exists()


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

    monkeypatch.setattr("sequencer.evaluation.evaluate_model", interrupt)
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
