"""A plan says what the run then does."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer.config.errors import RequestError
from sequencer.config.request import compose, take_plan, to_config
from sequencer.config.sources import Sources
from sequencer.measure import plan
from sequencer.training import run

TRAIN = Path(__file__).parents[2] / "train.py"


def test_where_values_come_from():
    sources = Sources(["experiment=ablation_hidden", "optim=sgd", "optim.lr=3e-3", "model.kwargs={cell: gru}"])
    expected = {
        "optim.lr": "command line",
        "model.kwargs.cell": "command line",
        "model.kwargs.layers": "conf/experiment/cifar10_cpu.yaml",
        "trainer.max_epochs": "conf/experiment/ablation_hidden.yaml",
        "optim.momentum": "conf/optim/sgd.yaml",
        "data.mean": "conf/data/cifar10.yaml",
        "model.name": "conf/data/cifar10.yaml",  # through data.default_model
        "seed": "conf/schema.py",
    }
    assert {key: sources[key] for key in expected} == expected


def test_plan_is_taken_from_the_overrides():
    assert take_plan(["seed=1", "plan=true", "optim.lr=1"]) == (True, ["seed=1", "optim.lr=1"])
    assert take_plan(["seed=1"]) == (False, ["seed=1"])
    with pytest.raises(RequestError, match="it is true or false"):
        take_plan(["plan=yess"])
    with pytest.raises(RequestError, match="not for one that is resumed"):
        take_plan(["plan=true", "resume=runs/a"])


def sources_of(*overrides: str) -> Sources:
    return Sources(list(overrides))


def test_a_plan_counts_as_the_run_does(config, tmp_path, capsys):
    options = ["trainer.accumulate_grad_batches=3", "trainer.limit_train_batches=null", "optim.warmup_epochs=1"]
    found = plan(config(*options), sources_of())
    text = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    summary = run(config(*options))
    assert found.updates == summary["updates"]
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    last = float(rows[-1].split(",")[2])
    assert found.rates[-1] == pytest.approx(last, rel=1e-6)
    assert max(found.rates) == pytest.approx(3e-3, rel=0.1)
    assert found.rates[0] == 1e-6
    assert found.flops > 0
    assert found.measured.memory > 2**20
    checkpoints = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found.measured.disk == pytest.approx(checkpoints, rel=0.2)
    assert found.problems == []
    for phrase in (f"{found.updates} updates in 2 epochs", "parameter group 0", "learning rate ▁", "problems: none"):
        assert phrase in text
    assert re.search(r"optim.lr +0.003 +conf/experiment/digits.yaml", text)


def test_max_steps_and_ema(config, capsys):
    found = plan(config("trainer.max_steps=5", "optim.ema_decay=0.9", "data.augment.mixup=0.2"), sources_of())
    assert (found.updates, found.epochs) == (5, 1.25)
    assert "5 updates in 1.25 epochs" in capsys.readouterr().out


def test_problems_of_the_data_are_found(config, tmp_path, capsys):
    random = np.random.RandomState(0)
    for part, classes in (("train", "ab"), ("val", "ab")):
        for name in classes:
            for number in range(3):
                path = tmp_path / "data" / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.randint(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    (tmp_path / "data" / "train" / "a" / "1.png").write_bytes(b"no image")
    for number in range(3):
        (tmp_path / "data" / "val" / "b" / f"{number}.png").unlink()
    (tmp_path / "data" / "val" / "a" / "0.png").rename(tmp_path / "data" / "val" / "b" / "0.jpeg")
    options = ["data=imagefolder", f"data.root={tmp_path / 'data'}", "data.img_size=16", "data.max_bad_share=0.5"]
    wanted = to_config(compose([*options, "data.num_workers=0", "data.batch_size=2", "trainer.max_epochs=1",
                                "trainer.accelerator=cpu", "model.name=sequencer2d_t_32"]))  # fmt: skip
    found = plan(wanted, sources_of(*options))
    assert len(found.problems) == 1
    assert found.problems[0].startswith("train: 1 of 6 images looked at cannot be read, e.g. ")
    assert found.problems[0] in capsys.readouterr().out.replace("\n", "")


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TRAIN, *arguments], cwd=cwd, capture_output=True, text=True)


SMALL_RUN = ["trainer.accelerator=cpu", "trainer.limit_train_batches=2", "optim.warmup_epochs=0"]


def test_the_command(tmp_path):
    result = command("plan=true", *SMALL_RUN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "forecast: " in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_plan_of_a_sweep(tmp_path):
    result = command("-m", "seed=1,2,3", "plan=true", *SMALL_RUN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 trials" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_forecast_holds(name, tmp_path, request):
    """Within 15%, on a machine with nothing else to do."""
    overrides = ["experiment=digits", "trainer.max_epochs=10"]
    if name == "cifar10":
        root = request.getfixturevalue("cifar10_root")
        overrides = ["experiment=cifar10_cpu", "trainer.max_epochs=1", f"data.root={root}"]
    wanted = to_config(compose([*overrides, f"run_dir={tmp_path / 'run'}", "trainer.enable_progress_bar=false"]))
    forecast = plan(wanted, Sources(overrides)).train_s
    assert forecast == pytest.approx(run(wanted)["time/train_s"], rel=0.15)
