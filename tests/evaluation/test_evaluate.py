"""The evaluation loop."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sequencer.evaluation import ClassificationMetrics, evaluate


def test_equals_one_large_batch():
    torch.manual_seed(0)
    images, labels = torch.randn(70, 1, 4, 4), torch.randint(3, (70,))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    metrics = evaluate(model, DataLoader(TensorDataset(images, labels), batch_size=32), 3, "cpu")
    assert not model.training
    expected = ClassificationMetrics(3)
    expected.update(model(images), labels)
    assert torch.equal(metrics.counts, expected.counts)
    assert metrics.compute()["total"] == 70
    assert metrics.compute()["loss"].item() == expected.compute()["loss"].item()


def test_draws_no_bar_where_there_is_no_terminal(capsys):
    evaluate(nn.Flatten(), [(torch.zeros(2, 1, 1, 3), torch.tensor([0, 1]))], 3, "cpu")
    assert capsys.readouterr() == ("", "")


def test_gives_the_terminal_a_bar_on_standard_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    evaluate(nn.Flatten(), iter([(torch.zeros(2, 1, 1, 3), torch.tensor([0, 1]))]), 3, "cpu")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "evaluating" in printed.err
