"""The page of runs on CIFAR-10 and photographs, and of a split of ImageNet's size."""

import resource
import time

import numpy as np
import pytest
import torch

from sequencer.config import compose
from sequencer.data import MemorySplit, train_transform
from sequencer.evaluation import Collector
from sequencer.models import LoadedModel, create_model
from sequencer.report import examine, make_subject, write_report
from sequencer.training import run

pytestmark = pytest.mark.slow


def assert_fits(browser, path) -> None:
    """Opens a page as a desktop and a phone show it: nothing is asked for, no message, no scrolling sideways."""
    assert path.stat().st_size < 3 * 2**20
    for width in (1200, 390):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        found = []
        tab.on("console", lambda message, found=found: found.append(message.text))
        tab.on("pageerror", lambda error, found=found: found.append(str(error)))
        tab.on("request", lambda request, found=found: found.append(request.url) if "http" in request.url else None)
        tab.goto(f"file://{path}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.locator("[data-cell]").first.click()
        assert tab.locator("dialog .gallery img").count() > 0
        assert found == []
        tab.close()


def test_cifar_10(cifar10_root, tmp_path, browser):
    config = compose([
        "experiment=cifar10_cpu", f"data.root={cifar10_root}", "data.num_workers=0", "trainer.max_epochs=1",
        "trainer.limit_train_batches=30", f"run_dir={tmp_path / 'run'}",
    ])  # fmt: skip
    run(config)
    assert_fits(browser, tmp_path / "run" / "report.html")


def test_photographs(photographs_root, tmp_path, browser):
    config = compose([
        "data=imagefolder", f"data.root={photographs_root}", "data.img_size=64", "data.num_workers=0",
        "model.name=sequencer2d_t_64", "trainer.max_epochs=1", "data.batch_size=32", f"run_dir={tmp_path / 'run'}",
    ])  # fmt: skip
    run(config)
    assert_fits(browser, tmp_path / "run" / "report.html")


def test_a_split_of_the_size_of_imagenet(tmp_path):
    """50,000 images of 1,000 classes take less than 2 GiB besides the images; the page has at most 3 MiB."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (50_000, 16, 16, 3), dtype=np.uint8), np.arange(50_000) % 1000
    names = [f"class {k}" for k in range(1000)]
    split = MemorySplit(images, labels, names, "made")
    training = MemorySplit(images[:64], labels[:64], names, "made")
    config = compose(["data=imagefolder", "data.img_size=16", "data.crop_pct=1", "data.num_workers=0"])
    training.transform = train_transform(config.data)
    small = {"layers": [1], "patch_sizes": [4], "embed_dims": [16], "hidden_sizes": [4]}
    model = create_model("sequencer2d_t_32", num_classes=1000, img_size=16, **small).eval()
    loaded = LoadedModel(model, "sequencer2d_t_32", "raw", tuple(names), {})
    summary = {"parameters": 1, "epochs": 1, "best_epoch": 1, "slot": "raw", "time/train_s": 1.0}
    (tmp_path / "metrics.csv").write_text("epoch,train/loss\n1,7.0\n")
    subject = make_subject(config, summary, loaded, torch.device("cpu"), tmp_path, "val", split, training)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    collector = Collector(len(split), 1000)
    for start in range(0, len(split), 1000):
        logits = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(start))
        logits[torch.arange(1000), torch.from_numpy(labels[start : start + 1000])] += 4
        rows = torch.arange(start, start + 1000)
        collector.add(logits, torch.from_numpy(labels[start : start + 1000]), rows)
    started = time.perf_counter()
    page = write_report(subject, examine(model, "val", collector.predictions(), (3, 16, 16)), tmp_path)
    print(f"{time.perf_counter() - started:.0f} s")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2 * 2**30
    assert page.stat().st_size < 3 * 2**20
