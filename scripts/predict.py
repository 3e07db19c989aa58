"""Predicts the classes of images, with their probabilities.

    python scripts/predict.py outputs/digits/2026-01-31_12-00-00 photograph.jpg folder/ 'scans/**/*.png'
    find archive -name '*.jpg' | python scripts/predict.py sequencer2d_s - --top 3 --output classes.parquet

MODEL is a run folder, a model folder, a checkpoint, an export (.onnx, .pt2) or a timm name. PATHS are files, folders
(searched recursively), glob patterns, or - for a list on standard input, one path per line. The line of an image that
cannot be read gives the reason; the other images are predicted, and the exit code is 1. The suffix of --output decides
the format: .csv, .json (one array), .jsonl (an object per line), .parquet (with pyarrow) or .txt (the table). Tables,
CSV and Parquet files show control characters of names, and bytes that are not UTF-8, escaped; JSON holds the names
themselves.
"""

import csv
import io
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from _cli import (
    Parser,
    add_model_options,
    created,
    import_torch,
    integer,
    load,
    named_model,
    need_packages,
    pick_device,
    run,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from sequencer.config.errors import RequestError
from sequencer.config.schema import MOST_WORKERS
from sequencer.files import to_json, write_atomically
from sequencer.printing import printable

if TYPE_CHECKING:
    from sequencer.evaluation import Prediction

SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "table"}
LOOK_AHEAD = 64  # predictions that determine the widths of the columns of a table
ROW_GROUP = 10_000  # predictions of a row group of a Parquet file, which is in memory until it is written


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, model folder, checkpoint, .onnx or .pt2 file, or timm name")
    add("paths", metavar="PATHS", nargs="+", help="files, folders, glob patterns, or - for a list on standard input")
    add("--top", metavar="N", type=integer(1), default=1, help="classes per image; default: 1")
    add("--format", choices=sorted(SUFFIXES.values()), help="default: by the suffix of --output, otherwise table")
    endings = ", ".join(SUFFIXES)
    add("--output", metavar="FILE", type=Path, help=f"{endings}; written when all images are done; default: stdout")
    add_model_options(parser)
    add("--batch-size", metavar="N", type=integer(1), default=32, help="images per forward pass; default: 32")
    workers = min(8, os.cpu_count() or 1)
    add("--num-workers", metavar="N", type=integer(1, MOST_WORKERS), default=workers, help="threads that read images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    args.format = choose_format(parser, args.format, args.output)
    return args


def choose_format(parser: Parser, asked: str | None, output: Path | None) -> str:
    """Returns the format of the output; ends with an error where the suffix of the file has none, or another one."""
    if output is None:
        if asked == "parquet":
            parser.error("--format parquet needs --output FILE.parquet: a terminal cannot show it")
        return asked or "table"
    by_suffix = SUFFIXES.get(output.suffix.lower())
    if by_suffix is None and asked is None:
        parser.error(f"--output {output}: its suffix is none of {', '.join(SUFFIXES)}; add --format, or another suffix")
    if by_suffix and asked and by_suffix != asked:
        parser.error(f"--output {output}: files with this suffix hold {by_suffix}, and --format is {asked}")
    return asked or str(by_suffix)


def work(args: Namespace) -> int:
    args.model = named_model(args.model, args)
    if args.format == "parquet":
        need_packages("Parquet", "pyarrow")
    if args.output and args.output.exists() and not args.output.is_file():
        raise RequestError(f"--output {args.output} is no regular file; name a file, or leave it out to print")
    found = predictions(args)
    if args.output is None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a TextIOWrapper
        return write(found, sys.stdout, args)
    code = 0

    def to_file(path: Path) -> None:
        nonlocal code
        text: dict[str, Any] = {} if args.format == "parquet" else {"encoding": "utf-8", "newline": ""}
        with open(path, "w" if text else "wb", **text) as file:
            code = write(found, file, args)

    with created(args.output.parent):
        write_atomically(args.output, to_file)
    print(f"written: {printable(args.output)}", file=sys.stderr)
    return code


def predictions(args: Namespace) -> "Iterator[Prediction]":
    import_torch()
    from sequencer.data import eval_transform, resized_side
    from sequencer.evaluation import find_images, input_config, predict, readable_names

    device = pick_device(args.device)
    loaded = load(args.model, args)
    if not loaded.model.num_classes:
        raise RequestError(f"{args.model} has no classes: it returns features")
    names = readable_names(loaded.class_names, loaded.model.num_classes)  # type: ignore[arg-type]  # an int
    config = input_config(loaded)
    images = find_images(sources(args.paths))
    return predict(
        loaded.model.to(device),
        eval_transform(config),
        images,
        names,
        args.top,
        args.batch_size,
        args.num_workers,
        device,
        resized_side(config),
    )


def sources(paths: list[str]) -> Iterator[str]:
    """Yields the arguments, with the paths on standard input in place of `-`."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # paths need not be UTF-8
    for path in paths:
        if path == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        else:
            yield path


def write(found: "Iterator[Prediction]", file: IO[Any], args: Namespace) -> int:
    """Writes the predictions as they come; returns the exit code, 1 if an image cannot be read.

    Args:
        found: The predictions.
        file: A text stream, or for Parquet a binary one.
        args: The format, the number of classes, and the paths that were asked for.
    """
    total = unreadable = 0

    def counted() -> "Iterator[Prediction]":
        nonlocal total, unreadable
        for prediction in progress(found, file, args.paths):
            total, unreadable = total + 1, unreadable + (prediction.error is not None)
            yield prediction

    WRITERS[args.format](counted(), file, args.top)
    if unreadable:
        print(f"{unreadable:,} of {total:,} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def progress(found: "Iterator[Prediction]", file: IO[Any], paths: list[str]) -> "Iterable[Prediction]":
    """Draws a progress bar on standard error, if that is a terminal and the predictions go elsewhere."""
    from sequencer.evaluation import find_images

    if not sys.stderr.isatty() or file.isatty():
        yield from found
        return
    columns = (BarColumn(), MofNCompleteColumn(), TaskProgressColumn(show_speed=True), TimeRemainingColumn())
    total = None if "-" in paths else sum(1 for _ in find_images(paths))
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield from bar.track(found, total=total)


def write_table(found: "Iterator[Prediction]", file: IO[str], top: int) -> None:
    """Writes aligned columns; their widths fit the first predictions, so that rows are written as they come."""
    first = list(islice(found, LOOK_AHEAD))
    path_width = max((len(printable(prediction.path)) for prediction in first), default=0)
    class_width = max((len(printable(name)) for prediction in first for name, _ in prediction.classes), default=0)
    for prediction in chain(first, found):
        cells = [f"{printable(name):<{class_width}}  {probability:>7.2%}" for name, probability in prediction.classes]
        answer = "    ".join(cells) or f"cannot be read: {printable(prediction.error)}"
        print(f"{printable(prediction.path):<{path_width}}    {answer}", file=file)


def write_jsonl(found: "Iterator[Prediction]", file: IO[str], top: int) -> None:
    """Writes one JSON object per line."""
    for prediction in found:
        print(as_json(prediction), file=file)


def write_json(found: "Iterator[Prediction]", file: IO[str], top: int) -> None:
    """Writes one JSON array of the objects of `write_jsonl`."""
    separator = "[\n"
    for prediction in found:
        file.write(separator + as_json(prediction))
        separator = ",\n"
    file.write("[]\n" if separator == "[\n" else "\n]\n")


def as_json(prediction: "Prediction") -> str:
    classes = [{"class": name, "probability": probability} for name, probability in prediction.classes]
    answer = {"error": prediction.error} if prediction.error else {"classes": classes}
    return to_json({"path": prediction.path} | answer)


def columns(top: int) -> list[str]:
    """Returns the names of a row's columns: path, class and probability of each of the `top` classes, error."""
    suffixes = ["" if place == 1 else f"_{place}" for place in range(1, top + 1)]
    return ["path", *(name + suffix for suffix in suffixes for name in ("class", "probability")), "error"]


def row(prediction: "Prediction", top: int) -> list[str | float | None]:
    """Returns the values of the columns; None where there is none."""
    cells: list[str | float | None] = []
    for name, probability in prediction.classes:
        cells += [printable(name), probability]
    cells += [None] * (2 * top - len(cells))
    return [printable(prediction.path), *cells, printable(prediction.error) if prediction.error else None]


def write_csv(found: "Iterator[Prediction]", file: IO[str], top: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns(top))
    for prediction in found:
        writer.writerow(row(prediction, top))


def write_parquet(found: "Iterator[Prediction]", file: IO[bytes], top: int) -> None:
    """Writes the columns of a CSV file, null where a value is missing; one row group after another."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    types = [pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in columns(top)]
    schema = pyarrow.schema(zip(columns(top), types, strict=True))
    with ParquetWriter(file, schema) as writer:
        while rows := [row(prediction, top) for prediction in islice(found, ROW_GROUP)]:
            arrays = [pyarrow.array(values, kind) for values, kind in zip(zip(*rows, strict=True), types, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


WRITERS: "dict[str, Callable[[Iterator[Prediction], Any, int], None]]" = {
    "csv": write_csv,
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "table": write_table,
}


if __name__ == "__main__":
    raise SystemExit(main())
