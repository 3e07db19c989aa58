"""The command line of `train.py`, parsed once."""

import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hydra.core.override_parser.types import Override

from sequencer.config.composition import Composed, compose_lines
from sequencer.config.conf_files import ConfigFiles, conf_dir
from sequencer.config.environment import check_environment
from sequencer.config.errors import RequestError
from sequencer.config.hydra_internals import parse_flags
from sequencer.config.overrides import complete, parse_overrides

MODES = ("plan", "smoke", "resume")  # what is done with the run, and no keys of its configuration


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line of `train.py`."""

    flags: Namespace  # Hydra's own flags
    overrides: tuple[Override, ...]  # all but `plan`, `smoke` and `resume`
    files: ConfigFiles
    plan: bool | Literal["full"] = False  # "full" lists every value
    smoke: bool = False
    resume: Path | None = None

    @property
    def is_question(self) -> bool:
        """Whether Hydra answers the command without a configuration: help, information, or completion."""
        flags = self.flags
        return bool(flags.help or flags.hydra_help or flags.shell_completion or flags.info)

    @property
    def lines(self) -> list[str]:
        """The overrides that Hydra composes, as text.

        Raises:
            RequestError: An unknown key or choice.
        """
        return complete(self.overrides, self.files.groups)

    @property
    def first_lines(self) -> list[str]:
        """The overrides of the first trial of a sweep, in which each swept key has its first value.

        Raises:
            RequestError: An unknown key or choice.
        """
        return complete(self.overrides, self.files.groups, first=True)

    def compose(self) -> Composed:
        """Composes the configuration, of a sweep that of its first trial.

        Raises:
            RequestError: An unknown key or choice, or a value of the wrong type.
        """
        return compose_lines(self.first_lines, self.files)


def parse_command(arguments: list[str]) -> CommandLine:
    """Parses the arguments of `train.py`.

    Raises:
        RequestError: An unknown or contradictory flag, an override that does not follow the grammar, a folder of
            `--config-dir` that does not exist or repeats a choice, or an unknown backend in SEQUENCER_BACKEND.
    """
    flags = parse_flags(arguments)
    _check_flags(flags)
    main, extra = (None if path is None else Path(path) for path in (flags.config_path, flags.config_dir))
    files = ConfigFiles(main or conf_dir(), extra, flags.config_name or "config")
    if flags.shell_completion:  # its arguments are no overrides
        return CommandLine(flags, (), files)
    check_environment()
    overrides = parse_overrides(flags.overrides)
    plan, smoke, resume = (_last(overrides, key) for key in MODES)
    if plan not in (None, True, False, "full"):
        raise RequestError(f"plan={plan}: it is true, full (lists every value) or false")
    if not isinstance(smoke, bool | None):
        raise RequestError(f"smoke={smoke}: it is true or false")
    if plan and smoke:
        raise RequestError("plan=true and smoke=true exclude each other: a plan trains nothing")
    if (plan or smoke) and resume:
        kind = "plan" if plan else "smoke test"
        raise RequestError(f"{kind.split()[0]}=true and resume=RUN exclude each other: a {kind} is made of a new run")
    if resume and flags.cfg:
        raise RequestError(
            f"--cfg shows what a new run would be; that of the run is in {Path(str(resume), 'config.yaml')}"
        )
    others = tuple(override for override in overrides if override.key_or_group not in MODES)
    wanted: bool | Literal["full"] = "full" if plan == "full" else bool(plan)
    path = None if resume is None else Path(str(resume))
    return CommandLine(flags, others, files, wanted, bool(smoke), path)


def check_restarts(command: CommandLine) -> None:
    """Checks that a run which torchrun may restart has a folder that the restart finds.

    Raises:
        RequestError: The command does not name its `run_dir`.
    """
    named = any(override.key_or_group == "run_dir" for override in command.overrides)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and not named:
        raise RequestError("torchrun --max-restarts needs a run_dir=... of your choice, where a restart finds the run")


def _check_flags(flags: Namespace) -> None:
    if flags.experimental_rerun:
        raise RequestError("--experimental-rerun is not supported: resume=RUN resumes a run")
    modes = [name for name in ("run", "multirun", "cfg", "shell_completion", "info") if getattr(flags, name)]
    if len(modes) > 1:
        raise RequestError(f"--{modes[0]} and --{modes[1]} exclude each other".replace("_", "-"))
    if flags.resolve and not (flags.cfg or flags.help):
        raise RequestError("--resolve needs --cfg or --help")


def _last(overrides: list[Override], key: str) -> object:
    """Returns the last value that is given to a key, or None."""
    values = [override.value() for override in overrides if override.key_or_group == key]
    return values[-1] if values else None
