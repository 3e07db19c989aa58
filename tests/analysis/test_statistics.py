"""Statistics of predictions, against scikit-learn, published examples and counts by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from sequencer.analysis.statistics import (
    area_under_roc,
    calibration,
    class_statistics,
    compare_paired,
    confused_pairs,
    holm,
    label_errors,
)


@pytest.fixture
def answers():
    """Labels, predictions and probabilities of 300 images of four classes; the last class has no image."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    logits = generator.normal(size=(300, 4))
    logits[np.arange(300), labels] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities.argmax(axis=1), probabilities


def test_results_of_classes_are_those_of_scikit_learn(answers):
    labels, predicted, probabilities = answers
    found = class_statistics(labels, predicted, probabilities)
    settings = {"labels": range(4), "average": None, "zero_division": 0}
    for name, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        values = [getattr(row, name).value for row in found]
        assert np.nan_to_num(values).tolist() == pytest.approx(function(labels, predicted, **settings).tolist())
    assert [row.support for row in found] == [*np.bincount(labels), 0]
    assert [row.auc.value for row in found[:3]] == pytest.approx(
        [roc_auc_score(labels == k, probabilities[:, k]) for k in range(3)]
    )
    assert math.isnan(found[3].auc.value)
    assert math.isnan(found[3].recall.value)
    for row in found[:3]:
        for interval in row[1:]:
            assert interval.low < interval.value < interval.high


def test_images_without_a_prediction_count_as_wrong():
    labels, predicted = np.array([0, 0, 1]), np.array([0, -1, 1])
    probabilities = np.array([[0.9, 0.1], [np.nan, np.nan], [0.2, 0.8]])
    first, second = class_statistics(labels, predicted, probabilities)
    assert (first.recall.value, first.precision.value, first.auc.value) == (0.5, 1.0, 1.0)
    assert (second.recall.value, second.precision.value) == (1.0, 1.0)


def test_f1_of_classes_without_a_hit():
    """A class that is never predicted has no F1; one that is never right has an F1 of 0 without an interval."""
    labels, predicted = np.array([0, 0, 1, 2]), np.array([0, 2, 0, 0])
    first, never, wrong = (row.f1 for row in class_statistics(labels, predicted, np.eye(3)[predicted]))
    assert first.low <= first.value <= first.high
    assert np.isnan(never).all()
    assert wrong.value == 0
    assert np.isnan(wrong[1:]).all()


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of 400 samples of 200 images, the 95% intervals cover the true AUC and F1 in 92% to 98%."""
    generator = np.random.default_rng(1)
    area = 0.5 * (1 + math.erf(1 / 2))  # of two normal distributions one deviation apart
    truth = 0.6914624612740131  # F1 at the threshold midway, where precision and recall are both the share below 0.5
    covered = np.zeros(2)
    for _ in range(400):
        positive = generator.random(200) < 0.5
        scores = generator.normal(size=200) + positive
        auc = area_under_roc(scores, positive)
        predicted = (scores > 0.5).astype(int)
        probabilities = np.stack([-scores, scores], axis=1)
        f1 = class_statistics(positive.astype(int), predicted, probabilities)[1].f1
        covered += [auc.low <= area <= auc.high, f1.low <= truth <= f1.high]
    assert covered / 400 == pytest.approx([0.95, 0.95], abs=0.03), covered / 400


def test_delong_on_separated_and_tied_scores():
    assert area_under_roc(np.array([1.0, 2, 3, 4]), np.array([0, 0, 1, 1], bool)).value == 1
    assert area_under_roc(np.ones(6), np.array([0, 0, 0, 1, 1, 1], bool)).value == 0.5
    assert math.isnan(area_under_roc(np.ones(3), np.ones(3, bool)).value)


def test_confused_pairs():
    confusion = np.array([[5, 2, 0], [7, 1, 2], [0, 0, 3]])
    assert confused_pairs(confusion) == [(1, 0, 7), (0, 1, 2), (1, 2, 2)]


def test_calibration_of_a_model_that_is_too_sure():
    """Logits that are three times those of a calibrated model need the temperature 3."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 5))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (truth.cumsum(axis=1) > generator.random((20_000, 1))).argmax(axis=1)
    sharp = truth**3 / (truth**3).sum(axis=1, keepdims=True)
    found = calibration(labels, sharp)
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.error > 0.2
    assert found.error_at_temperature < 0.02
    assert found.counts.sum() == 20_000
    assert not found.counts[:3].any()
    filled = found.counts > 0
    by_hand = (found.counts * abs(found.confidence - found.accuracy))[filled].sum() / 20_000
    assert found.error == pytest.approx(by_hand, abs=1e-6)


def test_label_errors_are_confident_and_consistent():
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.1, 0.9], [0.2, 0.8], [0.45, 0.55]])
    mirrored = dict(enumerate(probabilities.copy()))
    assert label_errors(labels, probabilities, mirrored) == [2]
    assert label_errors(labels, probabilities, {}) == []
    mirrored[2] = np.array([0.6, 0.4])  # the mirror image is classified as labelled
    assert label_errors(labels, probabilities, mirrored) == []
    probabilities[2] = mirrored[2] = np.array([0.3, 0.7])  # less than the mean of class 1, which is 0.75
    assert label_errors(labels, probabilities, mirrored) == []
    unsure = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.3, 0.4, 0.3]])  # of a model that is sure of nothing
    assert label_errors(np.array([1, 0, 1]), unsure, dict(enumerate(unsure))) == []


def test_calibration_of_many_images_in_parts(monkeypatch, answers):
    labels, _, probabilities = answers
    whole = calibration(labels, probabilities)
    monkeypatch.setattr("sequencer.analysis.statistics.FITTED_VALUES", 700)  # 175 images at a time, every second fitted
    parts = calibration(labels, probabilities)
    assert parts.error == whole.error
    assert parts.temperature == pytest.approx(whole.temperature, rel=0.2)


def test_paired_comparison_is_mcnemars_exact_test():
    """Discordant pairs 1 and 8: the binomial tail 2 (1 + 9) / 2^9."""
    first = np.array([True] * 21 + [False] * 9 + [False] * 5)
    second = np.array([True] * 20 + [False] + [True] * 8 + [False] * 6)
    found = compare_paired(first, second)
    assert found[:4] == (20, 1, 8, 6)
    assert found.p_value == pytest.approx(2 * 10 / 2**9)
    assert found.difference.value == pytest.approx(-7 / 35)
    assert found.difference.low < -7 / 35 < found.difference.high < 0.0
    same = compare_paired(first, first)
    assert same.p_value == 1
    assert same.difference == (0, 0, 0)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
