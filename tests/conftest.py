import os

# the networks of the tests are so small that threads cost more in waiting for one another than they save; set before
# torch is imported, and inherited by the command lines that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import beartype._check.code.codemain as beartype_code
import pytest
import torch

# beartype draws the item of a sequence that it looks at; from the generator that training draws from, a run that is
# checked would not be the run that users have
beartype_code.getrandbits = random.Random(0).getrandbits

SCRIPTS = Path(__file__).parents[1] / "scripts"
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels are tested on whatever there is


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
