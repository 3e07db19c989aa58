"""Losses and gradients that are not finite, and losses that are too large."""

import importlib
import json
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sequencer.data import DataModule
from sequencer.training import Classifier, Diverged, run
from tests.helpers import EMA, RANDOM, read_last, read_rows

EXPLODING = ["optim.opt=sgd", "optim.lr=1000", "trainer.gradient_clip_val=null", "trainer.checkpoint_interval=0"]


def poison(monkeypatch, value: float, epoch: int = 1, gradient: bool = False) -> list[int]:
    """Spoils the loss, or its gradient alone, of the batch that is the third of an epoch, wherever it comes again.

    Returns:
        The indices of its images, once it has been seen.
    """
    original, take = Classifier.training_step, Classifier.take_window_losses
    seen: list[int] = []
    spoilt = []

    def step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        images = self.trainer.datamodule.images_of(self.current_epoch, batch_idx)
        if not seen and self.current_epoch == epoch and batch_idx == 2:
            seen.extend(images)
        spoilt.append(bool(seen) and self.current_epoch == epoch and sorted(images) == sorted(seen))
        return loss * value if spoilt[-1] else loss

    def take_window_losses(self):
        losses = take(self)
        window = spoilt[-len(losses) :]
        return [value if bad and not gradient else loss for loss, bad in zip(losses, window, strict=True)]

    monkeypatch.setattr(Classifier, "training_step", step)
    monkeypatch.setattr(Classifier, "take_window_losses", take_window_losses)
    return seen


@pytest.mark.parametrize(
    ("value", "gradient", "reason"),
    [
        (float("nan"), False, "the training loss is nan"),
        (float("inf"), False, "the training loss is inf"),
        (5000.0, False, "the training loss is 5000, above trainer.max_loss=1000"),
        (float("nan"), True, "the norm of the gradient is nan"),
    ],
)
def test_stops_before_the_update_with_a_record(config, tmp_path, monkeypatch, value, gradient, reason):
    images = poison(monkeypatch, value, gradient=gradient)
    with pytest.raises(Diverged) as error:
        run(config("trainer.checkpoint_interval=0"))
    message = str(error.value)
    assert message.startswith(f"epoch 2, batch 3: {reason}; the update was not applied")
    assert len(message.splitlines()) == 2
    record = json.loads((tmp_path / "run" / "divergence.json").read_text())
    assert record["reason"] == reason
    assert (record["epoch"], record["update"], record["seed"]) == (1, 7, 0)
    assert [batch["batch"] for batch in record["batches"]] == [2]
    assert record["batches"][0]["images"] == images
    assert len(images) == 32
    assert record["weight_norm"] > 0
    last = read_last(tmp_path / "run")
    assert last["global_step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in last["state_dict"].values())


def test_every_batch_of_an_update_is_recorded(config, tmp_path, monkeypatch):
    poison(monkeypatch, float("nan"))
    with pytest.raises(Diverged):
        run(config("trainer.accumulate_grad_batches=2"))
    record = json.loads((tmp_path / "run" / "divergence.json").read_text())
    assert [batch["batch"] for batch in record["batches"]] == [2, 3]
    data = DataModule(config().data, 0)
    data.setup()
    assert [batch["images"] for batch in record["batches"]] == [data.images_of(1, 2), data.images_of(1, 3)]


def test_rolls_back_and_reorders_the_rest_of_the_epoch(config, tmp_path, monkeypatch):
    poison(monkeypatch, float("nan"))
    summary = run(config(*RANDOM, *EMA, "trainer.on_divergence=rollback", "trainer.limit_train_batches=6"))
    assert summary["epochs"] == 2
    assert [row["step"] for row in read_rows(tmp_path / "run")] == ["6", "12"]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "the training loss is nan; back at update 6, attempt 1 of 3: the images that follow come in anoth" in log


def test_does_not_roll_back_for_ever(config, tmp_path):
    with pytest.raises(Diverged):
        run(config(*EXPLODING, "trainer.on_divergence=rollback"))
    log = (tmp_path / "run" / "train.log").read_text()
    attempts = re.findall(r"back at update (\d+), attempt (\d) of 3", log)
    last = str(read_last(tmp_path / "run")["global_step"])
    assert attempts[-3:] == [(last, "1"), (last, "2"), (last, "3")]
    assert len(set(attempts)) == len(attempts)  # counted for each checkpoint


def test_rollbacks_are_counted_for_each_checkpoint(config, monkeypatch):
    lifecycle = importlib.import_module("sequencer.training.lifecycle")
    updates, reshuffles = iter([0, 0, 5, 5, 5, 5]), []
    record = {"epoch": 0, "batches": [{"batch": 0}], "reason": "the training loss is nan"}

    def train(config, folder, resume, times):
        assert resume == bool(reshuffles)
        reshuffles.append(times)
        raise Diverged(record, Path(config.run_dir))

    monkeypatch.setattr(lifecycle, "_train", train)
    monkeypatch.setattr(lifecycle, "find_checkpoint", lambda run_dir: SimpleNamespace(updates=next(updates)))
    with pytest.raises(Diverged):
        run(config("trainer.on_divergence=rollback"))
    assert reshuffles == [0, 1, 2, 1, 2, 3]


def test_replay(config, tmp_path, load_script, capsys):
    with pytest.raises(Diverged):
        run(config(*EXPLODING, *EMA, "data.augment.mixup=0.4"))
    script = load_script("replay")
    assert script.main([str(tmp_path / "run")]) == 0
    assert "diverged in the same way: " in capsys.readouterr().out
    record = tmp_path / "run" / "divergence.json"
    changed = json.loads(record.read_text()) | {"weight_norm": 1.0}
    record.write_text(json.dumps(changed))
    assert script.main([str(tmp_path / "run")]) == 1
    assert "it diverged in another way: weight_norm differ" in capsys.readouterr().err
    record.unlink()
    assert script.main([str(tmp_path / "run")]) == 2


def test_a_reshuffle_reorders_the_rest_of_the_epoch(config):
    data = DataModule(config().data, 0)
    data.setup()
    once, twice = (DataModule(config().data, 0) for _ in range(2))
    for times, module in ((1, once), (2, twice)):
        module.setup()
        module.reshuffle(times)
        module.load_state_dict({"epoch": 1, "batches": 2, "reshuffles": []})
    batches = len(data.train_dataloader())
    orders = [[module.images_of(1, batch) for batch in range(batches)] for module in (data, once, twice)]
    assert orders[0][:2] == orders[1][:2] == orders[2][:2]
    assert all(a[2:] != b[2:] for a, b in combinations(orders, 2))
    assert all(len({image for batch in order for image in batch}) == batches * 32 for order in orders)
    assert data.images_of(2, 0) == once.images_of(2, 0)  # later epochs keep their order
