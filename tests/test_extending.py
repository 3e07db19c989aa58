"""The programs of docs/extend.md, from outside the package, and what they lead to."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from sequencer import names
from sequencer.config import Config, RequestError, compose
from sequencer.config.composition import to_config
from sequencer.config.request import load_run
from sequencer.data import DATA_SETS
from sequencer.evaluation import evaluate_model, evaluation_data
from sequencer.export import export_graph
from sequencer.layers import RNN
from sequencer.models import load_model
from sequencer.ops import BACKENDS, CELLS, Weights, configure, explain, rnn1d
from sequencer.training import run
from sequencer.variants import VARIANTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text()
pytestmark = pytest.mark.usefixtures("unrendered")
SHORT = (
    '"trainer.limit_train_batches=2", "trainer.accelerator=cpu", "optim.warmup_epochs=0", '
    '"model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}", '
    '"logger.report=false", '
)


def program(section: str, language: str = "python") -> str:
    """Returns the program of a section."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)[1]


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Executes the program of a section with a small model and short epochs, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    tables = [(table, table.copy()) for table in (CELLS, DATA_SETS, BACKENDS, VARIANTS)]
    lists = [(listed, list(listed)) for listed in (names.DATA_SETS, names.BACKENDS)]
    yield lambda section: exec(program(section).replace("compose([", f"compose([{SHORT}"), {"__name__": section})
    for table, before in tables:
        table.clear()
        table.update(before)
    for listed, names_before in lists:
        listed[:] = names_before
    configure()


def test_a_cell(execute, tmp_path):
    execute("A cell")
    folder = tmp_path / "outputs" / "leaky"
    summary = run(replace(resumed := compose_run(folder), trainer=replace(resumed.trainer, max_epochs=2)), resume=True)
    assert summary["epochs"] == 2
    loaded = load_model(folder)
    assert evaluate_model(loaded, evaluation_data(loaded)).metrics["top1"] == summary["test/top1"]
    assert export_graph(loaded, tmp_path, "torch_export", 8)["max_error"] < 1e-4
    with pytest.raises(RequestError, match="ONNX has no operator for the cell 'leaky'"):
        export_graph(loaded, tmp_path, "onnx", 8)


def test_a_cell_is_what_its_step_says(execute):
    execute("A cell")
    weights = RNN(3, 2, "leaky", bidirectional=False).weights()
    (w,) = weights[0]
    x, h = torch.randn(1, 4, 3), torch.zeros(2)
    for t, y in enumerate(rnn1d(x, weights, "leaky")[0]):
        h = h / 2 + (w.weight_ih @ x[0, t] + w.bias_ih + w.weight_hh @ h + w.bias_hh).tanh() / 2
        torch.testing.assert_close(y, h)


def test_a_data_set(execute, tmp_path):
    execute("A data set")
    summary = json.loads((tmp_path / "outputs" / "stripes" / "summary.json").read_text())
    assert summary["data"] == "stripes"
    assert "test/top1" in summary
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "stripes.yaml").write_text("name: stripes\nnum_classes: 2\nin_chans: 1\n"
        "img_size: 8\nmean: [0.5]\nstd: [0.5]\ndefault_model: sequencer2d_t_8\n")  # fmt: skip
    assert compose(["data=stripes"], config_dir=tmp_path / "mine").data.num_classes == 2
    with pytest.raises(RequestError, match="data=stripes does not exist"):
        compose(["data=stripes"])


def test_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "my_recipes" / "experiment").mkdir(parents=True)
    (tmp_path / "my_recipes" / "experiment" / "short.yaml").write_text(program("A recipe", "yaml"))
    command = [sys.executable, ROOT / "train.py", "--config-dir", "my_recipes"]
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert "transfer_stanford_cars" in shown.stdout
    assert "short" in shown.stdout
    asked = subprocess.run([*command, "experiment=short", "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True)
    assert "max_epochs: 5" in asked.stdout


def test_a_model(execute):
    execute("A model")
    model = timm.create_model("gru_sequencer2d_tiny", num_classes=10)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert model.stages[0].blocks[0].rnn_tokens.cell == "gru"
    assert compose(["data=cifar10", "model.name=gru_sequencer2d_tiny"]).model.name == "gru_sequencer2d_tiny"


def test_a_backend(execute, tmp_path):
    execute("A backend")
    log = (tmp_path / "outputs" / "float64" / "train.log").read_text()
    assert "INFO kernels: float64 lstm\n" in log
    assert explain("gru", backend="float64").backend == "float64"
    weights, x = RNN(3, 2).weights(), torch.randn(2, 5, 3)
    exact = rnn1d(x.double(), [tuple(Weights(*(t if t is None else t.double() for t in w)) for w in weights[0])])
    assert torch.equal(rnn1d(x, weights, backend="float64"), exact.float())
    with pytest.raises(ValueError, match="the float64 backend cannot serve lstm: it runs on a CPU"):
        explain("lstm", device="meta", backend="float64")


def compose_run(folder: Path) -> Config:
    """Returns the configuration of a run."""
    return to_config(load_run(folder))
