"""Losses and gradients that are not finite, and losses that explode."""

import json

import pytest
import torch

from sequencer.data import DataModule
from sequencer.models import read_checkpoint
from sequencer.training import Diverged, run
from sequencer.training.module import Classifier
from tests.training.test_run import EMA, RANDOM, rows

EXPLODING = ["optim.opt=sgd", "optim.lr=3e5", "trainer.gradient_clip_val=null", "trainer.checkpoint_interval=0"]


def poison(monkeypatch, value: float, epoch: int = 1, gradient: bool = False) -> list[int]:
    """Spoils the loss, or its gradient alone, of whatever batch holds a certain image; returns that image's label."""
    original = Classifier.training_step
    seen: list[int] = []

    def step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        images = self.trainer.datamodule.images_of(self.current_epoch, batch_idx)
        if not seen and self.current_epoch == epoch and batch_idx == 2:
            seen.extend(images)
        if seen and self.current_epoch == epoch and sorted(images) == sorted(seen):
            self.window_losses[-1] = loss.detach() if gradient else torch.tensor(value)
            return loss * value
        return loss

    monkeypatch.setattr(Classifier, "training_step", step)
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
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
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


def test_rolls_back_and_takes_the_rest_in_another_order(config, tmp_path, monkeypatch):
    poison(monkeypatch, float("nan"))
    summary = run(config(*RANDOM, *EMA, "trainer.on_divergence=rollback", "trainer.limit_train_batches=6"))
    assert summary["epochs"] == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == ["6", "12"]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "the training loss is nan; back at update 6, attempt 1 of 3: the images that follow come in anoth" in log


def test_does_not_roll_back_for_ever(config, tmp_path):
    with pytest.raises(Diverged):
        run(config(*EXPLODING, "trainer.on_divergence=rollback"))
    assert (tmp_path / "run" / "train.log").read_text().count(" of 3: the images that follow") >= 3


def test_replay(config, tmp_path, load_script, capsys):
    with pytest.raises(Diverged):
        run(config(*EXPLODING, *EMA, "data.augment.mixup=0.4"))
    script = load_script("replay")
    assert script.main([str(tmp_path / "run")]) == 0
    assert "the same again: " in capsys.readouterr().out
    record = tmp_path / "run" / "divergence.json"
    changed = json.loads(record.read_text()) | {"weight_norm": 1.0}
    record.write_text(json.dumps(changed))
    assert script.main([str(tmp_path / "run")]) == 1
    assert "it diverged otherwise: weight_norm differ" in capsys.readouterr().err
    record.unlink()
    assert script.main([str(tmp_path / "run")]) == 2


def test_the_order_after_a_reshuffle(config):
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
    assert orders[0][2:] != orders[1][2:] != orders[2][2:]
    assert all(len({image for batch in order for image in batch}) == batches * 32 for order in orders)
    assert data.images_of(2, 0) == once.images_of(2, 0)  # later epochs are as they were
