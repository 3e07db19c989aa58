"""scripts/export.py: files, messages and exit codes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from sequencer.export import recurrence
from sequencer.models import create_model, load_model, load_weights, read_checkpoint, read_weights
from tests.helpers import ARGS, DIGITS, SCRIPTS, exit_code, save_run

TRAIN = SCRIPTS.parent / "train.py"


@pytest.fixture
def script(load_script):
    return load_script("export")


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", DIGITS, list("0123456789"))


def certificate(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "certificate.json").read_text())


@pytest.mark.parametrize(("form", "name"), [("onnx", "model.onnx"), ("torch_export", "model.pt2")])
def test_a_graph_and_its_certificate(script, run_folder, capsys, form, name):
    assert script.main([str(run_folder), "--format", form, "--output", "new/out"]) == 0
    assert sorted(path.name for path in Path("new/out").iterdir()) == ["certificate.json", name]
    said = certificate("new/out")
    assert said["file"] == name
    assert said["sha256"] == hashlib.sha256(Path("new/out", name).read_bytes()).hexdigest()
    assert re.fullmatch("the test .* of digits", said["images"])
    assert (said["batches"], said["top1_agreement"], said["input_size"]) == ([1, 3, 8], 1.0, [1, 8, 8])
    assert 0 < said["max_error"] <= said["tolerance"]
    assert {"sequencer", "torch", "timm", "onnx"} <= said["versions"].keys()
    printed = capsys.readouterr()
    assert printed.out.startswith(f"new/out/{name}: ")
    assert f"top-1 classes agree for 100% of the images ({said['images']})" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("channels", [1, 3])
def test_the_program_of_the_documents_predicts_as_the_run(script, tmp_path, load_script, capsys, channels):
    """The example of docs/export.md, which needs onnxruntime alone, on a photograph whose sides are odd."""
    statistics = {"in_chans": channels, "mean": [0.3] * channels, "std": [0.4] * channels}
    data = replace(DIGITS, img_size=12, crop_pct=0.875, **statistics)
    run_folder = save_run(tmp_path / "run", data, [f"class {k}" for k in range(10)])
    pixels = np.random.RandomState(0).randint(256, size=(37, 51, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((255, 185)).save(tmp_path / "photograph.png")
    assert script.main([str(run_folder), "--format", "onnx", "--output", "FOLDER"]) == 0
    assert load_script("predict").main([str(run_folder), "photograph.png", "--format", "jsonl"]) == 0
    (expected,) = json.loads(capsys.readouterr().out.splitlines()[-1])["classes"]
    page = (SCRIPTS.parent / "docs" / "export.md").read_text()
    (program,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "onnxruntime" in block
    )
    scope: dict = {}
    exec(program.replace("photograph.jpg", "photograph.png"), scope)
    assert capsys.readouterr().out == f"{expected['class']}\n"
    logits = torch.from_numpy(scope["logits"]).double()
    assert logits.softmax(0).max().item() == pytest.approx(expected["probability"], abs=1e-5)


def test_an_export_is_evaluated_as_its_run(script, run_folder, load_script):
    assert script.main([str(run_folder), "--format", "onnx", "--output", "out"]) == 0
    evaluate = load_script("evaluate")
    found = []
    for model in (str(run_folder), "out/model.onnx"):
        assert evaluate.main([model, "--output", "evaluation"]) == 0
        result = json.loads(Path("evaluation/evaluation.json").read_text())
        found.append(({key: result[key] for key in ("arch", "top1", "top5", "total", "data", "split")}, result["loss"]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_weights_for_timm(script, run_folder):
    assert script.main([str(run_folder), "--format", "timm", "--output", "out"]) == 0
    expected = load_model(run_folder).model
    model = timm.create_model("sequencer2d_t_8", **ARGS, num_classes=10, checkpoint_path="out/model.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.eval()(x), expected(x))
    assert certificate("out")["max_error"] == 0


def test_weights_for_the_paper_s_repository_and_back(script, run_folder):
    assert script.main([str(run_folder), "--format", "paper", "--output", "out"]) == 0
    names = read_checkpoint("out/model.pth")["state_dict"].keys()
    assert {"head.weight", "blocks.0.0.rnn_tokens.rnn_v.weight_ih_l0"} <= names
    again = create_model("sequencer2d_t_8", num_classes=10, **ARGS)
    load_weights(again, read_weights("out/model.pth"))
    expected = load_model(run_folder).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_a_folder_for_a_hub(script, run_folder, capsys, tmp_path):
    assert script.main([str(run_folder), "--format", "hub", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("\ntimm loads it only after `import sequencer`\n")
    names = ["README.md", "certificate.json", "config.json", "model.safetensors"]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    card = Path("out/README.md").read_text()
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in card
    assert "FOLDER is the folder that holds this file." in card
    assert str(tmp_path) not in card
    Path("new").touch()
    assert {path.stat().st_mode for path in Path("out").iterdir()} == {Path("new").stat().st_mode}
    model = timm.create_model("local-dir:out", pretrained=True)
    assert torch.equal(model.head.fc.weight, load_file(run_folder / "model" / "model.safetensors")["head.fc.weight"])


def test_at_another_size(script, run_folder):
    assert script.main([str(run_folder), "--format", "torch_export", "--output", "out", "--img-size", "12"]) == 0
    assert certificate("out")["input_size"] == [1, 12, 12]
    assert load_model("out/model.pt2", trust=True).model(torch.zeros(2, 1, 12, 12)).shape == (2, 10)


def test_a_mismatch_keeps_nothing(script, run_folder, monkeypatch, capsys):
    def disturb(model):
        torch.nn.init.normal_(model.get_classifier().bias)

    monkeypatch.setattr("sequencer.export.formats.use_lstms", disturb)
    arguments = [str(run_folder), "--format", "torch_export", "--output"]
    assert script.main([*arguments, "out"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the export differs from the model by ")
    assert "it was not kept" in message
    assert not Path("out").exists()
    Path("kept").mkdir()
    Path("kept", "model.pt2").write_text("an older one")
    assert script.main([*arguments, "kept"]) == 1
    assert [path.name for path in Path("kept").iterdir()] == ["model.pt2"]
    assert Path("kept", "model.pt2").read_text() == "an older one"
    monkeypatch.setattr("sequencer.export.formats.use_lstms", recurrence.use_lstms)
    assert script.main([*arguments, "kept"]) == 0
    assert load_model("kept/model.pt2", trust=True).arch == "sequencer2d_t_8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--format", "onnx"], "nowhere is neither a file or folder nor a timm model name"),
        (["sequencer2d_x", "--format", "onnx"], "sequencer2d_x is neither a file or folder nor a timm model name"),
        (["empty", "--format", "onnx"], "is neither a run nor a model folder: no model/config.json, no checkpoints/"),
        (["weights.safetensors", "--format", "onnx"], "does not say its architecture: add --arch NAME"),
        (["weights.safetensors", "--format", "onnx", "--arch", "sequencer2d_t8"], "did you mean sequencer2d_t_8"),
        (["weights.safetensors", "--format", "onnx", "--arch", "sequencer2d_t_32"], "does not fit Sequencer2d"),
        (["damaged.pth", "--format", "onnx", "--arch", "sequencer2d_t_8"], "damaged.pth"),
        (["RUN", "--format", "onnxx"], "invalid choice: 'onnxx'"),
        (["RUN", "--format", "onnx", "--img-size", "1"], "input height 1 is smaller than the total stride 2"),
        (["RUN", "--format", "onnx", "--slot", "ema"], "holds the raw weights alone, not the ema ones"),
        (["RUN", "--format", "timm", "--img-size", "8"], "--img-size, --dtype and --with-preprocessing are for"),
        (["RUN", "--format", "onnx", "--push-to", "a/b"], "--push-to is for --format hub"),
        (["RUN", "--format", "hub", "--push-to", "a b"], "--push-to a b: "),
        (["RUN", "--format", "hub", "--push-to", "a/b"], "--push-to needs a token of the hub"),
        (["RUN", "--format", "onnx", "--output", "weights.safetensors"], "weights.safetensors cannot be written"),
    ],
)
def test_wrong_requests(script, run_folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (tmp_path / "weights.safetensors").write_bytes((run_folder / "model" / "model.safetensors").read_bytes())
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.replace("RUN", str(run_folder)) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", "out"]
    assert exit_code(script, arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) <= 2
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_packages_for_onnx(script, run_folder, capsys, monkeypatch):
    monkeypatch.setattr("_cli.find_spec", lambda name: None)
    assert script.main([str(run_folder), "--format", "onnx", "--output", "out"]) == 2
    assert "python -m pip install onnx onnxruntime onnxscript" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_export_of_an_export(script, run_folder, capsys):
    assert script.main([str(run_folder), "--format", "torch_export", "--output", "out"]) == 0
    assert script.main(["out/model.pt2", "--format", "onnx", "--output", "again"]) == 2
    assert "out/model.pt2 is an export: name the model that it was made from" in capsys.readouterr().err
    assert not Path("again").exists()


def command(*arguments: object, cwd: Path) -> str:
    env = os.environ | {"WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluated(model: object, cwd: Path) -> dict:
    command(SCRIPTS / "evaluate.py", model, "--trust", "--output", "evaluation", cwd=cwd)
    return json.loads((cwd / "evaluation" / "evaluation.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("digits", ["trainer.max_epochs=8", "optim.ema_decay=0.9"]),
        ("cifar10", ["model.kwargs={cell: gru, layers: [1, 1]}"]),
        ("photographs", ["model.name=indylstm_sequencer2d_s", "data.img_size=112", "optim.ema_decay=0.9"]),
    ],
)
def test_a_trained_model_in_every_format(data, settings, request, tmp_path):
    """Train, predict, evaluate, export to every format, and predict and evaluate again, by command lines."""
    train = [f"data={'imagefolder' if data == 'photographs' else data}", *settings]
    if data != "digits":
        train += [f"data.root={request.getfixturevalue(f'{data}_root')}", "data.batch_size=16", "trainer.max_epochs=1"]
        train += ["optim.warmup_epochs=0"]
        train += ["data.eval_batch_size=64", "trainer.limit_train_batches=12", "trainer.limit_val_batches=4"]
    command(TRAIN, "run_dir=run", "trainer.accelerator=cpu", *train, cwd=tmp_path)
    images = request.getfixturevalue("photographs_root") / "val"
    ask = ["--format", "jsonl", "--top", "2", "--trust"]
    answers = command(SCRIPTS / "predict.py", "run", images, *ask, cwd=tmp_path).splitlines()
    assert len(answers) == 153
    result = evaluated("run", tmp_path)
    for form in ("onnx", "torch_export", "hub", "timm", "paper"):
        command(SCRIPTS / "export.py", "run", "--format", form, "--output", form, cwd=tmp_path)
        assert certificate(tmp_path / form)["top1_agreement"] == 1
    for model in ("onnx/model.onnx", "torch_export/model.pt2", "hub"):
        found = command(SCRIPTS / "predict.py", model, images, *ask, cwd=tmp_path).splitlines()
        for a, b in zip(map(json.loads, answers), map(json.loads, found), strict=True):
            assert a["path"] == b["path"]
            assert a["classes"][0]["probability"] == pytest.approx(b["classes"][0]["probability"], abs=1e-4)
        again = evaluated(model, tmp_path)
        assert again["total"] == result["total"]
        assert again["loss"] == pytest.approx(result["loss"], rel=1e-4)
        assert abs(again["top1"] - result["top1"]) * result["total"] < 2  # an image may be a tie of two classes
