"""Compares runs by their results and settings, and any models by the same images.

    python scripts/compare.py outputs/digits/2026-01-31_12-00-00 outputs/digits/2026-01-31_13-00-00
    python scripts/compare.py outputs/rates --output rates.csv         # every trial of a sweep
    python scripts/compare.py RUN RUN --html comparison.html           # a page with curves and images
    python scripts/compare.py RUN model.onnx sequencer2d_s --data imagenet --data-root DIR

RUN is a run folder, or a folder that holds several, such as a sweep's or outputs. Runs that differ only in their seed
share a row of the table, with the mean and the standard deviation. Runs on one data set are ranked by the metric that
they optimise (trainer.best_metric), which is one of the validation split; results on the test split, which should
decide nothing, are shown with --test alone. Runs that have not finished stand last, with the best epoch so far.

With --speed each row also has its operations an image, its images a second in training (forward and backward) and in
inference, and the milliseconds of one image, measured in turns on the device with the batch size and the precision of
the run. Let nothing else run meanwhile.

With --paired, or where a MODEL is no run, all models are evaluated on the same images of the validation split, or with
--test of the test split. MODEL is also a model folder, a checkpoint, an export (.onnx, .pt2) or a timm name. Each has
its accuracy with a 95% confidence interval; each pair the number of images that only one of the two classifies
correctly, the difference of the accuracies with its bootstrap interval, and the p-value of McNemar's exact test, with
that adjusted by Holm's method where there are several pairs.
"""

import os
from argparse import Namespace, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import Parser, add_model_options, load, named_model, pick_device, prepare_files, run

from sequencer.config.errors import RequestError
from sequencer.config.named_runs import OF_A_MODEL
from sequencer.config.schema import DataConfig
from sequencer.console import say
from sequencer.printing import printable

if TYPE_CHECKING:
    from sequencer.analysis.comparison import Comparison

OF_EVALUATION = ("data", "data_root", "arch", "slot", "trust")  # options that the table of runs has no use for


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    data_sets = next(field.metadata["choices"] for field in fields(DataConfig) if field.name == "name")
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="run folder, folder of run folders, or any other model")
    add("--test", action="store_true", help="show the results on the test split, or evaluate on it")
    add("--output", metavar="FILE", type=Path, help="also write a CSV file with one row for each run or, paired, pair")
    add("--speed", action="store_true", help="also measure the speed of each row of the table")
    add("--html", metavar="FILE", type=Path, help="also write a page that shows runs side by side; implies --paired")
    add("--paired", action="store_true", help="also evaluate runs on the same images and compare them in pairs")
    add("--data", metavar="NAME", choices=data_sets, help=f"data set: {', '.join(data_sets)}; default: the models'")
    add("--data-root", metavar="DIR", help="folder that holds the data set")
    add_model_options(parser)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    others = [model for model in args.models if not holds_runs(model)]
    if others and args.html:
        raise RequestError(f"--html shows runs, and {printable(others[0])} is none")
    paired = bool(others or args.paired or args.html)
    if args.speed and paired:
        raise RequestError("--speed is of the table of runs: leave out --paired, --html and models that are no runs")
    if not paired and (given := [name for name in OF_EVALUATION if getattr(args, name)]):
        raise RequestError(f"--{given[0].replace('_', '-')} is of the comparison on the same images: add --paired")

    prepare_files({"--output": args.output, "--html": args.html})
    if others:
        sources, table = find_sources(args), None
    else:
        table = show_table(args)
        sources = [str(each.folder) for row in table.rows for each in row.runs]
    if paired:
        compare_pairs(args, sources, table)
    for path in (args.output, args.html):
        if path:
            say(f"written: {printable(path)}")


def show_table(args: Namespace) -> "Comparison":
    """Prints the table of runs; writes it too, unless the CSV file is that of the pairs."""
    from sequencer.analysis import compare, find_runs, print_comparison, write_csv

    table = compare(find_runs(map(Path, args.models)))
    if args.speed:
        measure(table, args)
    if args.output and not (args.paired or args.html):
        write_csv(table, args.output, args.test)
    print_comparison(table, args.test, folders=True)
    return table


def measure(table: "Comparison", args: Namespace) -> None:
    """Adds the speed of each finished row to the results of its runs.

    Raises:
        RequestError: A model cannot be loaded.
    """
    from sequencer.config.request import load_run
    from sequencer.measure.speed import Subject, measure_speeds
    from sequencer.training.setup import dtype_of

    device = pick_device(args.device)
    rows, subjects = [row for row in table.rows if row.is_finished], []
    for row in rows:
        loaded = load(str(row.runs[0].folder), args)
        config = load_run(row.runs[0].folder)
        dtype = dtype_of(str(config.trainer.precision))
        size = loaded.pretrained_cfg["input_size"]
        subjects.append(Subject(loaded.model.to(device), size, config.data.batch_size, dtype))
    for row, speed in zip(rows, measure_speeds(subjects, device), strict=True):
        for each in row.runs:
            each.results.update({f"speed/{name}": value for name, value in speed._asdict().items()})


def compare_pairs(args: Namespace, sources: list[str], table: "Comparison | None") -> None:
    """Compares models on the same images; prints and writes the result.

    Raises:
        RequestError: There are too few models, one cannot be loaded, or they have different classes or data.
    """
    if len(sources) < 2:
        raise RequestError("a comparison on the same images takes two models or more")

    from sequencer.analysis.paired import evaluate_paired, print_paired, write_pairs
    from sequencer.evaluation import evaluation_data

    device = pick_device(args.device)
    models = [load(source, args) for source in sources]
    data = [evaluation_data(loaded, args.data, root=args.data_root) for loaded in models]
    found = evaluate_paired(sources, models, data, "test" if args.test else "val", device)
    if table:
        say("")
    print_paired(found)
    if args.output:
        write_pairs(found, args.output)
    if args.html and table:
        from sequencer.report import write_comparison

        write_comparison(table, found, args.html)


def holds_runs(model: str) -> bool:
    """Whether an argument is a run folder or a folder that is none of a model, so that it should hold runs."""
    path = Path(model)
    of_a_model = any((path / name).exists() for name in OF_A_MODEL)
    return (path / "config.yaml").is_file() or (path.is_dir() and not of_a_model)


def find_sources(args: Namespace) -> list[str]:
    """Returns what each model is loaded from, where some are no runs; a folder of runs stands for all of them.

    Raises:
        RequestError: There is no such model, or a timm model has no data set.
    """
    from sequencer.analysis import find_runs

    sources: list[str] = []
    for model in args.models:
        if args.data is None and not os.path.exists(model):
            raise RequestError(f"{model} is no file or folder; a timm model needs a data set, with --data NAME")
        sources += map(str, find_runs([Path(model)])) if holds_runs(model) else [named_model(model, args)]
    return sources


if __name__ == "__main__":
    raise SystemExit(main())
