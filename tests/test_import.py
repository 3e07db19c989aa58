"""`import sequencer` is cheap and registers the models with timm, whichever is imported first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sequencer.config import DataConfig
from tests.helpers import save_run

PACKAGE = Path(__file__).parents[1] / "sequencer"
SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
CASES = {f"sequencer.{name} first": f"import sequencer.{name}, timm" for name in SUBPACKAGES} | {
    "timm first": "import timm, sequencer",
    "timm last": "import sequencer, timm",
    "timm.models first": "import timm.models.sequencer, sequencer",
    "looked for before": "import importlib.util, sequencer; assert importlib.util.find_spec('timm'); import timm",
    "looked for between": "import importlib.util as u; assert u.find_spec('timm'); import sequencer, timm",
    "reloaded before": "import importlib, sequencer; importlib.reload(sequencer); import timm",
    "reloaded after": "import importlib, sequencer, timm; importlib.reload(sequencer)",
    "a layer alone": "from sequencer.layers import RNN2d; import timm",
}
# the other subpackages import one of these before timm
LOWEST = [f"sequencer.{name} first" for name in ("config", "models", "training")]
OTHERS = ["timm first", "timm.models first", "looked for before", "reloaded after"]
ORDERS = {"distinct": {name: CASES[name] for name in [*LOWEST, *OTHERS]}, "all": CASES}
# Forks a process for each case, from one that has imported nothing but what is slow to import.
RUN_CASES = """
import json, os, sys, traceback
import hydra, huggingface_hub.utils, pytorch_lightning.loggers, safetensors.torch
import torch, torchvision.transforms.v2, wandb
for name, code in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        try:
            exec(code, {})
            model = sys.modules["timm"].create_model("sequencer2d_t_8", cell="gru")
            assert type(model).__module__ == "sequencer.models.sequencer"
            assert sys.modules["timm"].model_entrypoint("sequencer2d_s").__module__ == "sequencer.variants"
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        print(name)
"""


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd or PACKAGE.parent)


@pytest.mark.parametrize("orders", ["distinct", pytest.param("all", marks=pytest.mark.slow)])
def test_the_models_are_registered_in_every_order(orders):
    result = python("-W", "error", "-c", RUN_CASES, json.dumps(ORDERS[orders]))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", result.stderr


@pytest.mark.slow
def test_the_models_are_registered_in_spawned_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing
import sequencer

def build(name):
    import timm
    return type(timm.create_model(name)).__module__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(build, ["sequencer2d_t_8"]))
""")
    result = python(str(script))
    assert result.stdout.strip() == "sequencer.models.sequencer", result.stderr


@pytest.mark.parametrize("name", ["sequencer", "sequencer.config"])
def test_the_import_is_cheap(name):
    code = f"import sys, {name}; print(*sorted(sys.modules))"
    modules = python("-c", code).stdout.split()
    assert name in modules
    assert not {"torch", "timm", "torchvision", "pytorch_lightning", "numpy", "wandb"} & set(modules)


# Runs each command in a process forked from one that has imported torch and timm, and prints what it imports.
RUN_COMMANDS = """
import json, os, runpy, sys
import timm, torch
for arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv, before = arguments, set(sys.modules)
        sys.path.insert(0, os.path.dirname(arguments[0]))
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as exit:
            assert not exit.code, exit.code
        print("IMPORTED", *{name.partition(".")[0] for name in set(sys.modules) - before}, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_commands_import_no_more_than_they_need(tmp_path):
    """Training, plots and trackers take seconds to import. timm imports W&B itself where that is installed."""
    data = DataConfig(name="imagefolder", root=str(tmp_path), img_size=8, in_chans=3)
    run = str(save_run(tmp_path / "run", data, ["cat", "dog"]))
    for folder in ("val/cat", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    scripts, images, output = PACKAGE.parent / "scripts", str(tmp_path / "val"), str(tmp_path / "export")
    commands = [
        [str(scripts / "predict.py"), run, images],
        [str(scripts / "evaluate.py"), run, "--split", "val"],
        [str(scripts / "export.py"), run, "--format", "torch_export", "--output", output],
    ]
    result = python("-c", RUN_COMMANDS, json.dumps(commands))
    assert result.returncode == 0, result.stderr
    imported = [set(line.split()) for line in result.stdout.splitlines() if line.startswith("IMPORTED")]
    assert len(imported) == len(commands)
    for modules in imported:
        assert "sequencer" in modules
        assert not {"pytorch_lightning", "matplotlib", "sklearn", "wandb", "tensorboard"} & modules
    for modules in (imported[0], imported[2]):  # evaluation reads the configuration of the run
        assert not {"hydra", "omegaconf"} & modules
