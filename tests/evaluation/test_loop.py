"""The evaluation loop on batches of labelled images."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sequencer.evaluation import ClassificationMetrics, FlipAveraged, evaluate

BATCHES = [(torch.zeros(2, 1, 1, 3), torch.tensor([0, 1]), torch.tensor([0, 1]))]


def test_equals_one_large_batch():
    torch.manual_seed(0)
    images, labels = torch.randn(70, 1, 4, 4), torch.randint(3, (70,))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    loader = DataLoader(TensorDataset(images, labels, torch.arange(70)), batch_size=32)
    metrics = evaluate(model, loader, 3, "cpu", found := [])
    assert not model.training
    expected = ClassificationMetrics(3)
    expected.update(model(images), labels)
    assert torch.equal(metrics.counts, expected.counts)
    assert metrics.compute()["total"] == 70
    # products and softmax round by the size of the batch; a mean of the batches' means would differ by 0.04
    assert metrics.compute()["loss"].item() == pytest.approx(expected.compute()["loss"].item(), rel=1e-6)
    assert [one.image for one in found] == list(range(70))
    probabilities = model(images).softmax(dim=1)
    for one, row, label in zip(found, probabilities.tolist(), labels.tolist(), strict=True):
        assert (one.label, one.predicted) == (label, row.index(max(row)))
        assert one.probability == pytest.approx(max(row))
        assert one.rank == 1 + sum(p > row[label] for p in row)


def test_no_bar_without_a_terminal(capsys):
    evaluate(nn.Flatten(), BATCHES, 3, "cpu")
    assert capsys.readouterr() == ("", "")


def test_bar_on_standard_error_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    evaluate(nn.Flatten(), iter(BATCHES), 3, "cpu")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "evaluating" in printed.err


def test_a_nan_output_is_no_prediction():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])
    evaluate(nn.Identity(), [(logits, torch.tensor([1, 1]), torch.tensor([8, 9]))], 2, "cpu", found := [])
    assert found[0][:3] == (8, 1, 1)
    assert found[1] == (9, 1, None, None, None)


def test_flip_averages_probabilities():
    torch.manual_seed(0)
    images, model = torch.randn(5, 1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    images = images.double()
    expected = (model(images).softmax(dim=1) + model(images.flip(3)).softmax(dim=1)) / 2
    torch.testing.assert_close(FlipAveraged(model)(images).exp(), expected)
