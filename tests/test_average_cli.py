"""scripts/average.py: files, messages and exit codes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sequencer.export import export_graph, save_model_folder
from sequencer.models import create_model, load_model
from tests.helpers import DIGITS, FIGURES, exit_code, save_run


@pytest.fixture
def script(load_script):
    return load_script("average")


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Three runs with different weights."""
    folders = [save_run(tmp_path / f"run{k}", DIGITS, list("0123456789")) for k in range(3)]
    for seed, folder in enumerate(folders):
        loaded = load_model(folder)
        torch.manual_seed(seed)
        for parameter in loaded.model.parameters():
            torch.nn.init.normal_(parameter)
        about = loaded.about | {"metrics": {"test/top1": seed}, "images": {"train": 100}, "figures": FIGURES}
        save_model_folder(replace(loaded, about=about), folder / "model")
    return [str(folder) for folder in folders]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_model(folder).model.state_dict()


def test_the_mean_of_the_weights(script, runs, capsys):
    assert script.main([*runs, "--output", "soup"]) == 0
    assert capsys.readouterr().out == "soup: the average of 3 models, sequencer2d_t_8, raw weights\n"
    parts, soup = [weights(run) for run in runs], weights("soup")
    assert soup.keys() == parts[0].keys()
    for name, tensor in soup.items():
        assert torch.equal(tensor, torch.stack([part[name].double() for part in parts]).mean(0).float()), name
    config = json.loads(Path("soup/config.json").read_text())
    assert config["averaged"] == runs
    assert config["config"]["data"]["name"] == "digits"
    assert not {"metrics", "figures", "images"} & config.keys()  # those of the first do not hold for it
    card = Path("soup/README.md").read_text()
    assert "- **Average:** of 3 models\n" in card
    assert "## Results" not in card
    assert load_model("soup").about["averaged"] == runs


def test_one_model_and_itself(script, runs):
    assert script.main([runs[0], f"{runs[0]}/model", "--output", "soup"]) == 0
    first, soup = weights(runs[0]), weights("soup")
    assert all(torch.equal(tensor, soup[name]) for name, tensor in first.items())


def other_names(folder: Path) -> None:
    save_run(folder, DIGITS, list("abcdefghij"))


def other_mean(folder: Path) -> None:
    save_run(folder, replace(DIGITS, mean=[0.5]), list("0123456789"))


@pytest.mark.parametrize(
    ("make", "message"),
    [(other_names, "they have different classes"), (other_mean, "they have different preprocessing")],
)
def test_models_that_cannot_be_averaged(script, runs, tmp_path, capsys, make, message):
    make(tmp_path / "other")
    assert script.main([runs[0], "other", "--output", "soup"]) == 2
    assert f"other cannot be averaged with {runs[0]}: {message}" in capsys.readouterr().err
    assert not Path("soup").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("diverged", [0, 2])
def test_a_run_that_has_diverged(script, runs, capsys, diverged, value):
    loaded = load_model(runs[diverged])
    loaded.model.norm.bias.data[3] = value
    save_model_folder(loaded, Path(runs[diverged]) / "model")
    assert script.main([*runs, "--output", "soup"]) == 2
    expected = f"error: {runs[diverged]} cannot be averaged: norm.bias has values that are not finite\n"
    assert capsys.readouterr().err == expected
    assert not Path("soup").exists()


def test_the_same_shapes_in_another_cell(script, runs, capsys):
    loaded = load_model(runs[0])
    for cell in ("rnn", "rnn_relu"):
        args = {**loaded.model_args, "cell": cell}
        model = create_model(loaded.arch, **args)
        torch.nn.init.normal_(model.get_classifier().weight)  # it begins at zero
        save_model_folder(replace(loaded, model=model, model_args=args), Path(cell))
    assert script.main(["rnn", "rnn_relu", "--output", "soup"]) == 2
    assert "with equal weights they compute different outputs" in capsys.readouterr().err


def test_wrong_requests(script, runs, tmp_path, capsys):
    for folder in runs[:2]:
        export_graph(load_model(folder), tmp_path, "torch_export", 8)
    for arguments, message in [
        (["model.pt2", runs[0], "--output", "soup"], "model.pt2 is an export: name the model that it was made from"),
        ([runs[0], "nothing", "--output", "soup"], "nothing is neither a file or folder nor a timm model name"),
        ([*runs, "--output", "model.pt2"], "model.pt2 cannot be written: File exists"),
        ([runs[0], "--output", "soup"], "name at least two models"),
        (runs, "the following arguments are required: --output"),
    ]:
        assert exit_code(script, arguments) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert len(printed.err.splitlines()) <= 2
        assert not Path("soup").exists()
