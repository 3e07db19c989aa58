"""What a run writes, and how it is resumed."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from sequencer.analysis import write_sweep
from sequencer.config import Config, RequestError
from sequencer.export.card import model_card
from sequencer.models import load_model, read_checkpoint
from sequencer.training import Classifier, run
from sequencer.training.divergence import DivergenceGuard
from sequencer.training.ema import WeightEma
from sequencer.training.random_state import get_random_state, set_random_state
from sequencer.training.result import limited
from tests.helpers import (
    EMA,
    STATEFUL,
    assert_same_run,
    equal_tensors,
    fail,
    read_last,
    read_rows,
    run_interrupted,
    terminate,
)
from tests.pictures import leave_blank
from tests.processes import run_function


def test_run_folder(finished):
    folder, summary = finished
    files = ".lock config.yaml metrics.csv checkpoints model summary.json train.log curves.png confusion.png"
    assert {path.name for path in folder.iterdir()} == set(files.split())
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    files = ["README.md", "config.json", "confusion.png", "model.safetensors"]
    assert sorted(path.name for path in (folder / "model").iterdir()) == files
    assert (folder / "model" / "confusion.png").read_bytes() == (folder / "confusion.png").read_bytes()
    card = ModelCard.load(folder / "model" / "README.md")
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["test", "accuracy"] == summary["test/top1"]
    assert results["validation", "loss"] == summary["val/loss"]
    assert "digits: 1,295 training, 143 validation and 359 test images" in card.text
    assert str(folder) not in card.content
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert 0 <= summary["test/top1"] <= 1
    best = read_rows(folder)[summary["best_epoch"] - 1]
    for name in ("train/loss", "train/top1", "val/loss"):
        assert summary[name] == float(best[name])
    assert OmegaConf.load(folder / "config.yaml").data.name == "digits"
    log = (folder / "train.log").read_text()
    assert "epoch 1/2" in log
    assert "epoch 2/2" in log


def test_best_metric_epoch_takes_the_last_epoch_although_it_is_no_better(config, tmp_path):
    summary = run(config("trainer.best_metric=epoch", "trainer.max_epochs=3", "optim.lr=0", "optim.min_lr=0"))
    assert len({row["val/loss"] for row in read_rows(tmp_path / "run")}) == 1
    assert summary["best_epoch"] == 3


def test_a_lower_loss_is_better(config, tmp_path):
    """By checkpoints, early stopping and the log."""
    options = ["trainer.best_metric=val/loss", "trainer.early_stopping_patience=1", "trainer.max_epochs=3"]
    summary = run(config(*options, "optim.lr=0.01"))
    losses = [float(row["val/loss"]) for row in read_rows(tmp_path / "run")]
    assert losses[0] > losses[1] > losses[2]
    assert summary["best_epoch"] == 3
    epochs = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if " epoch " in line]
    assert [line.endswith(" best") for line in epochs] == [True] * 3


def test_metrics_rows(finished):
    table = read_rows(finished[0])
    assert [row["epoch"] for row in table] == ["1", "2"]
    assert [row["step"] for row in table] == ["4", "8"]
    assert all(float(row["train/loss"]) > 0 for row in table)
    for row in table:  # 128 images, and validation on top of their time
        assert 128 / float(row["time/images_per_s"]) < float(row["time/epoch_s"]) + 0.001


@pytest.mark.parametrize(("limit", "batches"), [(None, 9), (4, 4), (20, 9), (0, 0), (0.5, 4), (1.0, 9), (0.0, 0)])
def test_limits_of_batches_are_lightnings(limit, batches):
    assert limited(9, limit) == batches


def test_training_loss_is_the_mean_over_images(config, tmp_path, monkeypatch):
    seen = []
    original = Classifier.training_step

    def spy(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        seen.append((len(batch[0]), loss.item()))
        return loss

    monkeypatch.setattr(Classifier, "training_step", spy)
    run(config("trainer.max_epochs=1"))
    expected = sum(n * loss for n, loss in seen) / sum(n for n, _ in seen)
    assert float(read_rows(tmp_path / "run")[0]["train/loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_short_last_window_of_accumulation_weighs_as_much_as_the_others(config, monkeypatch):
    """Of five batches accumulated in twos the last one is alone: its update takes its whole gradient, not half."""
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


def test_the_log_describes_batch_and_learning_rates(config, tmp_path):
    run(config("trainer.accumulate_grad_batches=2", "optim.lr=0.01", "optim.layer_decay=0.5", "trainer.max_epochs=1"))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "INFO batch 64 (32 x 2 passes per update), learning rate 0.01\n" in log
    rates = {float(rate) for rate in re.findall(r"parameter group \d+: .*, lr ([0-9.e-]+),", log)}
    assert rates == {0.01, 0.005, 0.0025}  # head, block, stem: decay is in each group's own rate


def test_the_same_seed_gives_the_same_run(config, tmp_path, whole):
    run(config(*STATEFUL, run_dir="again"))
    assert_same_run(whole, tmp_path / "again")
    run(config(*STATEFUL, "trainer.max_epochs=1", "seed=1", run_dir="other"))
    assert read_rows(tmp_path / "other")[0]["train/loss"] != read_rows(whole)[0]["train/loss"]


@pytest.mark.parametrize(
    ("action", "expected", "hook", "updates", "workers"),
    [
        pytest.param(
            *how, workers, id=f"{name}-{workers}", marks=pytest.mark.slow if name != "stopped" and workers else ()
        )
        for name, how in {
            "failed": (fail, RuntimeError, "training", 2),  # saved at the end of the first epoch
            "stopped": (terminate, SystemExit, "training", 4),  # saved at the end of a window of accumulation
            "stopped-in-validation": (terminate, SystemExit, "validation", 4),
        }.items()
        for workers in (0, 2)
    ],
)
def test_a_resumed_run_is_the_same_run(config, tmp_path, whole, workers, action, expected, hook, updates):
    options = [*STATEFUL, f"data.num_workers={workers}"]
    run_interrupted(config(*options), action, expected, hook)
    assert not multiprocessing.active_children()  # loader workers
    assert len(read_rows(tmp_path / "run")) == 1
    assert read_last(tmp_path / "run")["global_step"] == updates
    run(config(*options), resume=True)
    assert len(read_rows(whole)) == 3
    assert_same_run(whole, tmp_path / "run")


def test_a_run_stopped_twice_in_a_validation_is_the_same_run(config, tmp_path, whole):
    """The second checkpoint holds the random states of the first: no batch has been trained on in between."""
    for resume in (False, True):
        run_interrupted(config(*STATEFUL), terminate, SystemExit, "validation", resume=resume)
    run(config(*STATEFUL), resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_ctrl_c_leaves_a_run_that_can_be_resumed(config, tmp_path):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        run_interrupted(config(), lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(read_rows(tmp_path / "run")) == 1
    assert not list(tmp_path.rglob("*.partial"))
    assert read_last(tmp_path / "run")["global_step"] == 4 + 3  # no update is lost
    assert run(config(), resume=True)["epochs"] == 2


def test_sigterm_ends_with_143(config):
    error = run_interrupted(config(), terminate, SystemExit)
    assert error.code == 143


def test_resuming_a_finished_run_trains_nothing(config, tmp_path, finished):
    folder, summary = finished
    shutil.copytree(folder, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run(config(), resume=True) == summary
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_a_result_that_is_not_finite_is_shown(config, tmp_path, finished, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"val/loss": None}))
    run(config(), resume=True)
    assert re.search(r"validation, raw weights .* nan\b", capsys.readouterr().out)


def test_a_run_killed_before_its_summary_is_finished_by_resuming(config, tmp_path, finished):
    folder, summary = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert run(config(), resume=True) == summary


def test_a_finished_run_can_be_given_more_epochs(config, tmp_path, finished):
    folder, first = finished
    shutil.copytree(folder, tmp_path / "run")
    more = run(config("trainer.max_epochs=4"), resume=True)
    assert more["epochs"] == 4
    assert more["val/top1"] >= first["val/top1"]  # the best epoch is kept
    assert [row["epoch"] for row in read_rows(tmp_path / "run")] == ["1", "2", "3", "4"]


def test_resuming_before_the_first_checkpoint_starts_over(config):
    assert run(config(), resume=True)["epochs"] == 2


def test_raw_and_ema_are_kept_apart(config, tmp_path):
    summary = run(config(*EMA, "optim.lr=0.03"))
    folder = tmp_path / "run"
    checkpoint = read_checkpoint(folder / "checkpoints" / "best.ckpt")
    raw = {name.removeprefix("model."): t for name, t in checkpoint["state_dict"].items() if name.startswith("model.")}
    assert not equal_tensors(raw, checkpoint["state_dict_ema"])
    shipped = load_model(folder)
    assert shipped.slot == "ema"
    assert equal_tensors(shipped.model.state_dict(), checkpoint["state_dict_ema"])
    assert equal_tensors(load_model(folder, slot="raw").model.state_dict(), raw)
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
    assert equal_tensors(load_model(tmp_path / "run").model.state_dict(), trained.state_dict())

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


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_run_saves_plain_names(config, tmp_path, backend):
    run_function(run_compiled, config("trainer.max_epochs=1", "trainer.limit_train_batches=1"), backend)
    names = read_last(tmp_path / "run")["state_dict"]
    assert {name.removeprefix("model.") for name in names} == load_model(tmp_path / "run").model.state_dict().keys()


def run_compiled(config: Config, backend: str) -> None:
    leave_blank()
    calls = []
    compile_module = torch.nn.Module.compile

    def compile(self):
        calls.append(self)
        compile_module(self, backend=backend)

    torch.nn.Module.compile = compile
    config.trainer.compile = True
    run(config)
    assert len(calls) == 1
    assert calls[0]._compiled_call_impl is not None


def test_backend_and_recompute(config, tmp_path, finished):
    """The run uses and names the kernels that were asked for, and recomputation changes no bit."""
    run(config("model.backend=reference", run_dir="reference"))
    run(config("model.recompute=true", run_dir="recomputed"))
    folders = {"kept": finished[0], "recomputed": tmp_path / "recomputed", "reference": tmp_path / "reference"}
    weights = {name: read_last(folder)["state_dict"] for name, folder in folders.items()}
    losses = {name: float(read_rows(folder)[-1]["val/loss"]) for name, folder in folders.items()}
    assert "reference lstm kernels: reference was asked for" in (tmp_path / "reference" / "train.log").read_text()
    assert (finished[0] / "train.log").read_text().count(" kernels: the fastest available") == 1
    assert losses["kept"] == losses["recomputed"]
    assert equal_tensors(weights["kept"], weights["recomputed"])
    assert losses["kept"] == pytest.approx(losses["reference"], rel=1e-3)
    for name, weight in weights["kept"].items():
        torch.testing.assert_close(weight, weights["reference"][name], rtol=1e-3, atol=1e-4)


def test_early_stopping(config):
    options = ["trainer.max_epochs=9", "trainer.early_stopping_patience=2", "optim.lr=0", "optim.warmup_lr=0"]
    assert run(config(*options, "optim.min_lr=0"))["epochs"] == 3


def test_wandb_without_a_key_logs_offline(config, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run(config("logger=wandb", "trainer.max_epochs=1"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.name=sequencer2d_x"], "sequencer2d_"),
        (["data.img_size=1"], "smaller than the total stride 2"),
        (["model.kwargs={cell: lstmm}"], "lstmm"),
        (["model.kwargs={depth: 3}"], "depth"),
        (["init_from=nowhere"], "nowhere"),
        (["model.num_classes=3"], "10 classes"),
        (["trainer.strategy=nonsense"], "nonsense"),
        (["optim.opt=adamx"], "adamx"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_requests_write_nothing(config, tmp_path, options, message):
    with pytest.raises(RequestError, match=message) as error:
        run(config(*options))
    assert str(error.value).count("\n") <= 1
    assert not (tmp_path / "run").exists()


def test_random_states_are_restored():
    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))

    draw()  # leaves half a pair of normal numbers behind
    state = get_random_state()
    first, second = draw(), draw()
    assert first != second
    set_random_state(state)
    assert (draw(), draw()) == (first, second)


def test_numbers_that_are_not_finite_are_null_in_json(config, tmp_path):
    """A run without validation: its metrics are NaN, which JSON does not have."""
    wanted = config("trainer.limit_val_batches=0", "trainer.max_loss=inf", "trainer.best_metric=epoch")
    summary = run(wanted)
    assert math.isnan(summary["val/loss"])
    read = {
        name: json.loads((tmp_path / "run" / name).read_text(), parse_constant=pytest.fail)
        for name in ("summary.json", "model/config.json")
    }
    assert read["summary.json"]["val/loss"] is None
    assert read["model/config.json"]["metrics"]["val/loss"] is None
    assert read["model/config.json"]["config"]["trainer"]["max_loss"] is None
    again = run(wanted, resume=True)
    assert math.isnan(again["val/loss"])
    assert again.keys() == summary.keys()
    model_card(load_model(tmp_path / "run"), "name")
    assert len(write_sweep(tmp_path, "title")) == 1
