"""What `scripts/inside.py` collects from the analyses, and how intervals over seeds are stated."""

import math
import shutil
from statistics import mean

import pytest
from scipy.stats import ttest_1samp

from sequencer.config import compose
from sequencer.training import run
from tests.helpers import SMALL, SMALL_MODEL, read_csv


@pytest.fixture
def inside(load_script):
    return load_script("inside")


@pytest.fixture
def common(load_script):
    load_script("results")  # puts the scripts on the path
    from _results import common

    return common


def scan(model: str, direction: str, values: dict[int, tuple[float, str]]) -> list[dict[str, str]]:
    place = {"model": model, "module": "blocks.0", "layer": "0", "direction": direction}
    return [
        place | {"distance": str(k), "jacobian_norm": str(norm), "forget_product": product}
        for k, (norm, product) in values.items()
    ]


def test_gradients_are_means_over_scans_relative_to_the_last_token(inside):
    curves = [
        *scan("run", "down", {0: (2.0, "1.0"), 1: (0.2, "0.5")}),
        *scan("run", "up", {0: (0.5, "1.0"), 1: (0.0005, "0.1")}),
        *scan("run, untrained", "down", {0: (1.0, "1.0"), 1: (1.0, "0.7")}),
    ]
    scans = [
        {"model": "run", "gate": "forget", "below": "0.1", "above": "0.2"},
        {"model": "run", "gate": "forget", "below": "0.3", "above": "0.0"},
        {"model": "run, untrained", "gate": "forget", "below": "1.0", "above": "0.0"},
    ]
    found = inside._memory(curves, scans)
    assert found["trained gradient 0"] == 0
    assert found["trained gradient 1"] == pytest.approx(-2)  # a tenth and a thousandth
    assert found["trained forget product 1"] == pytest.approx(0.3)
    assert found["untrained gradient 1"] == 0
    assert found["saturated forget"] == pytest.approx(0.3)


def test_changes_are_means_over_blocks_and_over_directions(inside):
    changes = [
        {"stage": "0", "block": block, "direction": direction, "change": change}
        for block, direction, change in (("0", "up", "-0.1"), ("1", "up", "-0.3"), ("0", "down", "0.1"))
    ]
    found = inside._knock_out(changes)
    assert found == pytest.approx({"up": -0.2, "down": 0.1, "block 0": 0.0, "block 1": -0.3})


def test_corruptions_are_means_over_severities(inside):
    pieces = [{"piece": "clean", "top1": "0.8"}] + [
        {"piece": f"stored glass_blur {severity}", "top1": str(severity / 10)} for severity in range(1, 6)
    ]
    assert inside._robustness(pieces) == pytest.approx({"clean": 0.8, "glass_blur": 0.3})


def test_intervals_are_those_of_student(common):
    first, second = {0: 0.61, 1: 0.64, 2: 0.60}, {2: 0.58, 0: 0.60, 1: 0.61, 3: 0.9}
    expected = ttest_1samp([100 * (first[seed] - second[seed]) for seed in first], 0).confidence_interval(0.95)
    assert common.paired(first, second) == f"+2.00 ({expected.low:+.2f} to {expected.high:+.2f})"
    values = [0.5, 0.6, 0.9]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert common.interval(values) == f"{mean(values):.2f} ({low:.2f} to {high:.2f})"


def test_wrong_requests(inside, capsys, tmp_path):
    assert inside.main(["nowhere"]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    run(compose([*SMALL, SMALL_MODEL, "trainer.max_epochs=1", f"run_dir={tmp_path / 'digits'}"]))
    assert inside.main([str(tmp_path / "digits")]) == 2
    assert "is of digits" in capsys.readouterr().err
    assert not (tmp_path / "digits" / "inside_1000").exists()
    for name in ("one", "two"):
        twin = shutil.copytree(tmp_path / "digits", tmp_path / "twins" / name)
        config = twin / "config.yaml"
        config.write_text(config.read_text().replace("name: digits", "name: cifar10"))
    assert inside.main([str(tmp_path / "twins")]) == 2
    assert "have the same cell and seed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_cifar10_is_looked_at(inside, cifar10_root, tmp_path, monkeypatch):
    folder, output = tmp_path / "runs" / "one", tmp_path / "inside.csv"
    overrides = ["experiment=cifar10_fast", f"data.root={cifar10_root}", "trainer.max_epochs=1", "seed=3"]
    run(compose([*overrides, "trainer.limit_train_batches=2", f"run_dir={folder}"]))
    request = [str(tmp_path / "runs"), "--limit", "32", "--output", str(output)]
    assert inside.main(request) == 0
    rows = read_csv(output)
    assert {(row["cell"], row["seed"]) for row in rows} == {("lstm", "3")}
    assert {row["analysis"] for row in rows} == {"memory", "knock-out", "symmetry", "robustness"}
    assert all(math.isfinite(float(row["value"])) for row in rows)
    monkeypatch.setattr(inside.subprocess, "run", None)  # what is there is kept
    assert inside.main(request) == 0
    assert read_csv(output) == rows
