"""What the scripts share: arguments, MODEL, devices, folders, errors in a line or two, exit codes.

0 done; 1 the work failed; 2 the request was wrong; 130 interrupted. Imports torch only where it is used, so that
`--help` and a wrong argument are answered at once.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, NoReturn

from sequencer.config.command import check_environment
from sequencer.config.errors import RequestError, SharedError, summarise_error

if TYPE_CHECKING:
    import torch

    from sequencer.models import LoadedModel


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


def run(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Does the work and returns the exit code, its own or 0; errors go to standard error, with `args.debug` after a
    traceback. Of several processes the first one says what was wrong for all."""
    try:
        check_environment()
        return work(args) or 0
    except BrokenPipeError:  # whoever read the output has seen enough; Python would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        code, message = _explain(error)
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, SharedError):
            print(message, file=sys.stderr)
        return code


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, RequestError):
        return 2, f"error: {error}"
    return 1, f"error: {summarise_error(error)}\nadd --debug for the traceback"


def load(source: str, arch: str | None = None, slot: str | None = None) -> "LoadedModel":
    """MODEL, as `sequencer.models.load_model` reads it.

    Raises:
        RequestError: it cannot be loaded.
    """
    from sequencer.models import CheckpointError, load_model

    try:
        return load_model(source, arch, slot)
    except CheckpointError as error:
        raise RequestError(str(error)) from error


def pick_device(name: str) -> "torch.device":
    """The device that `auto`, `cpu` or `cuda` stands for.

    Raises:
        RequestError: there is no GPU.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def need_onnx() -> None:
    """
    Raises:
        RequestError: a package that ONNX files are written or read with is not installed.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise RequestError(f"ONNX needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")


def make_folder(output: Path) -> None:
    """Makes the folder before the work, so that a wrong one is found out at once.

    Raises:
        RequestError: it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output).close()
    except OSError as error:
        raise RequestError(
            f"{output} cannot be written: {error.strerror}; name another folder with --output"
        ) from error


@contextmanager
def prepared(output: Path) -> Iterator[Path]:
    """A folder to write into, whose files go to `output` if all goes well; otherwise nothing is left."""
    existed = output.is_dir()
    make_folder(output)
    kept = False
    try:
        with TemporaryDirectory(prefix=".", dir=output) as folder:
            yield Path(folder)
            (output / "certificate.json").unlink(missing_ok=True)  # that of an older export does not hold for this one
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == "certificate.json"):
                os.replace(path, output / path.name)
            kept = True
    finally:
        if not kept and not existed:
            output.rmdir()
