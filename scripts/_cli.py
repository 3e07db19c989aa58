"""Shared code of the scripts: arguments, MODEL, devices, output folders, error messages and exit codes.

Exit codes: 0 done; 1 the work failed; 2 the request was wrong; 130 interrupted. torch is imported by the functions that
use it, so that `--help` and a wrong argument are answered at once.
"""

import argparse
import difflib
import errno
import gc
import mimetypes
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any, NoReturn

from sequencer.config.environment import check_environment
from sequencer.config.errors import RequestError, SharedError, show, summarise_error
from sequencer.config.named_runs import OF_A_MODEL, find_run, named_run
from sequencer.config.preflight import check_model_name, check_source
from sequencer.config.schema import LARGEST_INTEGER
from sequencer.files import WriteError, apply_umask, nearest_existing, writing
from sequencer.output import drop_unread_output
from sequencer.printing import printable

if TYPE_CHECKING:
    import torch

    from sequencer.models import LoadedModel

PACKAGES = {"imagecorruptions": "imagecorruptions-imaug"}  # of modules that are named otherwise


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are two lines, without the usage, and that refuses what can name no file."""

    _given: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = tuple(sys.argv[1:] if args is None else args)
        for argument in self._given:
            if problem := _problem(argument):
                self.error(f"argument '{show(argument)}': {problem}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message += self._hint(message)
        self.exit(2, f"error: {printable(message)}\n{self.prog} --help lists the arguments\n")

    def _hint(self, message: str) -> str:
        """Says what is likely meant by a wrong choice, by an override of `train.py`, or by images in place of MODEL."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w.-]+", found[2])
            return "".join(f"; did you mean {choice}?" for choice in difflib.get_close_matches(found[1], choices, n=1))
        if found := re.match(r"unrecognized arguments: ([\w.]+)=", message):
            option = f"--{found[1].replace('.', '-').replace('_', '-')}"
            return f"; did you mean {option}?" if option in self._option_string_actions else ""
        if re.search(r"are required: (PATHS|IMAGES)$", message):
            return "".join(f"; MODEL is missing before {path}" for path in filter(_is_images, self._given[:1]))
        return ""


def _is_images(path: str) -> bool:
    """Whether a path is an image, or a folder with one that is of no run or model, by the suffixes of names."""
    if find_run(path) != Path(path) or any(os.path.exists(os.path.join(path, name)) for name in OF_A_MODEL):
        return False
    names = os.listdir(path) if os.path.isdir(path) and os.access(path, os.R_OK) else [path]
    return any((mimetypes.guess_type(name)[0] or "").startswith("image/") for name in names)


def _problem(argument: str) -> str | None:
    """Says why an argument can be neither text nor the name of a file, or returns None."""
    if not argument:
        return "it is empty"
    if "\0" in argument:
        return "it has a NUL byte"
    try:
        if "=" not in argument:  # an override of train.py may be long
            os.stat(argument)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return os.strerror(error.errno).lower()
    return None


def integer(low: int, high: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Returns the argument type of integers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{show(text)} is not an integer") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{show(text)} is more than {high}")
        return value

    return parse


def run(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Calls `work(args)` and returns the exit code: that of `work`, 0 if it returns None, or that of its error.

    Errors are printed on standard error, after a traceback if `args.debug` is set. An error that is raised on every
    rank is printed by rank 0 only. A command whose standard output nobody reads any more ends, with exit code 0.
    """
    drop_unread_output("stderr")
    try:
        check_environment()
        code = work(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe; without this Python would fail when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):  # rich's answer, which has also replaced standard output
            return 0
        raise
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
        return 2, f"error: {summarise_error(error)}"
    return 1, f"error: {summarise_error(error)}\nadd --debug for the traceback"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how MODEL is loaded."""
    add = parser.add_argument
    add("--arch", metavar="NAME", help="architecture of a .pth or .safetensors file")
    add("--slot", choices=("raw", "ema"), help="weights of a run; default: trainer.slot of the run")
    add("--trust", action="store_true", help="load a .pt2 file, which can run any code when it is loaded")


def named_model(source: str, args: argparse.Namespace) -> str:
    """Checks, before torch is imported, that MODEL and its architecture exist; a folder of runs stands for its newest.

    Returns:
        MODEL, or the newest run in it.

    Raises:
        RequestError: There is no such file, folder, model or hub.
    """
    source = str(named_run(source))
    check_source(source)
    if args.arch is not None:
        check_model_name(args.arch)
    return source


def import_torch() -> None:
    """Imports torch and timm, and spares later garbage collections their objects: a full one would take 0.2 s."""
    gc.disable()
    try:
        import timm  # noqa: F401
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def load(source: str, args: argparse.Namespace) -> "LoadedModel":
    """Loads MODEL with the options of `add_model_options`, as `sequencer.models.load_model` does.

    Raises:
        RequestError: MODEL cannot be loaded.
    """
    from sequencer.models import CheckpointError, load_model

    try:
        return load_model(source, args.arch, args.slot, args.trust)
    except CheckpointError as error:
        raise RequestError(str(error)) from error


def load_original(source: str, args: argparse.Namespace) -> "LoadedModel":
    """Loads MODEL as `load` does, unless it is an exported file, of which no other model can be made.

    Raises:
        RequestError: MODEL is an exported file, or cannot be loaded.
    """
    from sequencer.models import CheckpointError, check_original

    try:
        check_original(source)
    except CheckpointError as error:
        raise RequestError(str(error)) from error
    return load(source, args)


def pick_device(name: str) -> "torch.device":
    """Returns the device for `auto`, `cpu` or `cuda`.

    Raises:
        RequestError: `cuda` is requested, and there is no GPU.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def need_packages(what: str, *names: str) -> None:
    """Checks that optional packages are installed.

    Raises:
        RequestError: A package is not installed.
    """
    if missing := [PACKAGES.get(name, name) for name in names if find_spec(name) is None]:
        raise RequestError(f"{what} needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")


def make_folder(output: Path) -> None:
    """Creates a folder and checks that files can be written in it, before the work starts.

    Raises:
        RequestError: The folder cannot be created or written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output).close()
    except OSError as error:
        raise RequestError(
            f"{output} cannot be written: {error.strerror}; name another folder with --output"
        ) from error


def prepare_files(files: Mapping[str, Path | None]) -> None:
    """Checks that files can be written, before the work starts, and creates their folders.

    Args:
        files: By the option that names them; None for one that is not given.

    Raises:
        RequestError: One is a folder, or its folder cannot be created or written.
    """
    given = {option: path for option, path in files.items() if path}
    for option, path in given.items():
        if path.is_dir():
            raise RequestError(f"{option} {path} is a folder; name a file")
    for path in given.values():
        make_folder(path.parent)


def add_training_options(parser: argparse.ArgumentParser, output: Path) -> None:
    """Adds the arguments of a script that trains several seeds and writes a CSV file of docs/results."""
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of train.py for every training")
    add("--seeds", default="0,1,2", metavar="N,N", help="default: %(default)s")
    add("--output", type=Path, default=output, metavar="FILE", help=f"CSV file; default: docs/results/{output.name}")
    add("--debug", action="store_true", help="show the traceback of an error")


def check_training_options(args: argparse.Namespace, keys: Sequence[str]) -> list[str]:
    """Returns the seeds.

    Args:
        args: With the arguments of `add_training_options`.
        keys: Those of the configuration that the script sets itself.

    Raises:
        RequestError: The seeds are no numbers, or an override sets one of the keys.
    """
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise RequestError(f"--seeds {args.seeds}: give numbers such as 0,1,2")
    for key in keys:
        if given := [override for override in args.overrides if override.lstrip("+").startswith(f"{key}=")]:
            raise RequestError(f"{given[0]}: this script sets {key}")
    return str(args.seeds).split(",")


@contextmanager
def created(output: Path) -> Iterator[None]:
    """Creates an output folder as `make_folder` does; removes new folders again if an error leaves them empty."""
    output = output.absolute()
    existing = nearest_existing(output)
    try:
        make_folder(output)
        yield
    except BaseException:
        for folder in (output, *output.parents):
            if folder == existing:
                break
            with suppress(OSError):  # not empty, or already removed by another rank
                folder.rmdir()
        raise


@contextmanager
def prepared(output: Path) -> Iterator[Path]:
    """Yields a temporary folder whose files are moved to `output` at the end; after an error nothing is left.

    Raises:
        RequestError: `output` cannot be created or written.
        WriteError: A file cannot be written; the error names the file in `output`.
    """
    with created(output), TemporaryDirectory(prefix=".", dir=output) as name:
        folder = Path(name)
        try:
            yield folder
        except WriteError as error:
            raise WriteError(output / error.path.relative_to(folder), error.reason) from error
        (output / "certificate.json").unlink(missing_ok=True)  # that of an older export does not hold for this one
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):
            with writing(output / path.name):
                apply_umask(path)
                os.replace(path, output / path.name)
