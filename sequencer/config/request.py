"""What is asked for, checked before torch is imported and before anything is written.

Every refusal is a `RequestError` of one or two lines that names what was probably meant. Standard library, omegaconf
and hydra only.
"""

import dataclasses
import difflib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sequencer.config.errors import RequestError
from sequencer.config.schema import Config, leaves

ROOT = Path(__file__).parents[2] / "conf"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(ROOT.iterdir())
    if any(folder.glob("*.yaml"))
}
MAY_CHANGE_ON_RESUME = ("trainer.max_epochs", "trainer.devices", "trainer.num_nodes", "trainer.accelerator", "logger")

ConfigStore.instance().store(name="schema", node=Config)


@dataclass(frozen=True)
class Request:
    """A run that can be started; `resume` where it goes on with what `config.run_dir` holds."""

    config: Config
    resume: bool = False


def check_overrides(overrides: list[str]) -> list[str]:
    """The command line's overrides, completed, after every key and choice was looked up.

    `data=NAME` without an experiment selects the recipe of that name, if there is one, so that no other recipe's
    values are inherited; `model.kwargs` may be given new keys. Values are checked by `compose` and `to_config`.

    Raises:
        RequestError: bad syntax, an unknown key, or an unknown choice.
    """
    parsed = parse_overrides(overrides)
    for override in parsed:
        _check_key(override)
    keys = {override.key_or_group for override in parsed}
    completed = [_complete(override) for override in parsed]
    if "data" in keys and "experiment" not in keys:
        choice = next(override for override in parsed if override.key_or_group == "data").value()
        completed.append(f"experiment={choice}" if choice in GROUPS["experiment"] else "~experiment")
    return completed


def take_plan(overrides: list[str]) -> tuple[bool, list[str]]:
    """Whether `plan=true` stands among the overrides, and the others.

    Raises:
        RequestError: another value, or the plan of a run that is to be resumed.
    """
    chosen = [override for override in parse_overrides(overrides) if override.key_or_group == "plan"]
    others = [
        line
        for line, override in zip(overrides, parse_overrides(overrides), strict=True)
        if override.key_or_group != "plan"
    ]
    if not chosen:
        return False, others
    if not isinstance(value := chosen[-1].value(), bool):
        raise RequestError(f"plan={value}: it is true or false")
    if value and any(override.key_or_group == "resume" for override in parse_overrides(others)):
        raise RequestError("plan=true is for a run that is to start, not for one that is resumed")
    return value, others


def check_restarts(overrides: list[str]) -> None:
    """
    Raises:
        RequestError: torchrun is to start a failed run again, which would not find its own folder.
    """
    named = any(override.key_or_group in ("run_dir", "resume") for override in parse_overrides(overrides))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and not named:
        raise RequestError("torchrun --max-restarts needs a run_dir=... of your choice, where a restart finds the run")


def compose(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """The configuration that the command line `overrides` asks for; a sweep's first trial. `with_hydra` adds the node
    of Hydra's own settings.

    Raises:
        RequestError: as `check_overrides`, or a value of the wrong type.
    """
    overrides = [_first_trial(override) for override in parse_overrides(check_overrides(overrides))]
    try:
        with initialize_config_dir(str(ROOT), version_base="1.3"):
            return hydra_compose("config", overrides=overrides, return_hydra_config=with_hydra)
    except ConfigCompositionException as error:
        raise _from_omegaconf(error.__cause__ or error) from error
    except HydraException as error:
        raise RequestError(_first_line(error)) from error


def to_config(composed: DictConfig) -> Config:
    """The typed configuration, resolved and with every bound checked.

    Raises:
        RequestError: a missing, ill-typed or illegal value, values that contradict each other, or a logger that is
            not installed.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error) from error
    assert isinstance(config, Config)
    _check_bounds(config)
    _check_together(config)
    _check_installed(config)
    return config


def request(composed: DictConfig) -> Request:
    """A run as composed, or the resumption of the one that stands in its `run_dir`.

    Raises:
        RequestError: as `to_config`, or `run_dir` holds something else.
    """
    config = to_config(composed)
    run_dir = Path(config.run_dir)
    if os.environ.get("RANK", "0") != "0":  # one of several processes: the first looks, and tells the others
        return Request(config)
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return Request(config)
    if not (run_dir / "config.yaml").is_file():
        raise RequestError(f"run_dir={run_dir} is not empty and holds no run: choose another")
    before, now = _values(load_run(run_dir)), _values(OmegaConf.structured(config))
    differing = [
        key for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "run_dir" and not _may_change(key)
    ]  # fmt: skip
    if differing:
        listed = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in differing[:3])
        raise RequestError(f"run_dir={run_dir} holds another run: {listed}{' ...' if differing[3:] else ''}")
    return Request(config, resume=True)


def resume_request(overrides: list[str]) -> Request | None:
    """The resumption that `resume=RUN` asks for; None where the overrides hold no `resume`.

    Raises:
        RequestError: RUN is no run folder, or something is to change that makes it another run.
    """
    parsed = parse_overrides(overrides)
    chosen = [override for override in parsed if override.key_or_group == "resume"]
    if not chosen:
        return None
    run_dir = Path(str(chosen[-1].value()))
    others = [override for override in parsed if override.key_or_group != "resume"]
    for override in others:
        _check_key(override)
        if not _may_change(override.key_or_group):
            raise RequestError(
                f"{override.key_or_group} cannot change when a run is resumed; {', '.join(MAY_CHANGE_ON_RESUME)} can"
            )
    saved = load_run(run_dir)
    asked = compose([f"{override.input_line}" for override in others])
    for override in others:
        key = override.key_or_group
        OmegaConf.update(saved, key, OmegaConf.select(asked, key))
    saved.run_dir = str(run_dir)
    return Request(to_config(saved), resume=True)


def load_run(run_dir: Path) -> DictConfig:
    """The configuration of a run, with the defaults of keys that are newer than it.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RequestError(f"{run_dir} is not a run folder: there is no {path}")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    except Exception as error:  # YAML's own errors have no common base with OmegaConf's
        raise RequestError(f"{path} is damaged or of another version: {_first_line(error)}") from error
    assert isinstance(loaded, DictConfig)
    return loaded


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE_ON_RESUME)


def parse_overrides(overrides: list[str]) -> list[Override]:
    """
    Raises:
        RequestError: bad syntax.
    """
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise RequestError(f"cannot read {error.override!r}: overrides are written key=value") from error


def _complete(override: Override) -> str:
    prefixed = override.is_add() or override.is_force_add() or override.is_delete()
    may_be_new = override.key_or_group.startswith("model.kwargs") and not prefixed
    return f"++{override.input_line}" if may_be_new else f"{override.input_line}"


def _first_trial(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line or ""
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))
    return f"{override.get_key_element()}={first}"


def _check_key(override: Override) -> None:
    key = override.key_or_group
    if key in GROUPS:
        if not override.is_delete():
            _check_choice(key, override)
        return
    if key.startswith(("hydra.", "hydra/", "model.kwargs.")) or key == "resume":
        return
    if key not in KEYS:
        nearest = _nearest(key)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "conf/schema.py lists every key"
        raise RequestError(f"unknown key {key!r}: {hint}")


def _check_choice(group: str, override: Override) -> None:
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values:
        for choice in value if isinstance(value, list) else [value]:
            if str(choice) not in GROUPS[group] and choice is not None:
                nearest = difflib.get_close_matches(str(choice), GROUPS[group], n=1)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                raise RequestError(f"{group}={choice} does not exist: {hint}There are {', '.join(GROUPS[group])}")


def _keys(node: type, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(node):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return keys


KEYS = _keys(Config)


def _nearest(key: str) -> list[str]:
    """Keys with the same last part, or else the most similar one."""
    leaf = key.rsplit(".", 1)[-1]
    same = [known for known in KEYS if known.rsplit(".", 1)[-1] == leaf]
    if same:
        return same[:2]
    similar = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.7)
    if similar:
        return similar
    leaves = {known.rsplit(".", 1)[-1]: known for known in KEYS}
    return [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]


def _check_bounds(node: Any, prefix: str = "") -> None:
    for field in dataclasses.fields(node):
        key, value = prefix + field.name, getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            _check_bounds(value, f"{key}.")
            continue
        choices, low, high = (field.metadata[name] for name in ("choices", "low", "high"))
        for item in value if isinstance(value, list) else [value]:
            if choices and item is not None and item not in choices:
                nearest = difflib.get_close_matches(str(item), choices, n=1)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                raise RequestError(f"{key}={item} is not possible: {hint}There are {', '.join(choices)}")
            if not isinstance(item, (int, float)) or isinstance(item, bool):
                continue
            if not ((low is None or item >= low) and (high is None or item <= high)):  # NaN is in no range
                span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
                raise RequestError(f"{key}={item} is out of range: it must be {span}")


def _check_together(config: Config) -> None:
    optim, trainer, data = config.optim, config.trainer, config.data
    if optim.ema_decay is None:
        for key in ("slot", "best_metric"):
            if "ema" in getattr(trainer, key):
                raise RequestError(f"trainer.{key}={getattr(trainer, key)} needs an average: set optim.ema_decay")
    if trainer.best_metric == "epoch" and trainer.early_stopping_patience is not None:
        raise RequestError("trainer.early_stopping_patience needs a trainer.best_metric that can fail to get better")
    if optim.warmup_epochs + optim.cooldown_epochs > trainer.max_epochs:
        raise RequestError(
            f"optim.warmup_epochs={optim.warmup_epochs} and cooldown_epochs={optim.cooldown_epochs} are part of "
            f"trainer.max_epochs={trainer.max_epochs} and do not fit into it"
        )
    for key in ("mean", "std"):
        if len(getattr(data, key)) not in (1, data.in_chans):
            raise RequestError(f"data.{key} has {len(getattr(data, key))} entries for data.in_chans={data.in_chans}")
    if config.model.in_chans != data.in_chans:
        raise RequestError(f"model.in_chans={config.model.in_chans}, but data.in_chans={data.in_chans}")
    if config.model.img_size != data.img_size:
        raise RequestError(f"model.img_size={config.model.img_size}, but data.img_size={data.img_size}")


def _check_installed(config: Config) -> None:
    if config.logger.wandb:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder named wandb, which offline runs leave behind, has no origin
            raise RequestError("logger.wandb=true, but wandb is not installed: python -m pip install wandb")


def _values(config: DictConfig) -> dict[str, Any]:
    return leaves(OmegaConf.to_container(config, resolve=True))


def _from_omegaconf(error: BaseException) -> RequestError:
    key = getattr(error, "full_key", None)
    message = getattr(error, "msg", None) or _first_line(error)
    return RequestError(f"{key}: {_first_line(message)}" if key else _first_line(message))


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
