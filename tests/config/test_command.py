"""The command line: parsed once, composed once, and looked up in the project's folder and in the user's."""

import logging
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import train
from sequencer.config import RequestError, compose, conf_dir
from sequencer.config.command import parse_command
from sequencer.config.environment import check_environment
from sequencer.config.request import Request, refuse_sweep, resume_request
from sequencer.config.sources import Sources
from sequencer.config.sweep import prepare_sweep


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[Request]:
    """Collects what `train.main` would train; the working directory is an empty folder."""
    requests: list[Request] = []
    monkeypatch.setattr(train, "train", lambda request, command: requests.append(request))
    monkeypatch.setattr(logging.root, "handlers", [])  # Hydra adds some for `--info`
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    monkeypatch.chdir(tmp_path)
    return requests


@pytest.fixture
def recipes(tmp_path) -> Path:
    """A user's folder with one recipe."""
    folder = tmp_path / "my recipes"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\noptim:\n  lr: 0.125\n")
    return folder


def test_one_run_is_parsed_and_composed_once(monkeypatch, started):
    calls: list[str] = []

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs))

    count(ConfigLoaderImpl, "load_configuration")
    count(OverridesParser, "parse_overrides")
    train.main(parse_command(["optim.lr=1e-3", "data=cifar10"]))
    assert started[0].config.optim.lr == 1e-3
    assert calls == ["parse_overrides", "load_configuration", "parse_overrides"]  # the last one is Hydra's own


def test_plan_and_resume_are_no_overrides():
    command = parse_command(["seed=1", "plan=true", "optim.lr=1"])
    assert command.plan
    assert command.lines == ["seed=1", "optim.lr=1"]
    assert not parse_command(["seed=1"]).plan
    assert not parse_command(["plan=false"]).plan
    assert parse_command(["plan=full"]).plan == "full"
    assert parse_command(["resume=runs/a"]).resume == Path("runs/a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate; overrides are written without dashes: "),
        (["--experiment", "cifar10_cpu"], "overrides are written without dashes: experiment=VALUE"),
        (["--multi-run"], "unrecognized arguments: --multi-run; --hydra-help lists the flags"),
        (["-cn", "nosuch"], "--config-name nosuch: there is no nosuch.yaml in"),
        (["-cd", "/nonexistent"], "--config-dir /nonexistent: there is no such folder"),
        (["-cp", "/nonexistent"], "--config-path /nonexistent: there is no such folder"),
        (["--cfg", "everything"], "invalid choice: 'everything'"),
        (["-m", "--cfg", "job"], "--multirun and --cfg exclude each other"),
        (["--resolve"], "--resolve needs --cfg or --help"),
        (["--experimental-rerun", "job.pickle"], "--experimental-rerun is not supported"),
        (["plan=yess"], "plan=yess: it is true, full (lists every value) or false"),
        (["resume=runs/a", "--cfg", "job"], "is in runs/a/config.yaml"),
        (["plan=true", "resume=runs/a"], "exclude each other: a plan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands(arguments, message):
    with pytest.raises(RequestError) as error:
        parse_command(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_values_without_brackets_are_the_mistake_that_is_told(started):
    with pytest.raises(RequestError, match=r"^data\.mean=0\.1,0\.2: .* or write data\.mean=\[0\.1,0\.2\] for a list$"):
        train.main(parse_command(["data.mean=0.1,0.2"]))
    assert not started


def test_a_model_is_chosen_by_its_key(started):
    with pytest.raises(RequestError, match=r"^model=resnet18 does not exist: did you mean model\.name=resnet18\?$"):
        train.main(parse_command(["model=resnet18"]))
    assert not started


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--info", "defaults"]], ids=" ".join)
def test_what_hydra_answers(arguments, started, capsys):
    train.main(parse_command(arguments))
    assert "digits" in capsys.readouterr().out
    assert not started


def test_a_package_that_does_not_exist(started, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(parse_command(["--cfg", "job", "-p", "nosuch"]))
    assert capsys.readouterr().err == "package 'nosuch' not found in config\n"


def test_completion(started, capsys):
    train.main(parse_command(["-sc", "install=bash"]))
    assert "complete -o nospace" in capsys.readouterr().out
    with pytest.raises(RequestError, match="Expecting one subcommand"):
        train.main(parse_command(["-sc", "seed=1"]))


def test_several_values_are_a_sweep_or_a_list():
    with pytest.raises(RequestError, match=r"^optim\.lr=1e-3,2e-3: add -m for a sweep$"):
        refuse_sweep(parse_command(["optim.lr=1e-3,2e-3"]))
    with pytest.raises(
        RequestError, match=r"^logger=csv,wandb: .* for a sweep, or write logger=\[csv,wandb\] for a list$"
    ):
        refuse_sweep(parse_command(["logger=csv,wandb"]))
    with pytest.raises(RequestError, match="resumes one run"):
        resume_request(parse_command(["-m", "resume=runs/a"]))


def test_a_recipe_of_the_users_own(recipes, started):
    arguments = ["--config-dir", str(recipes), "experiment=mine", "data=mnist"]
    train.main(parse_command(arguments))
    assert (started[0].config.name, started[0].config.optim.lr) == ("mine", 0.125)
    assert compose(["experiment=mine"], config_dir=recipes).optim.lr == 0.125
    sources = Sources(parse_command(arguments))
    assert sources["optim.lr"] == str(recipes / "experiment" / "mine.yaml")
    assert sources["data.img_size"] == "conf/data/mnist.yaml"
    with pytest.raises(RequestError, match="experiment=mine does not exist"):
        compose(["experiment=mine"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package _global_\noptim:\n  lrr: 1\n", "unknown key 'optim.lrr': did you mean optim.lr?"),
        ("# @package _global_\noptim:\n  lr: fast\n", "optim.lr: Value 'fast' of type 'str' could not be converted "
         "to Float"),
        ("optim:\n  lr: 1\n", "a file of this group begins with the line `# @package _global_`"),
        ("# @package _global_\nname: [\n", "line 3: expected the node content, but found '<stream end>'"),
        ("# @package _global_\noptim:\n  lr: -1\n", "optim.lr=-1.0 is out of range: it must be between 0 and 1000"),
    ],
    ids=["key", "type", "package", "yaml", "bound"],
)  # fmt: skip
def test_an_error_in_a_recipe_of_the_users_own(text, message, recipes, started):
    path = recipes / "experiment" / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(RequestError) as error:
        train.main(parse_command(["--config-dir", str(recipes), "experiment=wrong"]))
    assert str(error.value).endswith(message)
    assert str(path) in str(error.value) or "out of range" in message
    assert not started


def test_overrides_of_a_recipe_of_the_users_own(recipes, started):
    arguments = ["--config-dir", str(recipes), "experiment=mine"]
    with pytest.raises(RequestError, match=r"unknown key 'optim\.lrr': did you mean optim\.lr\?"):
        train.main(parse_command([*arguments, "optim.lrr=1"]))
    with pytest.raises(RequestError, match="experiment=mien does not exist: did you mean mine"):
        train.main(parse_command([*arguments[:2], "experiment=mien"]))


def test_plans_sweeps_and_resumed_runs_of_a_recipe_of_the_users_own(recipes, started, monkeypatch, tmp_path):
    arguments = ["--config-dir", str(recipes), "experiment=mine", "data=digits"]
    planned = []
    monkeypatch.setattr("sequencer.measure.plan", lambda *args, **kwargs: planned.append((args, kwargs)))
    train.main(parse_command([*arguments, "plan=full"]))
    train.main(parse_command([*arguments, "-m", "seed=1,2", "plan=true"]))
    (one, whole), (two, changed) = planned
    assert (one[0].optim.lr, two[0].optim.lr, one[2], two[2]) == (0.125, 0.125, 1, 2)
    assert (whole, changed) == ({"full": True}, {"full": False})
    sources = one[1]
    assert [key for key in ("name", "optim.lr", "optim.opt", "trainer.devices", "seed") if sources.differs(key)] == [
        "name", "optim.lr"
    ]  # fmt: skip
    command = parse_command([*arguments, "-m", "seed=1,2"])
    swept = prepare_sweep(command, command.compose())
    assert (swept.config.name, swept.trials) == ("mine", 2)
    train.main(parse_command([*arguments, "run_dir=run"]))
    (tmp_path / "run").mkdir()
    OmegaConf.save(OmegaConf.structured(started[0].config), tmp_path / "run" / "config.yaml")
    train.main(parse_command(["resume=run"]))
    assert started[1].resume
    assert started[1].config.optim.lr == 0.125


def test_a_recipe_in_both_places_is_refused(recipes):
    (recipes / "experiment" / "digits.yaml").write_text("name: other\n")
    with pytest.raises(RequestError) as error:
        parse_command(["--config-dir", str(recipes)])
    for folder in (conf_dir(), recipes):
        assert str(folder / "experiment" / "digits.yaml") in str(error.value)


def test_what_a_library_user_composes():
    config = compose(["data=cifar10", "optim.lr=1e-2"])
    assert (config.data.name, config.optim.lr) == ("cifar10", 0.01)
    assert compose().data.name == "digits"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: torchrun sets it to a number of 1 or more; unset it"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: torchrun sets it to a number of 1 or more; unset it"),
        ({"RANK": "-1"}, "RANK=-1: torchrun sets it to a number of 0 or more; unset it"),
        ({"RANK": "1"}, "RANK=1, but there are 1 ranks: torchrun sets both; unset RANK"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3, but there are 1 ranks: torchrun sets both; unset LOCAL_RANK"),
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE=4, but RANK is not set: torchrun sets both; for a single rank unset WORLD_SIZE",
        ),
    ],
)
def test_variables_of_ranks_that_torchrun_has_not_set(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError) as error:
        check_environment()
    assert str(error.value) == message


def test_a_run_dir_in_the_home_folder(monkeypatch, tmp_path):
    """Not every shell expands `run_dir=~/runs`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose(["run_dir='~/runs/one'"]).run_dir == f"{tmp_path}/runs/one"


def test_a_run_dir_that_is_an_address_is_refused():
    with pytest.raises(RequestError, match=r"run_dir=s3://bucket/run is an address: a run is written to a folder"):
        compose(["run_dir=s3://bucket/run"])


def test_a_wrong_rank_is_said(monkeypatch, capsys):
    """Rank 1 leaves errors that all ranks share to rank 0, but here there is none."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RequestError) as error:
        parse_command([])
    assert train.exit_code(error.value) == 2
    assert capsys.readouterr().err == "train.py: RANK=1, but there are 1 ranks: torchrun sets both; unset RANK\n"
