import os

# the networks of the tests are so small that threads cost more in waiting for one another than they save; set before
# torch is imported, and inherited by the command lines that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# without a GPU, Triton's kernels run in its interpreter; set before Triton is imported, which torchvision does
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import hashlib
import importlib.util
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import beartype._check.code.codemain as beartype_code
import numpy as np
import pytest

# beartype (private interface of 0.23) draws the item of a sequence that it checks from Python's global generator, which
# training uses as well; with a generator of its own, a run under test is the run of a user
beartype_code.getrandbits = random.Random(0).getrandbits

pytest.register_assert_rewrite("tests.helpers", "tests.processes")

SCRIPTS = Path(__file__).parents[1] / "scripts"
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def config(tmp_path) -> Callable[..., Any]:
    """`config(*overrides, run_dir="run")` composes a small run on the digits into `tmp_path / run_dir`."""
    from tests.helpers import small_config  # after the line above that seeds the run-time type checks

    return lambda *overrides, run_dir="run": small_config(tmp_path / run_dir, *overrides)


@pytest.fixture
def analyze(load_script) -> ModuleType:
    """scripts/analyze.py as a module."""
    return load_script("analyze")


@pytest.fixture
def unrendered(monkeypatch) -> None:
    """The pictures of a run are blank."""
    from tests.pictures import leave_blank

    leave_blank(monkeypatch.setattr)


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of 300 KiB, or of the size that the test is parametrized with."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '300k')}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def load_script(monkeypatch, tmp_path) -> Callable[[str], ModuleType]:
    """A script as a module, by name; the working directory is an empty folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory):
    """The official files of CIFAR-10, all 60,000 images."""
    parts = sorted((REAL_DATA / "cifar10").glob("cifar10_part*.npz"))
    if len(parts) != 2:
        pytest.skip("the packed CIFAR-10 is not here")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run(
        [sys.executable, REAL_DATA / "cifarpack.py", "unpack", root, *parts], check=True, stdout=subprocess.DEVNULL
    )
    return root


@pytest.fixture(scope="session")
def photographs_root(tmp_path_factory):
    """Photographs of ants and bees of many sizes: train/ and val/, no test/."""
    archive = REAL_DATA / "hymenoptera" / "hymenoptera_256.tar"
    if not archive.is_file():
        pytest.skip("the photographs are not here")
    root = tmp_path_factory.mktemp("photographs")
    subprocess.run(["tar", "xf", archive, "-C", root], check=True)
    return root


@pytest.fixture
def made_root(tmp_path, monkeypatch):
    """MNIST, Fashion-MNIST and CIFAR with few images: every class 10 times in training, once in the test part."""
    from torchvision import datasets  # not by the process that only hands tests to workers

    for name in ("MNIST", "FashionMNIST"):
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True)
        write_idx(folder, "train", np.repeat(np.arange(10), 10))
        write_idx(folder, "t10k", np.arange(10))
    for set_class, classes in ((datasets.CIFAR10, 10), (datasets.CIFAR100, 100)):
        folder = tmp_path / set_class.base_folder
        folder.mkdir()
        key, meta = set_class.meta["key"], set_class.meta["filename"]
        contents = {
            "train": cifar_batch(np.repeat(np.arange(classes), 10)),
            "test": cifar_batch(np.arange(classes)),
            meta: {key: [f"class {i}" for i in range(classes)]},
        }
        sums = {}
        for name, content in contents.items():
            (folder / name).write_bytes(pickle.dumps(content))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setattr(set_class, "train_list", [["train", sums["train"]]])
        monkeypatch.setattr(set_class, "test_list", [["test", sums["test"]]])
        monkeypatch.setattr(set_class, "meta", {**set_class.meta, "md5": sums[meta]})
    return tmp_path


def write_idx(folder: Path, part: str, labels: np.ndarray) -> None:
    """Images whose every pixel is the label times 20, in MNIST's format (big-endian header, then bytes)."""
    images = np.broadcast_to((labels * 20)[:, None, None], (len(labels), 28, 28)).astype(np.uint8)
    header = np.array([0x0803, *images.shape], dtype=">i4").tobytes()
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = np.array([0x0801, len(labels)], dtype=">i4").tobytes()
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def cifar_batch(labels: np.ndarray) -> dict:
    """Images whose every value is the label."""
    return {"data": np.repeat(labels.astype(np.uint8)[:, None], 3072, axis=1), "labels": labels.tolist()}
