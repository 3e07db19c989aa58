"""Evaluates a model on the validation or test split of a data set: top-1, top-5, loss and a table of classes.

    python scripts/evaluate.py outputs/digits/2026-01-31_12-00-00
    python scripts/evaluate.py sequencer2d_s --data imagenet --data-root /data/imagenet --split val
    torchrun --nproc-per-node 8 scripts/evaluate.py MODEL        # the same figures, on eight devices

MODEL is a run folder, a model folder, a checkpoint, an export (.onnx, .pt2) or a timm name. The data set and the
preprocessing of a run are stored with its model folder, checkpoints and exports. Any other model needs --data and is
evaluated with the preprocessing in timm's configuration of it. The command writes evaluation.json, per_class.csv and
predictions.csv, which has for every image the predicted class, its probability, and the rank of the true class. The
CSV files show control characters of names, and bytes that are not UTF-8, escaped.
"""

import math
import os
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import Parser, add_model_options, created, integer, load, pick_device, run
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sequencer.config.schema import MOST_WORKERS, DataConfig
from sequencer.names import LARGEST_IMAGE
from sequencer.printing import printable

if TYPE_CHECKING:
    from sequencer.evaluation import ClassResult, Evaluation

MOST_CLASSES_PRINTED = 20
WORST_CLASSES_PRINTED = 10


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    data_sets = next(field.metadata["choices"] for field in fields(DataConfig) if field.name == "name")
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, model folder, checkpoint file or timm name")
    add("--data", metavar="NAME", choices=data_sets, help=f"data set: {', '.join(data_sets)}; default: the run's")
    add("--data-root", metavar="DIR", help="folder that holds the data set")
    add("--split", choices=("val", "test"), help="default: test if the data set has one, otherwise val")
    add_model_options(parser)
    add(
        "--img-size",
        metavar="N",
        type=integer(1, LARGEST_IMAGE),
        help="height and width of the images; default: the model's",
    )
    add("--crop-pct", metavar="FRACTION", type=fraction, help="fraction of the shorter side that the centre crop keeps")
    add("--flip", action="store_true", help="average the probabilities of each image and its mirror image")
    add("--batch-size", metavar="N", type=integer(1), help="images per forward pass")
    add(
        "--num-workers",
        metavar="N",
        type=integer(0, MOST_WORKERS),
        help="loader processes; 0 loads in the main process",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--output", metavar="DIR", type=Path, help="default: RUN/evaluation for a run, otherwise ./evaluation")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.data is None and not os.path.exists(args.model):  # False for a name that is too long
        parser.error(f"{args.model} is no file or folder; a timm model needs a data set, with --data NAME")
    return args


def fraction(text: str) -> float:
    """The argument type of numbers above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not a number above 0 and up to 1")
    return value


def work(args: Namespace) -> None:
    from sequencer import distributed
    from sequencer.evaluation import evaluate_model, evaluation_data, write_evaluation

    device = pick_device(args.device)
    distributed.join(device.type == "cuda")
    loaded = distributed.one_by_one(lambda: load(args.model, args))
    data = evaluation_data(
        loaded,
        args.data,
        root=args.data_root,
        img_size=args.img_size,
        crop_pct=args.crop_pct,
        eval_batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    model = Path(args.model)
    output = args.output or (model if (model / "config.yaml").is_file() else Path()) / "evaluation"
    with created(output):
        found = evaluate_model(loaded, data, args.split, device, args.flip, output / "bad_samples.csv")
    if distributed.is_first():
        write_evaluation(found, output, args.model)
        show(found, output)


def show(evaluation: "Evaluation", output: Path) -> None:
    result = evaluation.record()
    console = Console(highlight=False, markup=False)
    console.print(printable("{arch} ({slot} weights) on {data}, {split} split, {total:,} images".format(**result)))
    if result["unreadable"]:
        console.print(
            f"{result['unreadable']:,} more could not be read: {printable(output / 'bad_samples.csv')}", soft_wrap=True
        )
    console.print("top-1 {top1:.2%}   top-5 {top5:.2%}   loss {loss:.4f}".format(**result), style="bold")
    console.print("95% confidence: top-1 {top1_low:.2%} to {top1_high:.2%}".format(**result))
    console.print("{time/images_per_s:,.0f} images/s, loading included".format(**result))
    shown = evaluation.per_class
    if len(shown) > MOST_CLASSES_PRINTED:
        by_recall = sorted((row.recall, index) for index, row in enumerate(shown) if row.recall is not None)
        shown = [evaluation.per_class[index] for _, index in by_recall[:WORST_CLASSES_PRINTED]]
        console.print(f"\nthe {len(shown)} classes with the lowest recall, of {len(evaluation.per_class)}:")
    console.print(class_table(shown))
    console.print(f"written: evaluation.json, per_class.csv and predictions.csv in {printable(output)}", soft_wrap=True)


def class_table(rows: "list[ClassResult]") -> Table:
    table = Table("class")
    for name in ("images", "precision", "recall"):
        table.add_column(name, justify="right")
    for row in rows:
        ratios = ("" if ratio is None else f"{ratio:.2%}" for ratio in (row.precision, row.recall))
        table.add_row(Text(printable(row.name)), f"{row.support:,}", *ratios)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
