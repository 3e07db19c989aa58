"""Classifier and DataModule in a plain Trainer, without this package's callbacks."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from sequencer.data import DataModule
from sequencer.models import create_model
from sequencer.training import Classifier, run
from sequencer.training.checkpoints import RunCheckpoints
from sequencer.training.divergence import DivergenceGuard
from sequencer.training.ema import WeightEma
from sequencer.training.module import IMAGES, reduce, size_phases, training_size
from sequencer.training.report import EpochReport
from sequencer.training.setup import build_parts, quieten
from tests.helpers import EMA, equal_tensors, read_last, read_rows

VALIDATION = {"val/loss", "val/top1", "val/top5", "val/balanced"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    """Silences Lightning's advice, which the test configuration makes an error."""
    quieten()


@pytest.fixture
def data(config) -> DataModule:
    data = DataModule(config().data, seed=0)
    data.setup()
    return data


@pytest.fixture
def module(config, data) -> Classifier:
    return build(config("optim.lr=0.01"), data.class_names)


def build(config, class_names) -> Classifier:
    pl.seed_everything(0, verbose=False)
    model = create_model("sequencer2d_t_8", num_classes=len(class_names), in_chans=1, img_size=8, **config.model.kwargs)
    return Classifier(model, config, class_names)


@pytest.fixture
def trainer(tmp_path):
    """`trainer(...)` builds a plain Trainer that writes into the test's folder."""
    plain = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "max_epochs": 2, "limit_train_batches": 4}
    return lambda **settings: pl.Trainer(**(plain | settings))


def test_fit_logs_metrics_over_all_images(module, data, trainer):
    """With batches of 32 images and a last one of 15, which weigh by their images."""
    plain = trainer()
    plain.fit(module, datamodule=data)
    assert {"train/loss", *VALIDATION} <= plain.callback_metrics.keys()
    loader = DataLoader(data.val_set, batch_size=len(data.val_set), collate_fn=lambda items: items)
    (items,) = list(loader)
    images, labels = torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
    with torch.no_grad():
        logits = module.eval()(images)
    top1 = (logits.argmax(1) == labels).double().mean()
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert float(plain.callback_metrics["val/top1"]) == pytest.approx(float(top1))
    assert float(plain.callback_metrics["val/loss"]) == pytest.approx(float(loss))


def test_fast_dev_run(module, data, trainer):
    plain = trainer(fast_dev_run=True)
    plain.fit(module, datamodule=data)
    assert plain.global_step == 1
    assert plain.callback_metrics.keys() >= VALIDATION


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled .* shuffling")
def test_overfit_batches_repeats_the_same_images(module, data, trainer):
    seen = []

    class Spy(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(batch[0].clone())

    plain = trainer(overfit_batches=2, max_epochs=15, callbacks=[Spy()], limit_train_batches=None)
    plain.fit(module, datamodule=data)
    assert len(seen) == 30
    assert all(torch.equal(images, seen[number % 2]) for number, images in enumerate(seen))
    assert float(plain.callback_metrics["train/loss"]) < 2.2  # of 2.30 at the start


@pytest.mark.parametrize(
    ("sizes", "epochs", "used"),
    [
        ([16, 24, 32], 1, [32]),
        ([16, 24, 32], 2, [24, 32]),
        ([16, 24, 32], 5, [16, 24, 24, 32, 32]),
        ([16, 32], 6, [16, 16, 16, 32, 32, 32]),
        ([8], 3, [8, 8, 8]),
    ],
)
def test_sizes_of_training_images(sizes, epochs, used):
    assert [training_size(sizes, epoch, epochs) for epoch in range(epochs)] == used
    assert [size for size, first, end in size_phases(sizes, epochs) for _ in range(first, end)] == used


def test_training_images_are_reduced_as_pil_does():
    images = torch.rand(3, 1, 12, 12)
    expected = [np.asarray(Image.fromarray(image[0].numpy()).resize((8, 8), Image.Resampling.BILINEAR))
                for image in images]  # fmt: skip
    np.testing.assert_allclose(reduce(images, 8)[:, 0], np.stack(expected), atol=1e-6)
    assert reduce(images, 12) is images


def test_training_images_grow_and_validation_images_do_not(config, data, trainer):
    module = build(config("data.augment.sizes=[4,6,8]"), data.class_names)
    seen = Counter()
    module.model.register_forward_pre_hook(
        lambda model, args: seen.update([(model.training, plain.current_epoch, args[0].shape[-1])])
    )
    plain = trainer(max_epochs=3)
    plain.fit(module, datamodule=data)
    assert {key: count for key, count in seen.items() if key[0]} == {(True, e, 4 + 2 * e): 4 for e in range(3)}
    assert {size for training, _, size in seen if not training} == {8}


def test_early_stopping_and_model_checkpoint_monitor_top1(module, data, trainer, tmp_path):
    module.lr = 0.0
    stopping = EarlyStopping("val/top1", mode="max", patience=1)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/top1", mode="max", filename="best")
    plain = trainer(callbacks=[stopping, checkpoint], enable_checkpointing=True, max_epochs=5)
    module.config.optim.min_lr = 0.0
    plain.fit(module, datamodule=data)
    assert plain.current_epoch == 2
    assert float(checkpoint.best_model_score) == float(plain.callback_metrics["val/top1"])
    assert (tmp_path / "best.ckpt").exists()


def test_a_run_resumes_from_a_stock_checkpoint(config, data, trainer, tmp_path):
    """Within an epoch, with the sums of that epoch; stock checkpoints hold no random states."""
    settings = config("optim.lr=0.01", "data.augment.mixup=0", "model.drop_path_rate=0")
    results = []
    for name in ("whole", "broken"):
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="at_{step}")
        plain = trainer(callbacks=[checkpoint], enable_checkpointing=True)
        module, served = build(settings, data.class_names), DataModule(settings.data, seed=0)
        path = tmp_path / "at_step=6.ckpt" if name == "broken" else None
        plain.fit(module, datamodule=served, ckpt_path=path, weights_only=True)
        results.append((module.state_dict(), dict(plain.callback_metrics)))
    (weights, metrics), (resumed_weights, resumed_metrics) = results
    assert equal_tensors(weights, resumed_weights)
    assert {"train/loss", *VALIDATION} <= metrics.keys()
    assert metrics == resumed_metrics


def test_learning_rate_finder_sets_the_rate_that_is_trained_with(config, data, trainer):
    module = build(config("optim.layer_decay=0.5", "optim.sched=constant"), data.class_names)
    rates, before = [], module.lr

    class Spy(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    finder = LearningRateFinder(min_lr=1e-5, max_lr=1.0, num_training_steps=30)
    plain = trainer(callbacks=[finder, Spy()], limit_train_batches=20, max_epochs=1)
    plain.fit(module, datamodule=data)
    found = finder.optimal_lr.suggestion()
    assert found not in (None, before)
    assert module.lr == found
    assert len(rates) == 20
    assert all(sorted(set(row)) == pytest.approx([found / 4, found / 2, found]) for row in rates)


def test_the_searched_batches_do_not_count(config, data, trainer):
    """Losses of the search for a learning rate are in no sum of the training."""
    module, totals = build(config(), data.class_names), []

    class Spy(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            totals.append(float(pl_module._train_totals[IMAGES]))

    trainer(callbacks=[LearningRateFinder(num_training_steps=12), Spy()], max_epochs=1).fit(module, datamodule=data)
    assert totals == [4 * 32]


def test_test_and_predict(module, data, trainer):
    plain = trainer()
    plain.fit(module, datamodule=data)
    (results,) = plain.test(module, datamodule=data, verbose=False)
    assert results.keys() == {"test/loss", "test/top1", "test/top5", "test/balanced"}
    probabilities = torch.cat(plain.predict(module, datamodule=data))
    assert probabilities.shape == (len(data.test_set), 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(data.test_set)))
    labels = torch.cat([labels for _, labels, _ in data.test_dataloader()])
    assert float((probabilities.argmax(1) == labels).double().mean()) == pytest.approx(results["test/top1"])


def test_plain_loaders_of_images_and_labels(module, trainer):
    images, labels = torch.randn(70, 1, 8, 8), torch.arange(70) % 10
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)
    plain = trainer()
    plain.fit(module, loader, loader)
    fitted = float(plain.callback_metrics["val/top1"])
    (validated,) = plain.validate(module, loader, verbose=False)
    (tested,) = plain.test(module, loader, verbose=False)
    assert validated["val/top1"] == tested["test/top1"] == pytest.approx(fitted)
    from_images = plain.predict(module, DataLoader(images, batch_size=16))
    assert all(torch.equal(a, b) for a, b in zip(from_images, plain.predict(module, loader), strict=True))


def test_a_schedule_without_an_end_is_refused(module, data, trainer):
    with pytest.raises(MisconfigurationException, match="give the Trainer max_epochs"):
        trainer(max_epochs=-1).fit(module, datamodule=data)


def test_a_saved_module_loads_without_a_trainer(module, data, trainer, config, tmp_path):
    module.lr = 0.02
    plain = trainer()
    plain.fit(module, datamodule=data)
    plain.save_checkpoint(tmp_path / "saved.ckpt")
    fresh = build(config(), data.class_names)
    loaded = Classifier.load_from_checkpoint(
        tmp_path / "saved.ckpt",
        model=fresh.model,
        config=fresh.config,
        class_names=data.class_names,
        weights_only=True,
    )
    assert equal_tensors(loaded.state_dict(), module.state_dict())
    assert loaded.lr == 0.02
    assert fresh.lr != 0.02  # the configuration that was given is not changed


class Counting(Logger):
    """Counts what is logged, and the steps."""

    name = version = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.steps: list[int] = []

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_result(self, *args) -> None:
        pass

    def close(self) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.names.update(metrics.keys())
        self.steps.append(step)


def test_a_plain_trainer_logs_each_metric_once_an_epoch(module, data, trainer):
    logger = Counting()
    trainer(logger=logger).fit(module, datamodule=data)
    assert {name: logger.names[name] for name in logger.names if name != "epoch"} == dict.fromkeys(
        ("train/loss", "train/top1", *VALIDATION), 2
    )


def test_a_run_logs_one_row_an_epoch(config, tmp_path, monkeypatch):
    logger = Counting()
    monkeypatch.setattr("sequencer.training.lifecycle.build_loggers", lambda *args: [logger])
    run(config(*EMA))
    row = read_rows(tmp_path / "run")[0].keys() - {"step"}
    assert dict(logger.names) == dict.fromkeys(row, 2)
    assert logger.steps == [3, 7]


@pytest.mark.parametrize("dropped", [DivergenceGuard, EpochReport, WeightEma, RunCheckpoints])
def test_without_a_callback_the_result_is_the_same_and_nothing_accumulates(config, finished, dropped):
    folder, _ = finished
    kept = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            kept.append(len(pl_module._window_losses))

    parts = build_parts(config("optim.ema_decay=0.9"), Spy())
    parts.trainer.callbacks = [callback for callback in parts.trainer.callbacks if not isinstance(callback, dropped)]
    parts.trainer.fit(parts.module, datamodule=parts.data)
    assert kept == [0] * 8
    assert equal_tensors(parts.module.state_dict(), read_last(folder)["state_dict"])
    row = read_rows(folder)[-1]
    metrics = {name: float(parts.trainer.callback_metrics[name]) for name in ("train/loss", *VALIDATION)}
    assert metrics == pytest.approx({name: float(row[name]) for name in metrics}, rel=1e-6)  # float32 in Lightning


def test_the_example_of_the_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = Path(__file__).parents[2] / "docs" / "reliability.md"
    (example,) = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    quick = "fast_dev_run=True, accelerator='cpu', enable_progress_bar=False"
    assert "max_epochs=3" in example
    names: dict = {}
    exec(example.replace("max_epochs=3", quick).replace("experiment=digits", "data.num_workers=0"), names)
    assert names["model"].head.fc.weight.abs().sum() > 0  # zero at first
