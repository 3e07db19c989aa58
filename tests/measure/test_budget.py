"""Plans of requests that take long or do not fit: they answer in time, by smaller batches or by estimates."""

import os
import re
import socket
import time
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer.config import compose
from sequencer.config.command import parse_command
from sequencer.config.composition import to_config
from sequencer.config.sources import Sources
from sequencer.data.files import FileSplit
from sequencer.measure import Plan, forecast, measurement, plan
from sequencer.measure.budget import OutOfTime, available_memory, until
from sequencer.measure.size import Size, estimate_size, measure_size
from sequencer.models import create_model
from tests.helpers import SMALL, SMALL_MODEL, small_config
from tests.processes import start_function

SHALLOW = "model.kwargs.layers=[1,1,1,1]"  # one block in each stage


@pytest.fixture
def photos(tmp_path):
    """Eight images of 16 px in two classes, for training and for validation."""
    random = np.random.RandomState(0)
    for number in range(16):
        path = tmp_path / "photos" / ("train", "val")[number // 8] / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def planned(*overrides: str) -> Plan:
    command = parse_command([*overrides])
    return plan(to_config(command.compose().config), Sources(command))


def on_photos(photos, *overrides: str) -> Plan:
    return planned(*SMALL, "data=imagefolder", f"data.root={photos}", f"run_dir={photos / 'run'}", *overrides)


def test_a_deadline_ends_waiting_and_computing():
    for work in (lambda: time.sleep(30), lambda: [None for _ in iter(int, 1)]):
        started = time.monotonic()
        with pytest.raises(OutOfTime), until(started + 0.1):
            work()
        assert time.monotonic() - started < 5
    time.sleep(0.01)
    with until(time.monotonic() + 0.05):
        pass
    time.sleep(0.1)  # nothing happens after the block


def test_the_estimated_size_is_that_of_a_real_step(tmp_path):
    config = small_config(tmp_path / "run")
    model = create_model(config.model.name, img_size=8, in_chans=1, num_classes=10, **config.model.kwargs)
    assert estimate_size(config, 10, 8) == measure_size(model, 1, 8)


@pytest.mark.parametrize(
    "name",
    [
        "sequencer2d_s",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnext_tiny", "swin_tiny_patch4_window7_224")),
    ],
)
def test_size_of_models(name):
    """The activations of 224 px grow with the image, and checkpointing drops most of them."""
    config = compose([f"model.name={name}", "data=imagefolder", "data.root=x"])
    found = estimate_size(config, 1000, 224)
    assert found.parameters == pytest.approx(28e6, rel=0.05)
    assert 50e6 < found.activations < 400e6
    config.model.grad_checkpointing = True
    assert estimate_size(config, 1000, 224).activations < found.activations / 2


def test_large_batches_are_measured_with_small_ones(photos, capsys, monkeypatch):
    monkeypatch.setattr(measurement, "SECONDS", 0.05)
    monkeypatch.setattr(measurement, "_rate", lambda device: 1e6)  # as if the machine were slow
    monkeypatch.setattr(measurement, "SLOWEST_STEP", float("inf"))
    found = on_photos(photos, SMALL_MODEL, "model.name=sequencer2d_t_8", "data.img_size=16", "data.batch_size=8")
    assert "measured with 2 images per device and scaled to 8: " in capsys.readouterr().out
    assert found.images == 8
    assert found.measured.step_s > 0


@pytest.mark.parametrize("memory", [1 << 20, 1 << 40])
def test_what_cannot_be_measured_is_estimated(memory, photos, capsys, monkeypatch):
    """A model of several million parameters on images of 112 px, as if the machine were slow: nothing is computed."""
    monkeypatch.setattr(forecast, "available_memory", lambda device: memory)
    monkeypatch.setattr(forecast, "LIMIT", 600.0)  # a busy machine takes long to find the size
    monkeypatch.setattr(forecast, "SIZING", 200.0)
    monkeypatch.setattr(measurement, "_rate", lambda device: 1e8)
    monkeypatch.setattr(measurement, "_fit", pytest.fail)
    found = on_photos(photos, "model.name=sequencer2d_s", SHALLOW, "data.img_size=112", "data.batch_size=1024")
    printed = capsys.readouterr().out
    if memory == 1 << 20:
        assert "estimated by operations, since it would take too much memory: at least " in printed
        assert found.problems[-1].startswith("memory: about ")
    else:
        assert "estimated by operations, since a step of two images would take too long: at least " in printed
        assert len(found.problems) == 1  # the batch is larger than the split
    assert found.measured.step_s == pytest.approx(8 * found.flops / 1e8)
    assert found.measured.disk > 3 * 12 * found.parameters


def test_data_that_is_read_slowly(photos, capsys, monkeypatch):
    """No image arrives: the plan says so, and estimates."""
    monkeypatch.setattr(FileSplit, "load", lambda self, index: time.sleep(60))
    monkeypatch.setattr(forecast, "LIMIT", 4.0)
    monkeypatch.setattr(forecast, "LEAST", 0.0)
    monkeypatch.setattr(forecast, "EXAMINING", 0.3)
    started = time.monotonic()
    found = on_photos(photos, SMALL_MODEL, "model.name=sequencer2d_t_8", "data.img_size=16", "data.batch_size=4")
    assert time.monotonic() - started < 20
    assert any("reading them is slow" in problem for problem in found.problems)
    assert "estimated by operations, since no step ended in time" in capsys.readouterr().out


def test_data_that_cannot_be_opened_in_time(photos, monkeypatch):
    monkeypatch.setattr(forecast, "OPENING", 0.2)
    monkeypatch.setattr("sequencer.data.module.open_split", lambda *args: time.sleep(60))
    with pytest.raises(RuntimeError, match="could not be opened within"):
        on_photos(photos)


def test_memory_of_a_batch():
    config = small_config("run", "optim.ema_decay=0.9", "data.num_workers=2")
    size = Size(parameters=1000, flops=1, activations=50)
    assert size.memory(config, 3) == 4 * 5 * 1000 + 3 * (50 + 4 * 64 * 5)
    assert size.checkpoint(config) == 4 * 4 * 1000


def test_free_memory():
    assert 1 << 20 < available_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=sequencer2d_l", "data.img_size=448", "data.batch_size=1024"],
        ["model.name=vit_giant_patch14_224", "trainer.accumulate_grad_batches=64"],
        ["model.kwargs={cell: gru}"],
        ["data.num_workers=8"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_plan_answers_within_a_minute(overrides, photographs_root, tmp_path):
    started = time.monotonic()
    planned("data=imagefolder", f"data.root={photographs_root}", f"run_dir={tmp_path / 'run'}", *overrides)
    assert time.monotonic() - started < 60


def run_out_of_time(*args):
    raise OutOfTime


def test_a_step_that_cannot_be_sized(photos, capsys, monkeypatch):
    """The plan prints the rest."""
    monkeypatch.setattr(forecast, "estimate_size", run_out_of_time)
    monkeypatch.setattr(measurement, "_fit", pytest.fail)
    found = on_photos(photos, SMALL_MODEL, "model.name=sequencer2d_t_8", "data.img_size=16", "data.batch_size=4")
    printed = capsys.readouterr().out
    assert f"{found.parameters:,} parameters" in printed
    assert "4 updates in 2 epochs of 2 batches" in printed
    assert "time and memory of a step are not known, since its operations could not be counted in time: at l" in printed
    assert "forecast: an unknown time of training, an unknown time of testing" in printed


def plan_as_a_rank(photos, port, rank):
    """Plans with two ranks; the images of rank 1 never arrive."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (ranks | address).items()})
    forecast.LIMIT = forecast.LEAST = 6.0
    if rank == 1:
        FileSplit.load = lambda self, index: time.sleep(60)
    with open(photos / f"printed{rank}", "w") as file, redirect_stdout(file):
        model = [SMALL_MODEL, "model.name=sequencer2d_t_8"]
        on_photos(photos, *model, "data.img_size=16", "data.batch_size=4", "trainer.devices=2")


@pytest.mark.slow
def test_the_deadline_of_two_ranks(photos):
    """Rank 0 prints what is known; the other ends as if it had succeeded."""
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [start_function(plan_as_a_rank, photos, port, rank) for rank in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert time.monotonic() - started < 50
    assert "estimated by operations, since no step ended in time" in (photos / "printed0").read_text()
    assert (photos / "printed1").read_text() == ""


def test_published_weights_are_not_downloaded(photos, capsys, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", pytest.fail)
    monkeypatch.setattr(measurement, "_fit", lambda config, clock, data: clock.steps.append([1.0]))
    options = ["data.img_size=56", "data.batch_size=2", "model.pretrained=true", SHALLOW]
    assert on_photos(photos, "model.name=sequencer2d_s", *options).problems == []
    assert re.search(r"model\.pretrained +True +command line", capsys.readouterr().out)
    found = on_photos(photos, "model.name=v_sequencer_s", *options).problems
    assert found == ["model.pretrained=true: there are no published weights of v_sequencer_s"]


def test_recurrences_of_many_operations_are_sized_by_smaller_images(monkeypatch):
    config = compose(["model.name=sequencer2d_s", "data=imagefolder", "data.root=x", SHALLOW])
    whole = estimate_size(config, 1000, 224)
    original = estimate_size

    def slow(config, num_classes, img_size):
        if img_size == 224:
            raise OutOfTime
        return original(config, num_classes, img_size)

    monkeypatch.setattr(forecast, "estimate_size", slow)
    found = forecast._size(config, 1000, time.monotonic() + 60)
    assert found.parameters == whole.parameters
    assert found.flops == pytest.approx(whole.flops, rel=0.05)
    assert found.activations >= whole.activations  # copies of weights count as well
