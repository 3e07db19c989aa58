"""Metrics compared with scikit-learn, in uneven batches and over several ranks."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from sequencer import distributed
from sequencer.evaluation import ClassificationMetrics, describe_unpredicted


def sample(num_classes: int, count: int = 203) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(count, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (count,), generator=generator)


def measure(logits: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> ClassificationMetrics:
    metrics = ClassificationMetrics(logits.shape[1])
    for batch in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update(*batch)
    return metrics


@pytest.mark.parametrize("num_classes", [2, 3, 5, 10])
def test_equals_scikit_learn(num_classes):
    logits, labels = sample(num_classes)
    metrics = measure(logits, labels, [64, 1, 100, 38])
    values = {name: value.item() for name, value in metrics.compute().items()}
    predicted = logits.argmax(1)
    assert values["total"] == 203
    assert values["top1"] == (predicted == labels).sum().item() / 203
    if num_classes > 5:
        expected = top_k_accuracy_score(labels, logits, k=5, labels=range(num_classes), normalize=False)
        assert values["top5"] == expected / 203
    else:
        assert "top5" not in values  # of five classes or fewer it says nothing
    assert values["balanced"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert values["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-12)
    expected = confusion_matrix(labels, predicted, labels=range(num_classes))
    assert torch.equal(metrics.confusion, torch.from_numpy(expected))
    results = metrics.per_class([f"class {i}" for i in range(num_classes)])
    precision, recall, _, support = precision_recall_fscore_support(labels, predicted)
    assert [result.support for result in results] == support.tolist()
    assert [result.precision for result in results] == pytest.approx(precision.tolist())
    assert [result.recall for result in results] == pytest.approx(recall.tolist())


def test_sizes_of_batches_do_not_matter():
    logits, labels = sample(10)
    whole, single = measure(logits, labels, [203]), measure(logits, labels, [1] * 203)
    assert torch.equal(whole.counts, single.counts)
    assert whole.compute()["loss"].item() == pytest.approx(single.compute()["loss"].item(), rel=1e-12)


def test_ranks_are_merged_by_sums(monkeypatch):
    """Four ranks with uneven shares, one of them empty, as threads with a gloo group each."""
    logits, labels = sample(10)
    sizes = [100, 3, 0, 100]
    whole = measure(logits, labels, [203])
    store = dist.HashStore()
    own = threading.local()
    monkeypatch.setattr(distributed, "world_size", lambda: len(sizes))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: own.group.allreduce([tensor]).wait())

    def evaluate(rank, share):
        own.group = dist.ProcessGroupGloo(store, rank, len(sizes), timedelta(seconds=30))
        metrics = measure(*share, [len(share[0])])
        metrics.merge_processes()
        return metrics

    with ThreadPoolExecutor(len(sizes)) as pool:
        shares = zip(logits.split(sizes), labels.split(sizes), strict=True)
        merged = list(pool.map(evaluate, range(len(sizes)), shares))
    expected = {name: value.item() for name, value in whole.compute().items()}
    for metrics in merged:
        assert torch.equal(metrics.counts, whole.counts)
        assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(expected, rel=1e-12)
        assert metrics.per_class(list("abcdefghij")) == whole.per_class(list("abcdefghij"))


def test_ties_go_to_the_lower_index():
    metrics = measure(torch.zeros(8, 8), torch.arange(8), [8])
    values = metrics.compute()
    assert values["top1"] == 1 / 8
    assert values["top5"] == 5 / 8
    assert metrics.confusion[:, 0].tolist() == [1] * 8


def test_a_nan_logit_is_a_miss():
    logits = F.one_hot(torch.tensor([0, 1, 2, 2]), 6).float()
    logits[2, 4] = math.nan
    logits[3] = math.nan
    metrics = measure(logits, torch.tensor([0, 1, 2, 2]), [4])
    values = metrics.compute()
    assert values["total"] == 4
    assert values["top1"] == values["top5"] == 0.5
    assert math.isnan(values["loss"])
    assert metrics.confusion.sum() == 2
    assert metrics.per_class(list("abcdef"))[2] == ("c", 2, None, 0.0)


def test_a_class_without_images_has_no_recall():
    result = measure(torch.eye(3), torch.tensor([0, 0, 0]), [3]).per_class(["a", "b", "c"])
    assert result[0] == ("a", 3, 1.0, 1 / 3)
    assert result[1] == ("b", 0, 0.0, None)


def test_other_number_of_classes_is_an_error():
    with pytest.raises(ValueError, match=r"\(4, 7\); expected \(B, 5\)"):
        ClassificationMetrics(5).update(torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64))


def test_reset_in_inference_mode_and_update_outside():
    logits, labels = sample(5)
    metrics = measure(logits, labels, [203])
    with torch.inference_mode():
        metrics.reset()
        metrics.update(logits, labels)
    metrics.update(logits, labels)
    assert metrics.compute()["total"] == 406


def test_half_precision_logits():
    logits, labels = sample(5)
    loss = measure(logits.bfloat16(), labels, [203]).compute()["loss"]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(F.cross_entropy(logits.bfloat16().double(), labels).item(), rel=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_counts_on_a_gpu():
    logits, labels = sample(10)
    logits = logits.round()  # many ties
    on_cpu, on_gpu = measure(logits, labels, [203]), ClassificationMetrics(10, "cuda")
    on_gpu.update(logits.cuda(), labels.cuda())
    assert torch.equal(on_gpu.counts.cpu(), on_cpu.counts)
    assert on_gpu.top5_hits.item() == on_cpu.top5_hits.item()


@pytest.mark.parametrize(("support", "unbalanced"), [((3, 3, 3), False), ((5, 3, 0), False), ((6, 3, 4), True)])
def test_classes_are_unbalanced_where_one_has_twice_the_images_of_another(support, unbalanced):
    labels = torch.arange(3).repeat_interleave(torch.tensor(support))
    assert measure(torch.zeros(len(labels), 3), labels, [len(labels)]).unbalanced is unbalanced


def test_classes_that_are_never_predicted_are_named():
    labels = torch.arange(8)
    logits = F.one_hot(labels, 9).float()
    found = measure(logits, labels, [8]).per_class([f"class {i}" for i in range(9)])
    assert describe_unpredicted(found) == ""  # the ninth has no image
    found = measure(torch.zeros(8, 9), labels, [8]).per_class(["a", "b", "c\n", *"defghi"])
    assert describe_unpredicted(found) == r"never predicted: b, c\n, d, e, f and 2 more"
