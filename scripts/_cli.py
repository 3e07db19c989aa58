"""What the scripts share: arguments, devices, errors in a line or two, exit codes.

0 done; 1 the work failed; 2 the request was wrong; 130 interrupted. Imports torch only where it is used, so that
`--help` and a wrong argument are answered at once.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from conf.errors import RequestError, say
from conf.schema import check_environment

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors leave the usage to --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n{self.prog} --help lists the arguments\n")


def integer(low: int) -> Callable[[str], int]:
    """The argument type of integers from `low` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not an integer") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    return parse


def run(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Does the work and returns the exit code; errors go to standard error, with `args.debug` after a traceback."""
    try:
        check_environment()
        work(args)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        code, message = _explain(error)
        print(message, file=sys.stderr)
        return code
    return 0


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, RequestError):
        return 2, f"error: {error}"
    return 1, f"error: {say(error)}\nadd --debug for the traceback"


def pick_device(name: str) -> "torch.device":
    """The device that `auto`, `cpu` or `cuda` stands for.

    Raises:
        RequestError: there is no GPU.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
