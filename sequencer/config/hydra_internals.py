"""The private interfaces of Hydra that the package uses, as read in Hydra 1.3.8.

`pyproject.toml` bounds hydra-core to 1.3 because of them.
"""

import difflib
import os
import re
from argparse import Namespace
from collections.abc import Callable
from typing import NoReturn
from unittest.mock import patch

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from omegaconf import DictConfig

from sequencer.config.conf_files import ConfigFiles
from sequencer.config.errors import RequestError
from sequencer.printing import first_line

VERSION_BASE = "1.3"


def parse_flags(arguments: list[str]) -> Namespace:
    """Parses a command line into Hydra's flags and, as `overrides`, its other arguments.

    Raises:
        RequestError: An unknown flag, or a flag with an illegal value.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False  # --experiment would be --experimental-rerun

    def refuse(message: str) -> NoReturn:
        flag = re.match(r"unrecognized arguments: (--([\w.]+))", message)
        if flag and not difflib.get_close_matches(flag[1], parser._option_string_actions, cutoff=0.8):
            raise RequestError(f"{message}; overrides are written without dashes: {flag[2]}=VALUE")
        raise RequestError(f"{message}; --hydra-help lists the flags")

    parser.error = refuse  # type: ignore[method-assign]  # argparse's own prints its usage and exits
    return parser.parse_intermixed_args(arguments)  # a flag may stand among the overrides


def run_hydra(
    task: Callable[[DictConfig], float | None], flags: Namespace, overrides: list[str], files: ConfigFiles
) -> None:
    """Runs Hydra's main on a parsed command line: a sweep of `task`, or a question such as `--help` and `--cfg`.

    Does the same as a function decorated with `hydra.main`, which would parse `sys.argv` again.

    Raises:
        SystemExit: A trial failed, or the sweep was interrupted.
    """
    version.setbase(VERSION_BASE)
    flags = Namespace(**vars(flags) | {"overrides": list(overrides)})
    _run_hydra(flags, get_args_parser(), task, str(files.main), files.name)


def ask_hydra(
    task: Callable[[DictConfig], float | None], flags: Namespace, overrides: list[str], files: ConfigFiles
) -> None:
    """Has Hydra answer a question: `--help`, `--hydra-help`, `--info`, `--cfg` or shell completion.

    Raises:
        RequestError: Hydra cannot answer it.
    """
    try:
        with patch.dict(os.environ, {"HYDRA_FULL_ERROR": "1"}):  # Hydra then raises its errors instead of printing them
            run_hydra(task, flags, overrides, files)
    except SystemExit as exit:
        if exit.code:  # Hydra has said why
            raise SystemExit(2) from exit
    except Exception as error:
        raise RequestError(first_line(error)) from error
