"""The plan of a run, compared with what the run does."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import train
from sequencer.config import Config
from sequencer.config.command import parse_command
from sequencer.config.composition import to_config
from sequencer.config.sources import Sources
from sequencer.data.split import make_fingerprint
from sequencer.measure import Plan, forecast, measurement, plan, progress
from sequencer.measure.plan_result import Measured
from sequencer.measure.progress import stages
from sequencer.training import run
from tests.helpers import SMALL, SMALL_MODEL

pytestmark = pytest.mark.usefixtures("unrendered")


def test_sources_of_values():
    sources = Sources(
        parse_command(["experiment=ablation_hidden", "optim=sgd", "optim.lr=3e-3", "model.kwargs={cell: gru}"])
    )
    expected = {
        "optim.lr": "command line",
        "model.kwargs.cell": "command line",
        "trainer.precision": "conf/experiment/cifar10_cpu.yaml",
        "trainer.max_epochs": "conf/experiment/ablation_hidden.yaml",
        "optim.momentum": "conf/optim/sgd.yaml",
        "data.mean": "conf/data/cifar10.yaml",
        "model.name": "conf/experiment/cifar10_cpu.yaml",
        "model.num_classes": "conf/data/cifar10.yaml",  # interpolates data.num_classes
        "seed": "schema",
    }
    assert {key: sources[key] for key in expected} == expected


@pytest.fixture
def planned(tmp_path, monkeypatch) -> Callable[..., tuple[Plan, Config]]:
    """`planned(*overrides)` plans a small run into `tmp_path / "run"`; returns the plan and the configuration."""
    monkeypatch.setattr(measurement, "SECONDS", 0.05)

    def make(*overrides: str) -> tuple[Plan, Config]:
        command = parse_command([*SMALL, SMALL_MODEL, f"run_dir={tmp_path / 'run'}", *overrides])
        config = to_config(command.compose().config)
        return plan(config, Sources(command)), config

    return make


def test_sizes_are_those_of_the_run(planned, tmp_path, capsys):
    options = ["trainer.accumulate_grad_batches=3", "trainer.limit_train_batches=null", "optim.warmup_epochs=1"]
    found, config = planned(*options)
    text = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    summary = run(config)
    assert found.updates == summary["updates"]
    assert found.parameters == summary["parameters"]
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    last = float(rows[-1].split(",")[2])
    assert found.rates[-1] == pytest.approx(last, rel=1e-6)
    assert max(found.rates) == pytest.approx(3e-3, rel=0.1)
    assert found.rates[0] == 1e-6
    assert found.measured.memory > 2**20
    checkpoints = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found.measured.disk == pytest.approx(checkpoints, rel=0.2)
    assert found.problems == []
    assert text.startswith("problems: none found\n")
    for phrase in (f"{found.updates} updates in 2 epochs", "parameter group 0", "learning rate ▁"):
        assert phrase in text
    assert "every other key has its default: plan=full lists them\n" in text
    assert not re.search("^(trainer.devices|model.name|data.hflip|seed) ", text, flags=re.MULTILINE)
    assert re.search(r"optim.weight_decay +0.3 +conf/experiment/digits.yaml", text)
    assert re.search(r"data.batch_size +32 +command line", text)


def test_operations_per_image(planned):
    """Forward and twice as much backward; one block of 4 x 4 tokens, C 16, D 4, between stem and head."""
    found, _ = planned("optim.ema_decay=0.9", "data.augment.mixup=0.2")
    C, D, tokens = 16, 4, 16
    stem, head = tokens * 4 * C, 10 * C
    recurrence = tokens * 4 * (4 * D * C + 4 * D * D)  # four directions
    block = recurrence + tokens * (4 * D * C + 2 * 3 * C * C)
    images_need_no_gradient = tokens * 4 * C
    assert found.flops == 2 * (3 * (stem + block + head) - images_need_no_gradient)


def test_max_steps_ends_an_epoch_early(planned, capsys):
    found, _ = planned("trainer.max_steps=5")
    assert (found.updates, found.epochs) == (5, 1.25)
    assert "5 updates in 1.25 epochs" in capsys.readouterr().out


def test_forecast_is_the_sum_of_its_steps(planned, monkeypatch):
    """20 updates in 2.5 epochs of 8 training and 3 validation batches; 2 test batches."""
    measured = Measured(step_s=2.0, val_s=0.5, rest_s=3.0, start_s=7.0, memory=1, disk=1 << 60)
    monkeypatch.setattr(forecast, "measure", lambda *args: measured)
    limits = [f"trainer.limit_{name}_batches={number}" for name, number in (("train", 8), ("val", 3), ("test", 2))]
    found, _ = planned(*limits, "trainer.max_epochs=9", "trainer.max_steps=20", "data.eval_batch_size=32")
    assert found.train_s == 7 + 2.5 * (8 * 2 + 3 * 0.5 + 3)
    assert found.test_s == 2 * 0.5
    assert len(found.problems) == 1
    assert found.problems[0].startswith("disk: ")


def test_measured_times(planned, monkeypatch):
    """The second of three epochs counts, without its first step; the first epoch tells what a start takes."""
    limits = []

    def fit(config, clock, data):
        limits.append((config.trainer.max_epochs, config.trainer.limit_train_batches, config.trainer.limit_val_batches))
        batches = config.trainer.limit_train_batches
        clock.steps = ([[0.5] * batches] + [[9.0] + [0.25] * (batches - 1)] * 2)[: config.trainer.max_epochs]
        clock.validations = [0.1 * config.trainer.limit_val_batches] * 3
        clock.epochs = [100.0, 140.0, 150.0][: config.trainer.max_epochs]

    monkeypatch.setattr(measurement, "SECONDS", 3.0)
    monkeypatch.setattr(measurement, "_fit", fit)
    found, _ = planned("trainer.limit_train_batches=20", "data.eval_batch_size=8")
    assert limits == [(1, 4, 1), (3, 6, 10)]  # 3 s of steps of 0.5 s; 1 s of validation batches of 0.1 s
    measured = found.measured
    assert (measured.step_s, measured.val_s) == (0.25, pytest.approx(0.1))
    assert measured.rest_s == pytest.approx(10 - 6 * 0.25 - 1.0)
    assert measured.start_s == 40 - 10
    assert measured.disk == (3 * 12 + 4) * found.parameters  # nothing was written: three checkpoints with AdamW


def test_classes_without_images_and_a_large_batch(planned):
    """The validation split gets an image of the classes that have at least 143."""
    found, _ = planned("data.val_fraction=0.0035", "data.batch_size=2000")
    assert found.problems == [
        "val: no image of 3 classes: 0, 2, 8",
        "train: data.batch_size=2000 is more than its 1431 images",
    ]


def test_unreadable_images(planned, tmp_path, capsys):
    random = np.random.RandomState(0)
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        for number in range(3):
            path = tmp_path / "data" / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.randint(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    (tmp_path / "data" / "train" / "a" / "1.png").write_bytes(b"no image")
    options = ["data=imagefolder", f"data.root={tmp_path / 'data'}", "data.img_size=16", "data.max_bad_share=0.5"]
    found, _ = planned(*options, "data.batch_size=4", "trainer.max_epochs=1")
    assert len(found.problems) == 1
    assert found.problems[0].startswith("train: 1 of 6 images examined cannot be read, e.g. ")
    assert found.problems[0] in capsys.readouterr().out.replace("\n", "")


def test_the_data_are_hashed_once(planned, monkeypatch):
    hashed = []

    def count(number, *contents):
        hashed.append(number)
        return make_fingerprint(number, *contents)

    monkeypatch.setattr("sequencer.data.memory.make_fingerprint", count)
    planned()
    assert sorted(hashed) == [143, 359, 1295]


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[..., None]:
    """train.py in an empty folder, with a short measurement."""
    monkeypatch.setattr(measurement, "SECONDS", 0.05)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: train.main(parse_command([*arguments, *SMALL, SMALL_MODEL]))


def test_command(command, tmp_path, capsys):
    command("plan=full")
    text = capsys.readouterr().out
    assert "forecast: " in text
    assert re.search(r"^trainer.benchmark +False +schema$", text, flags=re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    with stages() as show:
        show("nothing of this")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "CONSOLE", Console())
    with stages() as show:
        show("opening the data")
        show("timing training steps")
    shown = capsys.readouterr().out
    assert "plan: opening the data" in shown
    assert "plan: timing training steps" in shown


def test_plan_of_a_sweep(command, tmp_path, capsys, monkeypatch):
    """Two epochs of four batches, 600 s each."""
    measured = Measured(step_s=600.0, val_s=0.0, rest_s=0.0, start_s=0.0, memory=1, disk=1 << 20)
    monkeypatch.setattr(forecast, "measure", lambda *args: measured)
    command("-m", "seed=1,2,3", "plan=true")
    printed = capsys.readouterr().out
    assert "forecast: 80.0 min of training, 0 s of testing; 3 trials 4.0 h\n" in printed
    assert "disk: 3 MiB in " in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_forecast_holds(name, tmp_path, request):
    """Within 15%, on an idle machine."""
    overrides = ["experiment=digits", "trainer.max_epochs=10"]
    if name == "cifar10":
        root = request.getfixturevalue("cifar10_root")
        overrides = ["experiment=cifar10_cpu", "trainer.max_epochs=1", f"data.root={root}"]
    command = parse_command([*overrides, f"run_dir={tmp_path / 'run'}", "trainer.enable_progress_bar=false"])
    config = to_config(command.compose().config)
    expected = plan(config, Sources(command)).train_s
    assert expected == pytest.approx(run(config)["time/train_s"], rel=0.15)
