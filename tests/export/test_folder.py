"""Model folders, which timm reads without this package, and their upload to a hub."""

import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image

from sequencer.export import loads_with_timm, save_model_folder
from sequencer.export.card import model_card
from sequencer.models import LoadedModel, create_model, load_model, timm_preprocessing
from tests.helpers import DIGITS, FIGURES, save_run

WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["sequencer"] = None
import timm, torch
case = torch.load("case.pt")
model = timm.create_model("local-dir:model", pretrained=True).eval()
assert type(model).__module__ == "timm.models.sequencer"
with torch.inference_mode():
    torch.testing.assert_close(model(case["x"]), case["y"], atol=1e-4, rtol=1e-4)
config = timm.data.resolve_model_data_config(model)
assert tuple(config["mean"]) == (0.1, 0.2, 0.3) and config["input_size"] == (3, 56, 56), config
"""


@pytest.mark.parametrize(
    "name",
    ["sequencer2d_s", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sequencer2d_m", "sequencer2d_l"))],
)
def test_timm_loads_its_models_without_this_package(name, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, img_size=56, drop_path_rate=0.1).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    cfg = {"input_size": (3, 56, 56), "mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3, "crop_pct": 0.9}
    cfg["interpolation"] = "bilinear"
    args = {"drop_path_rate": 0.1}
    save_model_folder(LoadedModel(model, name, "raw", tuple("abcdefg"), cfg, args), tmp_path / "model")
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        torch.save({"x": x, "y": model(x)}, tmp_path / "case.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT_THIS_PACKAGE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_contents_of_a_model_folder(tmp_path):
    loaded = load_model(save_run(tmp_path, DIGITS, list("0123456789")))
    about = loaded.about | {"metrics": {"test/top1": 0.5}, "commit": "c0ffee", "versions": {"torch": "2"}}
    save_model_folder(LoadedModel(**(vars(loaded) | {"about": about, "slot": "ema"})), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architecture"] == "sequencer2d_t_8"
    assert config["slot"] == "ema"
    assert config["label_names"] == list("0123456789")
    assert config["model_args"]["layers"] == [1]
    assert {key: config[key] for key in about} == as_json(about)
    assert not {"slot", "metrics", "config"} & config["pretrained_cfg"].keys()
    again = load_model(tmp_path / "folder")
    assert (again.slot, again.about, again.pretrained_cfg["mean"]) == ("ema", as_json(about), (0.3,))
    assert timm_preprocessing(again.data)["input_size"] == (1, 8, 8)


def as_json(about: dict) -> dict:
    """Converts tuples to lists."""
    return json.loads(json.dumps(about))


class Hub(BaseHTTPRequestHandler):
    """The part of a hub's interface that an upload uses; uploaded files are kept in `server.files`."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(404)

    def do_GET(self) -> None:
        self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.server.address}/somebody/digits"})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer(200, {"files": modes})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/somebody/digits/commit/0"
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        else:
            self.answer(404, {"error": self.path})

    def answer(self, status: int, content: dict | None = None) -> None:
        body = json.dumps(content).encode() if content is not None else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.tokens = {}, set()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_upload_to_a_hub(hub, load_script, tmp_path, monkeypatch, capsys):
    run = save_run(tmp_path / "run", DIGITS, list("0123456789"))
    Image.new("RGB", (20, 20)).save(run / "model" / "confusion.png")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    arguments = [str(run), "--format", "hub", "--output", "folder", "--push-to", "somebody/digits"]
    assert load_script("export").main(arguments) == 0
    assert f"pushed to {hub.address}/somebody/digits" in capsys.readouterr().out
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.files.keys() == {"README.md", "confusion.png", "config.json", "model.safetensors"}
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in hub.files.items():
        (pushed / name).write_bytes(content)
    x = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        expected = load_model(run).model(x)
        assert torch.equal(load_model(pushed).model(x), expected)
        assert torch.equal(load_model(tmp_path / "folder").model(x), expected)
    card = hub.files["README.md"].decode()
    assert 'timm.create_model("hf-hub:somebody/digits", pretrained=True)' in card
    assert 'convert("L")' in card
    assert "sequencer2d_t_8" in card
    assert Path(tmp_path, "folder", "certificate.json").exists()


def test_model_card_has_results_and_code_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["ants", "bees\x1b[2J", *"23456789"]
    loaded = load_model(save_run(tmp_path / "run", DIGITS, names))
    about = loaded.about | {"metrics": {"val/top1": 0.25, "test/top1": 0.5, "test/top5": 0.75}, "commit": "c0ffee"}
    card = model_card(replace(loaded, about=about), "local-dir:run/model")
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header).keys() == {"pipeline_tag", "tags", "model-index"}
    for line in (
        "# sequencer2d_t_8",
        "An image classifier of the Sequencer family: `sequencer2d_t_8`.",
        r"- **Classes:** 10: ants, bees\\x1b\[2J, 2, 3, 4, 5, 6, 7, 8, 9",
        "- **Data set:** digits",
        "| test top-1 | 50.00% |  |",
        "| test top-5 | 75.00% |  |",
        "| validation top-1 | 25.00% | the epoch was chosen on these images |",
        "- Whether its probabilities are calibrated has not been measured.",
        "- **Commit:** c0ffee",
        "- **Licence:** for the author to state, by `license:` in the header of this file",
        "It needs the package `sequencer`, whose import adds the architecture to timm; timm alone cannot load it.",
    ):
        assert line in body.splitlines()
    Image.new("RGB", (20, 20)).save("photograph.jpg")
    scope: dict = {}
    exec(body.partition("```python\n")[2].partition("```")[0], scope)
    assert scope["probabilities"].shape == (1, 10)
    assert scope["probabilities"].sum().item() == pytest.approx(1)


def test_a_model_card_lists_the_first_hundred_classes(tmp_path):
    loaded = load_model(save_run(tmp_path, DIGITS, [f"class {k}" for k in range(103)]))
    assert ", class 98, class 99, and 3 more\n" in model_card(loaded, "local-dir:FOLDER")


def test_results_of_a_saved_model_card_are_read_by_the_library_of_the_hub(tmp_path):
    metrics = {"val/top1": 0.7, "val_ema/top1": 0.8, "val_ema/loss": None, "test/top1": 0.75, "test/loss": 0.8125}
    loaded = load_model(save_run(tmp_path / "run", DIGITS, ["an <b>ant</b>", "a|b_c"]))
    about = {"metrics": metrics, "figures": FIGURES, "images": {"train": 1200, "val": 30, "test": 40}}
    config = loaded.about["config"] | {"init_from": str(tmp_path / "first")}
    Image.new("RGB", (20, 20)).save(tmp_path / "matrix.png")
    save_model_folder(
        replace(loaded, slot="ema", about=about | {"config": config}), tmp_path / "model", tmp_path / "matrix.png"
    )
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("digits", "test", "accuracy", 0.75),
        ("digits", "test", "loss", 0.8125),
        ("digits", "test", "expected_calibration_error", 0.05),
        ("digits", "validation", "accuracy", 0.8),
    ]
    assert {result.task_type for result in card.data.eval_results} == {"image-classification"}
    assert (card.data.model_name, card.data.license) == ("sequencer2d_t_8", None)
    for line in (
        "On 40 images of the test split:",
        "| top-1 | 75.00% | 95%: 60.00% to 86.00% |",
        "| loss | 0.8125 | cross-entropy, nats |",
        "| calibration error | 5.00% | expected, 15 bins |",
        "| operations | 4.13 M | multiplications and additions, an image |",
        "| validation top-1 | 80.00% | the epoch was chosen on these images |",
        "![Confusion matrix: shares of each true class by predicted class](confusion.png)",
        r"| | an \<b\>ant\</b\> | a\|b\_c |",
        r"| **an \<b\>ant\</b\>** | 18 | 2 |",
        r"| **a\|b\_c** | 8 | 12 |",
        r"- **Classes:** 2: an \<b\>ant\</b\>, a\|b\_c",
        "- **Data set:** digits: 1,200 training, 30 validation and 40 test images",
        "The model assigns an image, seen at 8 x 8 pixels, to one of 2 classes. It was trained on the data set digits.",
        "- Its probabilities differ from the share of right answers by 5.0 percentage points on average (expected "
        "calibration error).",
        "- Training started from the weights of another model, whose data, licence and limits hold here too.",
    ):
        assert line in card.text.splitlines()
    assert str(tmp_path) not in card.content
    assert (tmp_path / "model" / "confusion.png").read_bytes() == (tmp_path / "matrix.png").read_bytes()


def test_a_card_says_that_validation_results_are_too_good(tmp_path):
    loaded = load_model(save_run(tmp_path, DIGITS, list("ab")))
    unknown = dict.fromkeys(("top1", "top1_interval", "loss", "calibration_error", "confusion"))
    about = loaded.about | {"figures": FIGURES | unknown | {"split": "val"}}
    lines = model_card(replace(loaded, about=about), "local-dir:FOLDER").splitlines()
    assert "| top-1 | - |  |" in lines
    assert any(line.startswith("- There was no test split: the results are those of the validation") for line in lines)
    assert not any("Confusion matrix" in line or "<details>" in line for line in lines)


def test_a_card_without_results_has_no_index_of_them(tmp_path):
    card = ModelCard.load(save_run(tmp_path, DIGITS, list("ab")) / "model" / "README.md")
    assert card.data.eval_results is None
    assert "## Results" not in card.text


LOAD = """
import sys
sys.modules["sequencer"] = None
import timm
for folder in sys.argv[1:]:
    try:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
        print("loaded")
    except Exception as error:
        print(error)
"""


def test_what_loads_with_timm_alone_is_said_of_it(tmp_path):
    """Models as timm has them do; altered ones, and those that only this package has, fail as soon as timm is asked."""
    cases = {
        ("sequencer2d_s", False): "loaded",
        ("sequencer2d_s", True): "Sequencer2d.__init__() got an unexpected keyword argument 'cell'",
        ("gru_sequencer2d_s", False): "Unknown model (gru_sequencer2d_s)",
        ("resnet18", False): "loaded",
    }
    cfg, folders = timm_preprocessing(vars(DIGITS) | {"img_size": 56}), []
    for (name, altered), answer in cases.items():
        args = {"cell": "indylstm"} if altered else {"drop_path_rate": 0.1}
        model = create_model(name, num_classes=2, in_chans=1, **args)
        loaded = LoadedModel(model, name, "raw", ("ants", "bees"), cfg, args)
        assert loads_with_timm(loaded) == (answer == "loaded")
        header = yaml.safe_load(model_card(loaded, "local-dir:FOLDER").split("---\n")[1])
        assert header.get("library_name") == ("timm" if answer == "loaded" else None)
        folders.append(tmp_path / f"{name}_{altered}")
        save_model_folder(loaded, folders[-1])
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True)
    assert done.stdout.splitlines() == list(cases.values()), done.stderr


def test_others_can_read_a_model_folder(tmp_path):
    before = os.umask(0o022)
    try:
        folder = save_run(tmp_path, DIGITS, list("0123456789")) / "model"
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"README.md": 0o644, "config.json": 0o644, "model.safetensors": 0o644}
