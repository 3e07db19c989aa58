"""Top-1, top-5, loss and a table by class of a model on the validation or test part of a data set.

    python scripts/evaluate.py outputs/digits/2026-01-31_12-00-00
    python scripts/evaluate.py sequencer2d_s --data imagenet --data-root /data/imagenet --split val
    torchrun --nproc-per-node 8 scripts/evaluate.py MODEL        # the same figures from eight devices

MODEL is a run folder, a model folder, a checkpoint, an export (.onnx, .pt2) or a timm name. A run, its model folder,
its checkpoints and its exports know their data set and preprocessing; anything else needs --data, and takes the
preprocessing that the model was made for. Writes evaluation.json, per_class.csv, and predictions.csv: for every image
the predicted class, its probability, and at which place the image's own class comes.
"""

import csv
import json
import math
import time
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from _cli import Parser, integer, load, make_folder, pick_device, run

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig

if TYPE_CHECKING:
    import torch

    from sequencer.data import Split
    from sequencer.evaluation import ClassResult, Outcome
    from sequencer.models import LoadedModel

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
    add("--data-root", metavar="DIR", help="folder that holds the set")
    add("--split", choices=("val", "test"), help="default: test where the set has one, otherwise val")
    add("--arch", metavar="NAME", help="architecture of a .pth or .safetensors file")
    add("--slot", choices=("raw", "ema"), help="weights of a run; default: what trainer.slot was")
    add("--img-size", metavar="N", type=integer(1), help="height and width of the images; default: the model's")
    add("--crop-pct", metavar="SHARE", type=share, help="of the shorter side that the centre crop keeps")
    add("--flip", action="store_true", help="average the probabilities of each image and its mirror image")
    add("--batch-size", metavar="N", type=integer(1), help="images per forward pass")
    add("--num-workers", metavar="N", type=integer(0), help="loader processes; 0 loads in this one")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU where there is one")
    add("--output", metavar="DIR", type=Path, help="default: RUN/evaluation for a run, otherwise ./evaluation")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.data is None and not Path(args.model).exists():
        parser.error(f"{args.model} is no file or folder; for a timm model say on which set, with --data NAME")
    return args


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not a number above 0 and up to 1")
    return value


def work(args: Namespace) -> None:
    from sequencer import distributed
    from sequencer.evaluation import FlipAveraged, check_img_size, evaluate

    device = pick_device(args.device)
    distributed.join(device.type == "cuda")
    loaded = distributed.one_by_one(lambda: load(args.model, args.arch, args.slot))
    data = data_config(args, loaded)
    split, images = distributed.one_by_one(lambda: open_part(data, args.split))
    check_classes(loaded, images)
    if args.img_size:
        check_img_size(loaded, args.img_size)
    model = Path(args.model)
    output = args.output or (model if (model / "config.yaml").is_file() else Path()) / "evaluation"
    distributed.one_by_one(lambda: start_folder(output))
    loader = open_loader(images, data, split, output / "bad_samples.csv")
    network = (FlipAveraged(loaded.model) if args.flip else loaded.model).to(device)
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    metrics = evaluate(network, loader, len(images.class_names), device, outcomes)
    seconds = time.perf_counter() - start
    if not distributed.is_first():
        return
    about = {"model": args.model, "arch": loaded.arch, "slot": loaded.slot, "data": data.name, "split": split}
    about |= {"img_size": data.img_size, "crop_pct": data.crop_pct, "flip": args.flip}
    values = summarise(metrics.compute(), len(images), seconds)
    per_class = metrics.per_class(images.class_names)
    write(output, about | values, per_class, outcomes, images)
    show(about | values, per_class, output)


def start_folder(output: Path) -> None:
    from sequencer.distributed import is_first

    make_folder(output)
    if is_first():  # before the others may add to it
        (output / "bad_samples.csv").unlink(missing_ok=True)


def open_loader(images: "Split", data: DataConfig, split: str, bad_samples: Path) -> Any:
    """This process's share of the images, in batches."""
    from sequencer.data import Quarantine
    from sequencer.distributed import rank, world_size

    images.quarantine = Quarantine(bad_samples, split, len(images), data.max_bad_share)
    return images.evaluation_loader(data, rank(), world_size())


def summarise(metrics: "dict[str, torch.Tensor]", images: int, seconds: float) -> dict[str, Any]:
    from sequencer.evaluation import wilson_interval

    values = {name: value.item() for name, value in metrics.items()}
    for name in ("top1", "top5"):
        values[f"{name}_low"], values[f"{name}_high"] = wilson_interval(values[name], values["total"])
    values["unreadable"] = images - values["total"]
    return values | {"time/evaluation_s": seconds, "time/images_per_s": values["total"] / seconds}


def data_config(args: Namespace, loaded: "LoadedModel") -> DataConfig:
    """The data section that the model was trained with, or one for `--data` with the model's preprocessing."""
    from sequencer.evaluation import data_section, preprocessing

    own = data_section(loaded)
    if own is not None and args.data in (None, own.name):
        config = own
    elif args.data is not None:
        config = replace(default_data(args.data), **preprocessing(loaded))
    else:
        raise RequestError(f"{args.model} does not know its data set: add --data NAME")
    given = {"root": args.data_root, "eval_batch_size": args.batch_size, "num_workers": args.num_workers}
    given |= {"img_size": args.img_size, "crop_pct": args.crop_pct}
    return replace(config, **{key: value for key, value in given.items() if value is not None})


def default_data(name: str) -> DataConfig:
    from sequencer.config.request import compose, to_config

    return to_config(compose([f"data={name}"])).data


def open_part(data: DataConfig, split: Literal["val", "test"] | None) -> tuple[str, "Split"]:
    """Opens just the part that is asked for: who evaluates ImageNet need not have its training images."""
    from sequencer.data import eval_transform, has_test_split, open_split

    split = split or ("test" if has_test_split(data) else "val")
    return split, open_split(data, split, eval_transform(data))


def check_classes(loaded: "LoadedModel", images: "Split") -> None:
    from rich.console import Console

    from sequencer.distributed import is_first

    names, expected = images.class_names, loaded.class_names
    if loaded.model.num_classes != len(names):
        raise RequestError(f"the model has {loaded.model.num_classes} classes, the data set {len(names)}")
    if expected is not None and (other := [pair for pair in zip(expected, names, strict=True) if pair[0] != pair[1]]):
        Console(stderr=True, quiet=not is_first()).print(
            f"note: {len(other)} classes have other names in the model than in the data set, e.g. {other[0][0]} and"
            f" {other[0][1]}; they are matched by position",
            markup=False,
            highlight=False,
        )


def write(
    output: Path,
    result: dict[str, Any],
    per_class: "list[ClassResult]",
    outcomes: "list[Outcome]",
    images: "Split",
) -> None:
    from sequencer.files import write_atomically

    names, ids = images.class_names, images.ids
    rows = []
    for image, label, predicted, probability, rank in outcomes:
        said = ("", "", "") if predicted is None else (names[predicted], f"{probability:.6f}", rank)
        rows.append((ids[image], names[label], *said))
    write_csv(output / "predictions.csv", ("id", "class", "predicted", "probability", "rank"), rows)
    write_csv(output / "per_class.csv", ("class", "support", "precision", "recall"), per_class)
    # JSON has no NaN
    plain = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in result.items()}
    write_atomically(output / "evaluation.json", lambda path: path.write_text(json.dumps(plain, indent=2) + "\n"))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from sequencer.files import write_atomically

    def to_file(path: Path) -> None:
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, to_file)


def show(result: dict[str, Any], per_class: list["ClassResult"], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    console.print("{arch} ({slot} weights) on {data}, {split} part, {total:,} images".format(**result))
    if result["unreadable"]:
        console.print(f"{result['unreadable']:,} more could not be read: {output / 'bad_samples.csv'}", soft_wrap=True)
    console.print("top-1 {top1:.2%}   top-5 {top5:.2%}   loss {loss:.4f}".format(**result), style="bold")
    console.print("95% confidence: top-1 {top1_low:.2%} to {top1_high:.2%}".format(**result))
    console.print("{time/images_per_s:,.0f} images a second, loading included".format(**result))
    shown = per_class
    if len(per_class) > MOST_CLASSES_PRINTED:
        by_recall = sorted((row.recall, i) for i, row in enumerate(per_class) if row.recall is not None)
        shown = [per_class[i] for _, i in by_recall[:WORST_CLASSES_PRINTED]]
        console.print(f"\nthe {len(shown)} classes of lowest recall, out of {len(per_class)}:")
    table = Table("class")
    for name in ("images", "precision", "recall"):
        table.add_column(name, justify="right")
    for row in shown:
        ratios = ("" if ratio is None else f"{ratio:.2%}" for ratio in (row.precision, row.recall))
        table.add_row(Text(row.name), f"{row.support:,}", *ratios)
    console.print(table)
    console.print(f"written: evaluation.json, per_class.csv and predictions.csv in {output}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
