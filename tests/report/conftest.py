"""Runs and a browser that several tests of the pages use."""

import shutil

import numpy as np
import pytest
from PIL import Image

from sequencer.training import run
from tests.helpers import small_config
from tests.report.page_helpers import HOSTILE


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory):
    """A short run on images of five classes with hostile names, 16 px, with two images that cannot be read."""
    folder = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 14)):
        for k, name in enumerate(HOSTILE):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8) // 2 + 20 * k
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / split / name / f"{i} <b>.png")
    for name in HOSTILE[:2]:
        (folder / "data" / "val" / name / "0 <b>.png").write_text("no image")
    config = hostile_config(folder / "run", folder / "data", "logger.report=true")
    run(config, origin={"command": ["python", "train.py", "name=<i>"], "sources": {"optim.lr": "command line"}})
    return folder / "run"


@pytest.fixture(scope="session")
def other_hostile_run(hostile_run):
    """A run of three epochs on the same images, with another seed and name."""
    folder = hostile_run.with_name("other")
    run(hostile_config(folder, hostile_run.with_name("data"), "seed=1", "trainer.max_epochs=3"))
    return folder.rename(hostile_run.with_name("run <b>"))


def hostile_config(run_dir, root, *overrides):
    return small_config(
        run_dir,
        "data=imagefolder",
        f"data.root={root}",
        "data.img_size=16",
        "data.max_bad_share=0.5",
        "data.augment.mixup=0.4",
        "trainer.limit_train_batches=1",
        "trainer.max_epochs=2",
        "optim.lr=0.02",
        *overrides,
    )


@pytest.fixture(scope="module")  # the driver runs an event loop, which other tests must not find
def browser():
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Opens a file with a width and a colour scheme; afterwards there was no request and no message."""
    found, contexts = [], []

    def open_file(path, width: int = 1200, colour_scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colour_scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: found.append(message.text))
        tab.on("pageerror", lambda error: found.append(str(error)))
        tab.on("dialog", lambda dialog: found.append(dialog.message))
        tab.on("request", lambda request: found.append(request.url) if request.url.startswith("http") else None)
        tab.goto(f"file://{path}")
        return tab

    yield open_file
    for context in contexts:
        context.close()
    assert found == []
