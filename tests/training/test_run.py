"""What a run writes, and how it goes on."""

import csv
import importlib
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from sequencer.config.errors import RequestError
from sequencer.models import load_model, read_checkpoint
from sequencer.training import run
from sequencer.training.divergence import DivergenceGuard
from sequencer.training.ema import WeightEma
from sequencer.training.module import Classifier
from sequencer.training.random_state import get_random_state, set_random_state

EMA = ["optim.ema_decay=0.9", "trainer.slot=ema", "trainer.best_metric=val_ema/top1"]
RANDOM = ["data.augment.mixup=0.4", "data.augment.crop_padding=1", "model.drop_path_rate=0.3", "model.drop_rate=0.2"]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_run_folder(config, tmp_path):
    summary = run(config())
    folder = tmp_path / "run"
    files = "config.yaml metrics.csv checkpoints model summary.json train.log curves.png confusion.png"
    assert {path.name for path in folder.iterdir()} == set(files.split())
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert {path.name for path in (folder / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert 0 <= summary["test/top1"] <= 1
    assert OmegaConf.load(folder / "config.yaml").data.name == "digits"
    log = (folder / "train.log").read_text()
    assert "epoch 1/2" in log
    assert "epoch 2/2" in log


def test_the_last_epoch_may_be_taken_whatever_it_is(config, tmp_path):
    summary = run(config("trainer.best_metric=epoch", "trainer.max_epochs=3", "optim.lr=0.5"))  # which gets worse
    assert summary["best_epoch"] == 2
    last, best = (read_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("last", "best"))
    assert same(last["state_dict"], best["state_dict"])


def test_metrics_rows(config, tmp_path):
    run(config("data.augment.smoothing=0.1"))
    table = rows(tmp_path / "run")
    assert [row["epoch"] for row in table] == ["0", "1"]
    assert [row["step"] for row in table] == ["4", "8"]
    assert all(float(row["train/loss"]) > 0 and float(row["time/epoch_s"]) > 0 for row in table)


def test_training_loss_is_the_mean_over_images(config, tmp_path, monkeypatch):
    from sequencer.training import module

    seen = []
    original = module.Classifier.training_step

    def spy(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        seen.append((len(batch[0]), loss.item()))
        return loss

    monkeypatch.setattr(module.Classifier, "training_step", spy)
    run(config("trainer.max_epochs=1"))
    expected = sum(n * loss for n, loss in seen) / sum(n for n, _ in seen)
    assert float(rows(tmp_path / "run")[0]["train/loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_short_last_window_of_accumulation_weighs_as_a_whole_one(config, monkeypatch):
    """Of five batches accumulated in twos the last stands alone: its update is by its own gradient, not by half."""
    gradients, own = [], []
    step, look = Classifier.training_step, DivergenceGuard.on_before_optimizer_step

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        weight = self.model.get_classifier().weight
        images, labels = batch
        own.append(torch.autograd.grad(torch.nn.functional.cross_entropy(self(images), labels), weight)[0])
        return loss

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients.append(pl_module.model.get_classifier().weight.grad.clone())
        look(self, trainer, pl_module, optimizer)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    monkeypatch.setattr(DivergenceGuard, "on_before_optimizer_step", on_before_optimizer_step)
    options = ["trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2", "data.augment.mixup=0"]
    run(config(*options, "trainer.max_epochs=1", "model.drop_path_rate=0", "optim.lr=0.01"))
    assert len(gradients) == 3
    for found, expected in zip(gradients, [own[0] / 2 + own[1] / 2, own[2] / 2 + own[3] / 2, own[4]], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_what_an_update_sees_is_said_at_the_start(config, tmp_path):
    run(config("trainer.accumulate_grad_batches=2", "optim.lr=0.01", "optim.layer_decay=0.5", "trainer.max_epochs=1"))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "batch 64: 32 on each of 1 device, 2 passes an update; learning rate 0.01, not scaled" in log
    rates = {float(rate) for rate in re.findall(r"parameter group \d+: .*, lr ([0-9.e-]+),", log)}
    assert rates == {0.01, 0.005, 0.0025}  # head, block, stem: decay is in each group's own rate


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    for name in ("a", "b"):
        run(config(*RANDOM, run_dir=name))
    a, b = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("a", "b"))
    assert same(a["state_dict"], b["state_dict"])
    run(config(*RANDOM, "seed=1", run_dir="c"))
    assert not same(a["state_dict"], read_checkpoint(tmp_path / "c" / "checkpoints" / "last.ckpt")["state_dict"])


class Stop(pl.Callback):
    """Does something to a run in its second epoch: before its third batch, or as its validation begins."""

    def __init__(self, action, hook) -> None:
        self.action, self.hook = action, hook

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.hook == "training" and trainer.current_epoch == 1 and batch_idx == 2:
            self.action()

    def on_validation_batch_start(self, trainer, *args) -> None:
        if self.hook == "validation" and trainer.current_epoch == 1:
            self.action()


def interrupted(config, monkeypatch, action, expected: type[BaseException], hook="training") -> BaseException:
    module = importlib.import_module("sequencer.training.setup")
    build = module._build_trainer
    with monkeypatch.context() as patch:
        patch.setattr(module, "_build_trainer", lambda c, callbacks: build(c, [Stop(action, hook), *callbacks]))
        with pytest.raises(expected) as error:
            run(config)
    return error.value


def fail() -> None:
    raise RuntimeError("power failure")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_run(whole: Path, broken: Path) -> None:
    """Weights, averages, optimizer states, random states and rows, bit for bit."""
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (read_checkpoint(folder / "checkpoints" / name) for folder in (whole, broken))
        assert same(a["state_dict"], b["state_dict"])
        assert same(a["state_dict_ema"], b["state_dict_ema"])
        for x, y in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
            assert same(x, y)
        for x, y in zip(a["ranks"], b["ranks"], strict=True):
            assert torch.equal(x["random"].pop("torch"), y["random"].pop("torch"))
            assert x == y
    untimed = [
        [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows(folder)]
        for folder in (whole, broken)
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("action", "expected", "hook", "updates"),
    [
        (fail, RuntimeError, "training", 2),  # from the end of the first epoch
        (terminate, SystemExit, "training", 4),  # at the end of a window of accumulation
        (terminate, SystemExit, "validation", 4),
    ],
    ids=["failed", "stopped", "stopped-in-validation"],
)
def test_a_resumed_run_is_the_same_run(config, tmp_path, monkeypatch, workers, action, expected, hook, updates):
    options = [*RANDOM, *EMA, "trainer.max_epochs=3", f"data.num_workers={workers}"]
    options += ["trainer.accumulate_grad_batches=2", "trainer.early_stopping_patience=5"]
    run(config(*options, run_dir="whole"))
    interrupted(config(*options, run_dir="broken"), monkeypatch, action, expected, hook)
    assert len(rows(tmp_path / "broken")) == 1
    assert read_checkpoint(tmp_path / "broken" / "checkpoints" / "last.ckpt")["global_step"] == updates
    run(config(*options, run_dir="broken"), resume=True)
    assert len(rows(tmp_path / "whole")) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_ctrl_c_leaves_a_run_that_goes_on(config, tmp_path, monkeypatch):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        interrupted(config(), monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(rows(tmp_path / "run")) == 1
    assert not list(tmp_path.rglob("*.partial"))
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4 + 3  # nothing is lost
    assert run(config(), resume=True)["epochs"] == 2


def test_sigterm_ends_with_143(config, monkeypatch):
    error = interrupted(config(), monkeypatch, terminate, SystemExit)
    assert error.code == 143


def test_resuming_a_finished_run_trains_nothing(config, tmp_path):
    summary = run(config())
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run(config(), resume=True) == summary
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_a_run_killed_before_its_summary_is_finished_by_resuming(config, tmp_path):
    summary = run(config())
    (tmp_path / "run" / "summary.json").unlink()
    assert run(config(), resume=True) == summary


def test_a_finished_run_can_be_given_more_epochs(config, tmp_path):
    first = run(config())
    more = run(config("trainer.max_epochs=4"), resume=True)
    assert more["epochs"] == 4
    assert more["val/top1"] >= first["val/top1"]  # the best is never lost
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1", "2", "3"]


def test_resuming_before_the_first_checkpoint_starts_over(config):
    assert run(config(), resume=True)["epochs"] == 2


def test_raw_and_ema_are_kept_apart(config, tmp_path):
    summary = run(config(*EMA, "optim.lr=0.03"))
    folder = tmp_path / "run"
    checkpoint = read_checkpoint(folder / "checkpoints" / "best.ckpt")
    raw = {name.removeprefix("model."): t for name, t in checkpoint["state_dict"].items() if name.startswith("model.")}
    assert not same(raw, checkpoint["state_dict_ema"])
    shipped = load_model(folder)
    assert shipped.slot == "ema"
    assert same(shipped.model.state_dict(), checkpoint["state_dict_ema"])
    assert same(load_model(folder, slot="raw").model.state_dict(), raw)
    assert {"val/top1", "val_ema/top1"} <= summary.keys()
    assert json.loads((folder / "model" / "config.json").read_text())["slot"] == "ema"


def test_ema_follows_updates_not_batches(config, monkeypatch):
    decays = []
    original = WeightEma.on_fit_start

    def spy(self, trainer, pl_module):
        original(self, trainer, pl_module)
        update = self.average.update
        self.average.update = lambda model, step: (decays.append(step), update(model, step=step))

    monkeypatch.setattr(WeightEma, "on_fit_start", spy)
    run(config("optim.ema_decay=0.9", "trainer.accumulate_grad_batches=2"))
    assert decays == [1, 2, 3, 4]


def test_fine_tuning_replaces_the_head_where_classes_differ(config, tmp_path):
    run(config("trainer.max_epochs=1", run_dir="first"))
    trained = load_model(tmp_path / "first").model
    config2 = config(f"init_from={tmp_path / 'first'}", "optim.lr=0", "optim.min_lr=0", "optim.warmup_lr=0")
    run(config2)
    assert same(load_model(tmp_path / "run").model.state_dict(), trained.state_dict())

    trained.reset_classifier(7)
    torch.save(trained.state_dict(), tmp_path / "seven.pth")
    run(config(f"init_from={tmp_path / 'seven.pth'}", "optim.lr=0", "optim.min_lr=0", run_dir="other"))
    other = load_model(tmp_path / "other").model
    assert other.head.fc.weight.shape[0] == 10
    assert torch.equal(other.stem.proj.weight, trained.stem.proj.weight)


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.precision=bf16-mixed", "optim.ema_decay=0.9"],
        ["model.grad_checkpointing=true"],
        ["data.augment.mixup=0.2", "data.augment.cutmix=1.0", "data.augment.smoothing=0.1", "data.batch_size=31"],
        ["trainer.gradient_clip_val=0.1", "optim.opt=sgd", "optim.layer_decay=0.8"],
        ["data.augment.auto_augment=rand-m9-mstd0.5-inc1", "data.augment.reprob=0.5", "data.augment.hflip=0.5"],
        ["model.name=test_resnet", "data.img_size=32"],
        ["model.name=v_sequencer_s_pe", "data.img_size=14", "model.kwargs={layers: [1, 0, 0, 0], shuffle: true}"],
        ["logger=tensorboard"],
    ],
    ids=lambda options: options[0],
)
def test_options_train(config, options):
    summary = run(config("trainer.max_epochs=1", *options))
    assert np.isfinite(summary["test/loss"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo reads .grad of what is no leaf
def test_compiled_run_saves_plain_names(config, tmp_path):
    run(config("trainer.compile=true", "trainer.max_epochs=1", "trainer.limit_train_batches=1"))
    names = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert not any("_orig_mod" in name for name in names)


def test_backend_and_recompute(config, tmp_path):
    """The run takes the kernels it is told to, says so, and recomputing changes nothing but the cost."""
    results = {}
    for name, options in {
        "reference": ["model.backend=reference"],
        "kept": [],
        "recomputed": ["model.recompute=true"],
    }.items():
        run(config(*options, f"run_dir={tmp_path / name}"))
        results[name] = float(rows(tmp_path / name)[-1]["val/loss"])
    assert "lstm: reference kernels (reference was asked for)" in (tmp_path / "reference" / "train.log").read_text()
    assert (tmp_path / "kept" / "train.log").read_text().count(" kernels (the fastest that serves it") == 1
    assert results["kept"] == results["recomputed"]
    assert results["kept"] == pytest.approx(results["reference"], rel=1e-3)


def test_early_stopping(config):
    options = ["trainer.max_epochs=9", "trainer.early_stopping_patience=2", "optim.lr=0", "optim.warmup_lr=0"]
    assert run(config(*options, "optim.min_lr=0"))["epochs"] == 3


def test_wandb_without_a_key_logs_offline_and_never_asks(config, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run(config("logger=wandb", "trainer.max_epochs=1"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.name=sequencer2d_x"], "sequencer2d_"),
        (["data.img_size=9"], "8 and 10"),
        (["model.kwargs={cell: lstmm}"], "lstmm"),
        (["model.kwargs={depth: 3}"], "depth"),
        (["init_from=nowhere"], "nowhere"),
        (["model.num_classes=3"], "10 classes"),
        (["trainer.strategy=nonsense"], "nonsense"),
        (["optim.opt=adamx"], "adamx"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_requests_that_cannot_be_met(config, tmp_path, options, message):
    with pytest.raises(RequestError, match=message) as error:
        run(config(*options))
    assert str(error.value).count("\n") <= 1
    assert not (tmp_path / "run").exists()


def test_random_state_comes_back():
    torch.manual_seed(1)
    np.random.seed(1)
    state = get_random_state()
    first = torch.rand(3), np.random.rand(3)
    set_random_state(state)
    second = torch.rand(3), np.random.rand(3)
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all()
