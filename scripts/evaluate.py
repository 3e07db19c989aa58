"""Evaluates a model on the validation or test split of a data set: top-1, top-5, loss and a table of classes.

    python scripts/evaluate.py outputs/digits/2026-01-31_12-00-00
    python scripts/evaluate.py sequencer2d_s --data imagenet --data-root /data/imagenet --split val
    torchrun --nproc-per-node 8 scripts/evaluate.py MODEL        # the same figures, on eight devices

MODEL is a run folder, a model folder, a checkpoint, an export (.onnx, .pt2) or a timm name. The data set and the
preprocessing of a run are stored with its model folder, checkpoints and exports. Any other model needs --data and is
evaluated with the preprocessing in timm's configuration of it. The command writes evaluation.json, per_class.csv and
predictions.csv, which has for every image the predicted class, its probability, and the rank of the true class, into a
folder that is named by the setting, such as RUN/evaluation/digits-test-raw-8px-crop1-flip. The CSV files show control
characters of names, and bytes that are not UTF-8, escaped.
"""

import math
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from _cli import Parser, add_model_options, created, import_torch, integer, load, named_model, pick_device, run
from _labelled import ROOT, add_data_options, check_named_data, need_data

from sequencer.config.errors import RequestError
from sequencer.config.layouts import check_data
from sequencer.config.request import describe_differences
from sequencer.console import say, table_lines
from sequencer.declared import decode_json
from sequencer.names import LARGEST_IMAGE
from sequencer.printing import printable

if TYPE_CHECKING:
    from sequencer.evaluation import ClassResult, Evaluation

MOST_CLASSES_PRINTED = 20
WORST_CLASSES_PRINTED = 10


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, model folder, checkpoint file or timm name")
    add_data_options(parser)
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
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--output", metavar="DIR", type=Path, help="default: below RUN/evaluation or outputs/evaluation")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


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
    need_data(args.model, args)
    args.model = named_model(args.model, args)
    check_named_data(args.model, args)
    import_torch()
    from sequencer import distributed
    from sequencer.data import has_test_split
    from sequencer.evaluation import describe_setting, evaluate_model, evaluation_data, write_evaluation

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
    split: Literal["val", "test"] = args.split or ("test" if has_test_split(data) else "val")
    check_data(data, [split], root=ROOT)
    setting = describe_setting(loaded.arch, loaded.slot, data, split, args.flip)
    output = args.output or default_output(Path(args.model), setting)
    distributed.on_first(lambda: check_output(output, setting))
    with created(output):
        found = evaluate_model(loaded, data, split, device, args.flip, output / "bad_samples.csv")
        if distributed.is_first():
            write_evaluation(found, output, args.model)
    if distributed.is_first():
        show(found, output)


def default_output(model: Path, setting: dict[str, Any]) -> Path:
    """Returns the folder of an evaluation, below that of its run or below `outputs`, named by the setting."""
    name = "{data}-{split}-{slot}-{img_size}px-crop{crop_pct:g}".format(**setting) + "-flip" * setting["flip"]
    runs = [folder for folder in (model, *list(model.parents)[:2]) if (folder / "config.yaml").is_file()]
    if not runs:
        return Path("outputs", "evaluation", f"{model.name}-{name}")
    return runs[0] / "evaluation" / (f"{model.stem}-{name}" if model.is_file() else name)


def check_output(output: Path, setting: dict[str, Any]) -> None:
    """Checks that a folder holds no evaluation of another setting.

    Raises:
        RequestError: It does.
    """
    path = output / "evaluation.json"
    try:
        there = decode_json(path.read_bytes())
        differences = describe_differences({key: there.get(key) for key in setting}, setting)
    except (OSError, ValueError, AttributeError):  # there is no evaluation, or a damaged one
        return
    if differences:
        raise RequestError(
            f"{printable(output)} holds another evaluation: {printable(differences)}\nname another folder with --output"
        )


def show(evaluation: "Evaluation", output: Path) -> None:
    from sequencer.evaluation import describe_unpredicted

    result = evaluation.record()
    flips = ", with mirror images" if result["flip"] else ""
    say(printable("{arch} ({slot} weights) on {data}, {split} split".format(**result)))
    say("{total:,} images of {img_size} px, crop {crop_pct:g}{}".format(flips, **result))
    if result["unreadable"]:
        say(f"{result['unreadable']:,} more could not be read: {printable(output / 'bad_samples.csv')}")
    shown = ["top-1 {top1:.2%}", *(["top-5 {top5:.2%}"] if "top5" in result else []), "loss {loss:.4f}"]
    shown += ["balanced accuracy {balanced:.2%}"] if evaluation.unbalanced else []
    say("   ".join(shown).format(**result), style="bold")
    say("95% confidence: top-1 {top1_low:.2%} to {top1_high:.2%}".format(**result))
    if remark := describe_unpredicted(evaluation.per_class):
        say(remark)
    say("{time/images_per_s:,.0f} images/s, loading included".format(**result))
    rows = evaluation.per_class
    if len(rows) > MOST_CLASSES_PRINTED:
        by_recall = sorted((row.recall, index) for index, row in enumerate(rows) if row.recall is not None)
        rows = [evaluation.per_class[index] for _, index in by_recall[:WORST_CLASSES_PRINTED]]
        say(f"\nthe {len(rows)} classes with the lowest recall, of {len(evaluation.per_class)}:")
    for line in table_lines(["class", "images", "precision", "recall"], map(cells, rows)):
        say(line)
    say(f"written: evaluation.json, per_class.csv and predictions.csv in\n{printable(output)}")


def cells(row: "ClassResult") -> list[str]:
    ratios = ("" if ratio is None else f"{ratio:.2%}" for ratio in (row.precision, row.recall))
    return [printable(row.name), f"{row.support:,}", *ratios]


if __name__ == "__main__":
    raise SystemExit(main())
