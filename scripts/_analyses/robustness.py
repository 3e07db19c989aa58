"""The accuracy on corrupted images, under attacks, and on other natural images."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import created, integer, load_original, need_packages, pick_device
from _labelled import LabelledImages

from _analyses.common import finish, output_folder
from _analyses.labelled import add_labelled_arguments
from sequencer.config.errors import RequestError
from sequencer.console import table_lines

if TYPE_CHECKING:
    from sequencer.analysis.pieces import Setting
    from sequencer.data import IndexedSplit
    from sequencer.models import LoadedModel

ATTACKS = ("fgsm", "pgd")
FILES = ("robustness.png", "robustness.csv", "robustness.json")
CAPTIONS = {
    "cifar": "Corruptions as in CIFAR-10-C (constants of hendrycks/robustness), made here; frost is left out.",
    "imagenet": "Corruptions as in ImageNet-C (imagecorruptions-imaug) of 224 px, stored as JPEG, crop 1.0.",
    "stored": "Stored arrays of CIFAR-10-C.",
    "none": "",
}
ATTACK_CAPTION = "Attacks: L-infinity, epsilon 1/255; PGD 5 steps of 0.5/255 from a random start."


def add_arguments(command: ArgumentParser) -> None:
    """Adds MODEL, the images, and what is done to them."""
    add = command.add_argument
    add("model", metavar="MODEL", help="run folder, model folder, checkpoint or timm name")
    add_labelled_arguments(command)
    add(
        "--corruptions",
        choices=("cifar", "imagenet", "none"),
        help="made as in CIFAR-10-C, without frost, or as in ImageNet-C; default: cifar, or none with --stored",
    )
    add("--stored", metavar="DIR", type=Path, help="folder of CIFAR-10-C: NAME.npy and labels.npy")
    add("--attacks", metavar="NAMES", type=_attacks, default=(), help="fgsm, pgd or both, separated by a comma")
    add("--seed", metavar="N", type=integer(0), default=0, help="of corruptions and random starts; default: 0")
    add(
        "--variant",
        choices=("a", "r", "v2", "sketch", "real"),
        help="evaluate on ImageNet-A, -R, -V2, -Sketch, or with ReaL labels; --data-root is its folder of classes",
    )
    add("--clean-root", metavar="DIR", help="ImageNet's validation folder, for the accuracy on the same classes")


def _attacks(text: str) -> tuple[str, ...]:
    """The argument type of attacks separated by commas."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in ATTACKS]:
        raise ArgumentTypeError(f"{unknown[0]} is none of {', '.join(ATTACKS)}")
    return names


def robustness(args: Namespace) -> int:
    """Writes robustness.json after each piece, and at the end robustness.csv and robustness.png."""
    if args.variant:
        _check_variant(args)
        return _natural(args)
    if args.clean_root:
        raise RequestError("--clean-root goes with --variant")
    if args.stored and args.corruptions in ("cifar", "imagenet"):
        raise RequestError(f"--stored and --corruptions {args.corruptions}: give one of them")
    kind = "stored" if args.stored else args.corruptions or "cifar"
    if kind == "imagenet":
        need_packages("--corruptions imagenet", "imagecorruptions")
    if args.attacks:
        need_packages("--attacks", "captum")
    return _corrupted(args, kind)


def _corrupted(args: Namespace, kind: str) -> int:
    import numpy as np

    from sequencer.analysis.corrupted_images import (
        KINDS,
        Clean,
        StoredSplit,
        piece_loader,
        read_stored_labels,
        stored_corruptions,
    )
    from sequencer.analysis.corruptions import SEVERITIES
    from sequencer.analysis.pieces import Ledger
    from sequencer.analysis.robustness import (
        Normalised,
        attacked,
        classifier,
        corruption_errors,
        mean_corruption_error,
        predict_classes,
    )
    from sequencer.analysis.robustness_plots import plot_robustness
    from sequencer.data import IndexedSplit

    output = output_folder(args)
    with created(output):
        device = pick_device(args.device)
        loaded = load_original(args.model, args)
        labelled = LabelledImages(loaded, args, device)
        config, split = labelled.data, labelled.split
        if not isinstance(split, IndexedSplit):
            raise RequestError(f"data={config.name}: its images cannot be read one by one, as corruptions need")
        split = split.subset(np.arange(len(split))[: args.limit])
        ledger = Ledger(output / "robustness.json", _identify(loaded))
        model = Normalised(loaded.model, config).to(device)
        base: Setting = {"images": split.fingerprint, "img_size": config.img_size, "crop_pct": config.crop_pct}
        wanted: dict[str, Setting] = {"clean": base}
        names = stored_corruptions(args.stored) if kind == "stored" else KINDS[kind][0] if kind != "none" else []
        pieces = {f"{kind} {name} {level}": (name, level) for name in names for level in SEVERITIES}
        own = {"stored": str(args.stored.resolve()), "limit": args.limit} if kind == "stored" else {"seed": args.seed}
        wanted |= dict.fromkeys(pieces, base | own)
        wanted |= {attack: base | ({"seed": args.seed} if attack == "pgd" else {}) for attack in args.attacks}
        labels = read_stored_labels(args.stored) if kind == "stored" else np.zeros(0, int)

        def compute(piece: str, description: str) -> tuple[int, int, int]:
            prepare: Any = Clean(config)
            images, classify = split, classifier(model)
            if piece in args.attacks:
                classify = attacked(model, piece, args.seed)
            elif kind == "stored" and piece in pieces:
                name, severity = pieces[piece]
                path = args.stored / f"{name}.npy"
                images = StoredSplit(path, labels, severity, split.class_names, args.limit)
            elif piece in pieces:
                prepare = KINDS[kind][1](config, *pieces[piece], args.seed)
            loader = piece_loader(images, prepare, args.batch_size, config.num_workers)
            found = predict_classes(classify, loader, device, description)
            return len(found.labels), found.hits, len(images) - len(found.labels)

        ledger.complete(wanted, compute)
        top1 = {key: ledger.pieces[piece].top1 for piece, key in pieces.items()}
        others = {name: ledger.pieces[name].top1 for name in ("clean", *args.attacks)}
        caption = f"{loaded.arch} on {config.name}, {ledger.pieces['clean'].images:,} images. {CAPTIONS[kind]}"
        caption += f" {ATTACK_CAPTION}" if args.attacks else ""
        plot_robustness(top1, {_title(name): value for name, value in others.items()}, caption, output / FILES[0])
        ledger.write_csv(output / "robustness.csv")
    errors = corruption_errors(top1) if kind == "imagenet" else {}
    lines = [
        [_title(name), f"{value:.2%}", *[""] * (len(SEVERITIES) if pieces else 0)] for name, value in others.items()
    ]
    for name in names:
        values = [top1[name, level] for level in SEVERITIES]
        lines.append([name, f"{sum(values) / len(values):.2%}", *(f"{value:.2%}" for value in values)])
        if kind == "imagenet":
            lines[-1].append(f"{100 * errors[name]:.1f}")
    severities = [f"severity {level}" for level in SEVERITIES] if pieces else []
    header = ["", "top-1", *severities, *(["CE"] if errors else [])]
    shown = table_lines(header, [row + [""] * (len(header) - len(row)) for row in lines])
    if top1:
        shown.append(f"mean over corruptions and severities: {sum(top1.values()) / len(top1):.2%}")
    if (mce := mean_corruption_error(errors)) is not None:
        shown.append(f"mCE, normalised by AlexNet: {mce:.1f}")
    if kind == "cifar" or (kind == "stored" and "frost" not in names):
        shown.append("frost is left out: it needs photographs that are not part of this package")
    return finish(ledger.pieces["clean"].unreadable, shown, [output / name for name in FILES])


def _check_variant(args: Namespace) -> None:
    """Checks the options of --variant, before torch is imported.

    Raises:
        RequestError: An option is missing, or does not go with --variant.
    """
    if args.data_root is None:
        raise RequestError(f"--variant {args.variant} needs --data-root, the folder of its classes")
    others = {
        "--data": args.data,
        "--split": args.split,
        "--stored": args.stored,
        "--attacks": args.attacks,
        "--corruptions": args.corruptions if args.corruptions != "none" else None,
    }
    for option, value in others.items():
        if value:
            raise RequestError(f"{option} does not go with --variant")
    if args.variant == "real" and args.clean_root:
        raise RequestError("--clean-root does not go with --variant real, whose images are those of ImageNet")


def _natural(args: Namespace) -> int:
    import numpy as np

    from sequencer.analysis.corrupted_images import Clean, piece_loader
    from sequencer.analysis.natural import (
        CLASSES,
        VARIANTS,
        count_real,
        of_classes,
        open_folder,
        real_labels,
    )
    from sequencer.analysis.pieces import Ledger
    from sequencer.analysis.robustness import Normalised, classifier, predict_classes
    from sequencer.analysis.robustness_plots import plot_robustness
    from sequencer.config.schema import DataConfig
    from sequencer.evaluation import input_config

    output, variant = output_folder(args), VARIANTS[args.variant]
    with created(output):
        device = pick_device(args.device)
        loaded = load_original(args.model, args)
        if loaded.model.num_classes != CLASSES:
            raise RequestError(f"--variant needs a model of the {CLASSES:,} classes of ImageNet: this one has others")
        config = input_config(loaded)
        workers = DataConfig.num_workers if args.num_workers is None else args.num_workers
        split, classes = open_folder(args.data_root, "--data-root", variant.num_classes)
        clean = f"clean, same {len(classes):,} classes"
        splits: dict[str, IndexedSplit] = {variant.title: split}
        if args.variant == "real":
            right = real_labels(split.ids)
            splits = {clean: split, variant.title: split}
        elif args.clean_root:
            splits = {clean: of_classes(open_folder(args.clean_root, "--clean-root")[0], classes)} | splits
        splits = {name: split.subset(np.arange(len(split))[: args.limit]) for name, split in splits.items()}
        ledger = Ledger(output / "robustness.json", _identify(loaded))
        shared: Setting = {"img_size": config.img_size, "crop_pct": config.crop_pct, "classes": len(classes)}
        keys = {name: f"{args.variant} {name}" for name in splits}
        wanted = {keys[name]: shared | {"images": split.fingerprint} for name, split in splits.items()}
        model = Normalised(loaded.model, config).to(device)

        def compute(piece: str, description: str) -> tuple[int, int, int]:
            name = piece.removeprefix(f"{args.variant} ")
            images = splits[name]
            loader = piece_loader(images, Clean(config), args.batch_size, workers)
            found = predict_classes(classifier(model), loader, device, description, classes)
            total, hits = len(found.labels), found.hits
            unreadable = len(images) - total
            if args.variant == "real" and name == variant.title:
                total, hits = count_real(found, right)
            return total, hits, unreadable

        ledger.complete(wanted, compute)
        found = {name: ledger.pieces[key] for name, key in keys.items()}
        caption = f"{loaded.arch}, {len(classes):,} classes, {config.img_size} px, crop {config.crop_pct:g}."
        plot_robustness({}, {name: piece.top1 for name, piece in found.items()}, caption, output / FILES[0])
        ledger.write_csv(output / "robustness.csv")
    lines = [[name, f"{piece.images:,}", f"{piece.top1:.2%}"] for name, piece in found.items()]
    return finish(
        max(piece.unreadable for piece in found.values()),
        table_lines(["", "images", "top-1"], lines),
        [output / name for name in FILES],
    )


def _title(name: str) -> str:
    return name.upper() if name in ATTACKS else name


def _identify(loaded: "LoadedModel") -> "Setting":
    """Identifies a model by its architecture, the slot of its weights, and their hash."""
    from sequencer.export.verify import sha256_of_weights

    return {"arch": loaded.arch, "slot": loaded.slot, "weights": sha256_of_weights(loaded.model)[:12]}
