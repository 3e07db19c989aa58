"""Requests with extreme, ill-typed and non-finite values: refused before anything is written, or served.

The ordinary tests check requests in process: composed, validated, and all components of the run built. The slow test
runs a sample of them.
"""

import dataclasses
import inspect
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models import build_model_with_cfg

from sequencer.config import RequestError, compose
from sequencer.config.command import parse_command
from sequencer.config.composition import to_config
from sequencer.config.request import refuse_sweep, request
from sequencer.config.schema import Config
from sequencer.names import LOADING_ARGUMENTS
from sequencer.training.setup import build_parts
from tests.helpers import SMALL, SMALL_MODEL
from tests.processes import Command

SHORT = ["trainer.max_epochs=1", "trainer.max_steps=3", "trainer.limit_train_batches=3"]
SHORT += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
BASE = [*SMALL, SMALL_MODEL, *SHORT]

NUMBERS = ["-1", "0", "-0.0", "1e-320", "1e-12", "1e-4", "0.5", "1", "1.0", "1.5", "2", "1e9", "1000000000", "1e30"]
NUMBERS += ["1e300", "1e400", "inf", "-inf", "nan", str(2**31), str(2**63), str(10**40), "true", "null", "abc", "''"]
NUMBERS += ["[1]", "{a: 1}", "0x10", "'1 '", "???"]
LISTS = ["[]", "null", "5", "[nan]", "[inf]", "[0]", "[1.0]", "[-1]", "[1e300]", "[1e-320]", "[[1]]", "[null]", "[abc]"]
LISTS += ["[0.5,0.5]", "[0.9,1.0]", "[1,0.5]", "[0.5,0.5,0.5]", "[1,2,3,4]", "[1e-30,1e30]", "[{a: 1}]"]
TEXTS = [
    "''",
    "' '",
    "null",
    "[]",
    "{a: 1}",
    "5",
    "true",
    "auto",
    "'???'",
    "'${nothing}'",
    "'a\nb'",
    "'a\0b'",
    "'\x1b[1m'",
]
TEXTS += [
    "'\udcff'",
    "~nouser",
    "'~nouser/x'",
    "a" * 300,
    "'" + "a/" * 3000 + "'",
    "/dev/null",
    "/dev/null/x",
    "/proc/x",
]
TEXTS += ["missing/x", "'é'", "'a,b'", "'http://['"]
FLAGS = ["2", "maybe", "null", "[]", "''", "{a: 1}", "true", "false"]
ARGUMENTS = ["5", "[]", "null", "''", "{celll: gru}", "{cell: foo}", "{cell: 5}", "{cell: null}", "{layers: 5}"]
ARGUMENTS += ["{layers: []}", "{layers: [0]}", "{layers: [-1]}", "{layers: [1.5]}", "{layers: null}", "{1: 2}"]
ARGUMENTS += ["{patch_sizes: [0]}", "{patch_sizes: [100]}", "{mlp_ratios: [nan]}", "{mlp_ratios: [1e9]}", "{self: 1}"]
ARGUMENTS += ["{global_pool: ''}", "{union: foo}", "{with_fc: maybe}", "{num_rnn_layers: 0}", "{token_mixer: foo}"]
ARGUMENTS += [
    f"{{{name}: {value}}}" for name in ("num_classes", "in_chans", "img_size", "name") for value in ("3", "x")
]
ARGUMENTS += [f"{{{name}: missing}}" for name in ("checkpoint_path", "pretrained_cfg", "features_only", "pretrained")]
# values of single keys that reach what torch, timm and Lightning check
SPECIAL = {
    "optim.opt": ["adahessian", "sgd", "lamb", "lion", "adafactor", "muon", "adan", "fusedadam", "bnbadam", "adopt"],
    "trainer.accelerator": ["tpu", "gpu", "mps", "hpu"],
    "trainer.strategy": ["ddp_spawn", "ddp_fork", "ddp_notebook", "deepspeed", "fsdp"],
    "trainer.devices": ["'0,'", "[0]", "'²'"],
    "data.name": ["mnist", "imagefolder", "webdataset"],
    "data.augment.auto_augment": ["rand", "rand-m9-mstd0.5-inc1", "rand-mnan", "rand-n1000000000", "augmix-a0"],
    "model.name": ["resnet18", "vit_tiny_patch16_224", "hf-hub:x/y", "sequencer2d_t_8.foo", "local-dir:/x"],
}
SPECIAL["data.augment.auto_augment"] += ["augmix-w1000000000", "augmix-d1000000000", "rand-m9-p2", "rand-wfoo"]
SPECIAL["data.augment.auto_augment"] += ["rand-n-1", "augmix-anan", "3a"]
# `devices` and `num_nodes` start further processes; loggers, compilation and loader workers take their time
EXCLUDED = ("trainer.num_nodes", "trainer.compile", "logger", "model.pretrained", "data.num_workers")
PROCESSES = ("2", "1000000000", "1e9", "1", "1.0", "auto")


def fields(node: type = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields every key of the schema with its type as text; a section has the type `section`."""
    for field in dataclasses.fields(node):
        if dataclasses.is_dataclass(field.type):
            yield prefix + field.name, "section"
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, getattr(field.type, "__name__", "") + str(field.type)


def values(key: str, kind: str) -> list[str]:
    """Values for a key, legal ones among them."""
    if kind == "section":
        return ["5", "null", "''", "{}", "{a: 1}", "[]"]
    found = SPECIAL.get(key, [])
    for word, pool in (("dict", ARGUMENTS), ("list", LISTS)):
        if word in kind:
            return found + pool
    for word, pool in (("str", TEXTS), ("int", NUMBERS), ("float", NUMBERS), ("bool", FLAGS)):
        found = found + pool if word in kind else found
    return found


REQUESTS = {key: values(key, kind) for key, kind in fields()}
OVERRIDES = st.sampled_from([f"{key}={value}" for key, pool in REQUESTS.items() for value in pool])
SERVED = [
    override
    for key, pool in REQUESTS.items()
    for override in (f"{key}={value}" for value in pool)
    if not key.startswith(EXCLUDED) and not override.startswith(tuple(f"trainer.devices={n}" for n in PROCESSES))
]


def composed(overrides: list[str], folder: Path, build: bool = False) -> Config | None:
    """Makes the checks of a request that precede the run folder; None if it was refused, as it has to be refused.

    Args:
        build: build all components of the run too.
    """
    try:
        command = parse_command([*BASE, f"run_dir={folder}", *overrides])
        found = command.compose()
        refuse_sweep(command)
        config = request(to_config(found.config)).config
        if build and not any(override.startswith(EXCLUDED) for override in overrides):
            build_parts(config)
    except RequestError as error:
        message = str(error)
    else:
        return config
    assert 0 < len(message.splitlines()) <= 2, message
    assert all(c.isprintable() or c == "\n" for c in message), message
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("requests") / "run"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("key", REQUESTS)
def test_every_key_with_every_value_is_composed_or_refused(key, folder):
    for value in REQUESTS[key]:
        if (config := composed([f"{key}={value}"], folder)) is not None:
            config.model.kwargs.clear()  # checked when the model is built
            numbers = [n for n in _numbers(dataclasses.asdict(config)) if isinstance(n, float)]
            unbounded = (config.trainer.max_loss, config.trainer.checkpoint_interval)
            assert all(math.isfinite(number) or number in unbounded for number in numbers)
    assert not folder.exists()


def _numbers(node: Any) -> Iterator[Any]:
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, (dict, list)):
            yield from _numbers(value)
        else:
            yield value


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_requests_are_refused_or_built(folder, overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning and timm, about settings that are odd
        composed(overrides, folder, build=True)
    assert not folder.exists()


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_many_requests_are_refused_or_built(folder, overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        composed(overrides, folder, build=True)
    assert not folder.exists()


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(SERVED), min_size=1, max_size=2, unique=True))
def test_requests_run_three_steps_or_write_nothing(tmp_path_factory, overrides):
    """A run that diverges, which is what some learning rates ask for, ends with 1 and says so."""
    if any("\0" in override or "\udcff" in override for override in overrides):
        return  # no command line holds them
    cwd = tmp_path_factory.mktemp("request")
    run = Command([*BASE, "run_dir=run", *overrides], cwd)
    _, errors = run.communicate(timeout=120)
    if run.returncode == 2:
        assert not list(cwd.iterdir()), errors
        assert len(errors.splitlines()) <= 2, errors
    elif run.returncode == 1:
        assert "divergence.json" in errors, errors
    else:
        assert run.returncode == 0, errors
        assert list(cwd.rglob("summary.json"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "trains nothing"),
        ("trainer.limit_train_batches=0", "trains nothing"),
        ("trainer.limit_train_batches=2.5", "is a fraction"),
        ("optim.lr=inf", "between 0 and 1000"),
        ("optim.weight_decay=inf", "between 0 and 1000"),
        ("data.mean=[nan]", "out of range"),
        ("data.mean=[[1]]", "its entries are numbers"),
        ("data.augment.mixup=inf", "must be finite"),
        ("data.augment.mixup=1e-320", "0 or at least 1e-06"),
        ("data.augment.crop_padding=9", "more than data.img_size=8"),
        ("data.augment.sizes=[]", "give one size or more"),
        ("data.augment.sizes=[4,9]", "9 is more than data.img_size=8"),
        ("data.augment.sizes=[0,8]", "at least 1"),
        ("data.batch_size=99999999999999999999", "between 1 and 2147483647"),
        ("data.num_workers=1000000", "between 0 and 1024"),
        ("data.root='~nouser'", "there is no user nouser"),
        (f"run_dir={'a' * 300}", "File name too long"),
        ("name='a\nb'", "cannot be printed"),
        ("optim=null", "optim=None does not exist"),
        ("model.kwargs={num_classes: 3}", "has a key of its own: model.num_classes"),
        ("model.kwargs={in_chans: 3}", "has a key of its own: model.in_chans"),
        ("model.kwargs={name: x}", "has a key of its own: model.name"),
        ("model.kwargs={checkpoint_path: missing}", "init_from=MODEL loads weights"),
        ("model.kwargs={features_only: true}", "no argument of an architecture"),
        ("trainer.strategy=ddp_spawn", "starts processes of its own"),
    ],
)
def test_refused_before_torch_is_imported(override, message):
    with pytest.raises(RequestError, match=r"^[^\n]*$") as error:
        compose([override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.limit_train_batches=0.0001", "less than one batch"),
        ("trainer.limit_val_batches=0.0001", "less than one batch"),
        ("trainer.limit_test_batches=0.0001", "less than one batch"),
        ("trainer.accelerator=tpu", "the trainer settings cannot be met"),
        ("optim.opt=adahessian", "optim.opt=adahessian cannot be built"),
        ("optim.opt=no", "optim.opt=no cannot be built"),
        ("optim.opt_betas=[]", "it takes 2 betas, not 0"),
        ("optim.opt_betas=[0.9]", "it takes 2 betas, not 1"),
        ("optim.opt_betas=[0.9,0.9,0.9]", "it takes 2 betas, not 3"),
        ("model.kwargs={celll: gru}", "celll: not an argument of the architecture sequencer2d_t_8; did you mean cell?"),
        ("model.kwargs={global_pool: ''}", "is no classifier: for 2 images and 10 classes it returns [2, 4, 4, 10]"),
        ("data.augment.sizes=[1,8]", "cannot train on batches of 2 images of 1 px"),
        ("model.name=vit_tiny_patch16_224", "cannot train on batches of 2 images of 8 px"),
        ("data.augment.auto_augment=augmix-a0", "an image cannot be augmented like this"),
        ("data.augment.auto_augment=rand-n1000000000", "1000000000 operations in a row are too many"),
    ],
)
def test_refused_before_anything_is_written(override, message, folder):
    model = [] if override.startswith("model.") else [SMALL_MODEL]
    kwargs = ["model.kwargs={}"] if override.startswith("model.name") else []
    with pytest.raises(RequestError) as error:
        build_parts(compose([*SMALL, *model, *kwargs, f"run_dir={folder}", override]))
    assert message in str(error.value)
    assert not folder.exists()


def test_one_refused_request_as_a_command(tmp_path):
    """The whole way, with the exit code."""
    train = Path(__file__).parents[2] / "train.py"
    command = [sys.executable, str(train), "run_dir=run", "trainer.max_steps=0"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (
        2,
        "train.py: trainer.max_steps=0 trains nothing: it must be at least 1, or -1 for no limit\n",
    )
    assert not list(tmp_path.iterdir())


def test_a_run_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file is no folder"):
        request(compose([f"run_dir={tmp_path / 'file' / 'run'}"]))


def test_infinity_turns_limits_off():
    assert compose(["trainer.max_loss=inf"]).trainer.max_loss == math.inf
    assert compose(["trainer.checkpoint_interval=inf"]).trainer.checkpoint_interval == math.inf


def test_arguments_of_loading_are_those_of_timm():
    """Every argument of timm's two builders is refused or has a key of its own."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    builders = [inspect.signature(function).parameters for function in (timm.create_model, build_model_with_cfg)]
    found = {name for parameters in builders for name, parameter in parameters.items() if parameter.kind in kinds}
    assert found - {"pretrained"} <= set(LOADING_ARGUMENTS)
