"""The evaluation of a model on a split, as a function."""

import csv
import json
import math
import time
from dataclasses import replace
from statistics import NormalDist

import pytest
import timm
import torch

from sequencer.config import RequestError
from sequencer.data import eval_transform, open_split
from sequencer.evaluation import at_img_size, data_settings, evaluate_model, evaluation_data, write_evaluation
from sequencer.evaluation.split import _wilson_interval
from sequencer.models import LoadedModel, create_model, load_model, pretrained_cfg, timm_preprocessing
from tests.helpers import ARGS, DIGITS, read_csv, save_run


@pytest.fixture
def loaded(tmp_path) -> LoadedModel:
    return load_model(save_run(tmp_path / "run", DIGITS, list("0123456789")))


def test_evaluation(loaded, tmp_path):
    data = evaluation_data(loaded)
    start = time.perf_counter()
    found = evaluate_model(loaded, data, "val")
    assert 0 < found.metrics["time/evaluation_s"] < time.perf_counter() - start
    images = open_split(DIGITS, "val", eval_transform(DIGITS))
    logits = loaded.model(torch.stack([image for image, _ in images]))
    hits = logits.argmax(1).numpy() == images.labels
    assert found.metrics["top1"] == hits.mean()
    assert (found.metrics["total"], found.metrics["unreadable"]) == (len(images), 0)
    assert [outcome.predicted for outcome in found.outcomes] == logits.argmax(1).tolist()
    assert found.class_names == list("0123456789")
    assert found.ids == [str(index) for index in images.indices]
    assert [row.support for row in found.per_class] == torch.bincount(torch.from_numpy(images.labels)).tolist()
    assert not list(tmp_path.glob("*.csv"))
    assert {name: found.record()[name] for name in ("arch", "split", "img_size")} == {
        "arch": "sequencer2d_t_8",
        "split": "val",
        "img_size": 8,
    }


def test_split_and_data_set_are_those_of_the_run(loaded):
    data = evaluation_data(loaded)
    assert data == replace(DIGITS, augment=data.augment)
    assert evaluate_model(loaded, data).split == "test"


@pytest.mark.parametrize("address", ["https://host/shards", "s3://bucket/shards"])
def test_the_file_of_a_model_opens_no_connection(tmp_path, address):
    """The address must be repeated, and its `data.download` counts for nothing."""
    data = replace(DIGITS, name="webdataset", root=address, download=True)
    loaded = load_model(save_run(tmp_path / "run", data, list("0123456789")))
    with pytest.raises(RequestError, match=f"trained on data at {address}\nto connect to it, add --data-root"):
        evaluation_data(loaded)
    found = evaluation_data(loaded, root=address)
    assert (found.root, found.download) == (address, False)


def test_wrong_requests(loaded):
    data = evaluation_data(loaded)
    other = LoadedModel(create_model("sequencer2d_t_8", **ARGS), "sequencer2d_t_8", "raw", None, loaded.pretrained_cfg)
    with pytest.raises(RequestError, match="the data set that sequencer2d_t_8 was trained on is not known"):
        evaluation_data(other)
    with pytest.raises(RequestError, match="the model has 1000 classes, the data set 10"):
        evaluate_model(other, evaluation_data(other, "digits"))
    with pytest.raises(RequestError, match="takes no images of 1 px"):
        evaluate_model(loaded, replace(data, img_size=1))


def test_files_of_unusual_results(loaded, tmp_path):
    """JSON has no NaN, and an image without a prediction has empty cells."""
    torch.nn.init.constant_(loaded.model.get_classifier().bias, torch.nan)
    found = evaluate_model(loaded, evaluation_data(loaded))
    assert math.isnan(found.metrics["loss"])
    write_evaluation(found, tmp_path / "new", "MODEL")
    record = json.loads((tmp_path / "new" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert (record["model"], record["loss"], record["top1"]) == ("MODEL", None, 0)
    rows = read_csv(tmp_path / "new" / "predictions.csv")
    assert len(rows) == 359
    assert all((row["predicted"], row["probability"], row["rank"]) == ("", "", "") for row in rows)
    with open(tmp_path / "new" / "per_class.csv", newline="") as file:
        assert next(csv.reader(file)) == ["class", "support", "precision", "recall"]


@pytest.mark.parametrize(("hits", "total"), [(0, 7), (7, 7), (1, 1), (350, 359), (37_213, 50_000)])
def test_interval_by_wilson(hits, total):
    """The bounds are the two solutions of (p - share)^2 = z^2 p (1 - p) / total."""
    low, high = _wilson_interval(hits, total)
    share, z = hits / total, NormalDist().inv_cdf(0.975)
    assert 0 <= low <= share <= high <= 1
    assert high - low > 0.001
    for bound in (low, high):
        assert (bound - share) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / total, abs=1e-12)


def test_no_images_have_no_interval():
    assert all(map(math.isnan, _wilson_interval(0, 0)))


def test_settings_of_timm_and_of_a_data_section_are_inverse():
    settings = {
        "in_chans": 1,
        "img_size": 12,
        "mean": [0.1],
        "std": [0.2],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
    }
    assert data_settings(timm_preprocessing(settings)) == settings
    cfg = pretrained_cfg(create_model("sequencer2d_s"))
    found = timm_preprocessing(data_settings(cfg))
    assert found == {name: cfg[name] for name in found}


def test_a_transformer_is_evaluated_at_another_size():
    """timm resamples the position embedding of a copy; the model keeps its own size."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10).eval()
    loaded = LoadedModel(model, "test_vit", "raw", None, model.pretrained_cfg)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resized = at_img_size(loaded, 96)
    assert at_img_size(loaded, 160) is loaded
    expected = timm.create_model("test_vit", num_classes=10, img_size=96).eval()
    expected.load_state_dict(resized.model.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(resized.model(images), expected(images))
        assert loaded.model(torch.zeros(1, 3, 160, 160)).shape == (1, 10)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(RequestError, match=r"^test_vit takes no images of 8 px: "):
        at_img_size(loaded, 8)


def test_windows_follow_the_size():
    """A Swin has 8 x 8 windows in its first stage at every size."""
    small = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "num_classes": 10}
    model = timm.create_model("swin_tiny_patch4_window7_224", **small).eval()
    resized = at_img_size(LoadedModel(model, "swin_tiny_patch4_window7_224", "raw", None, model.pretrained_cfg), 288)
    assert resized.model.layers[0].blocks[0].window_size == (9, 9)
    assert model.layers[0].blocks[0].window_size == (7, 7)
    assert resized.model(torch.zeros(1, 3, 288, 288)).shape == (1, 10)
