"""Writes shards in WebDataset's layout, and the index that `data=webdataset` reads.

    python scripts/shards.py write PHOTOS --output SHARDS        # from an image folder's train/, val/ and test/
    python scripts/shards.py index 'SHARDS/train-*.tar'          # SHARDS/train.json for existing shards

`write` copies the image files unchanged. `index` reads each shard once to count its samples.
"""

import glob
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from tarfile import TarError

from _cli import Parser, integer, prepared, run

from sequencer.config.errors import RequestError
from sequencer.printing import printable

SPLITS = ("train", "val", "test")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="write or index")
    write = commands.add_parser("write", help="write an image folder into shards")
    write.add_argument("source", type=Path, metavar="PHOTOS", help="folder with train/, val/ and optionally test/")
    write.add_argument("--output", type=Path, required=True, metavar="DIR")
    write.add_argument("--images", type=integer(1), default=2000, metavar="N", help="images per shard; default: 2000")
    index = commands.add_parser("index", help="write the index of existing shards")
    index.add_argument("shards", metavar="PATTERN", help="paths of the shards of one split, e.g. 'DIR/train-*.tar'")
    index.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    index.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one per line")
    for command in (write, index):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return run(write_shards if args.command == "write" else index_shards, args)


def write_shards(args: Namespace) -> None:
    """Writes every split of an image folder as shards with their index."""
    import random

    splits = [split for split in SPLITS if (args.source / split).is_dir()]
    if "train" not in splits:
        raise RequestError(f"{printable(args.source)} has no folder train/")
    found = {split: scan(args.source / split) for split in splits}
    written = []
    with prepared(args.output) as folder:
        for split, (samples, classes) in found.items():
            random.Random(0).shuffle(samples)  # training shuffles within a buffer only: every shard needs all classes
            counts = [min(args.images, len(samples) - first) for first in range(0, len(samples), args.images)]
            shards = [folder / f"{split}-{number:06d}.tar" for number in range(len(counts))]
            for number, shard in enumerate(shards):
                write_shard(shard, samples, range(len(samples))[number * args.images :][: args.images])
            write_index(folder / f"{split}.json", dict(zip(shards, counts, strict=True)), classes)
            written.append(f"{split}: {len(samples):,} images in {len(shards)} shards")
    print("\n".join(written))


def write_shard(path: Path, samples: list[tuple[str, int]], numbers: range) -> None:
    """Writes the samples with these numbers as a shard.

    Raises:
        RequestError: An image cannot be read.
        WriteError: The shard cannot be written.
    """
    from webdataset import TarWriter

    from sequencer.files import writing

    # opened here, since TarWriter leaves a file open that it cannot finish
    with writing(path), open(path, "wb") as file, TarWriter(file) as writer:
        for number in numbers:
            image, label = Path(samples[number][0]), samples[number][1]
            content = {image.suffix.lstrip(".").lower(): read(image), "cls": str(label)}
            writer.write({"__key__": f"{number:08d}", **content})


def read(image: Path) -> bytes:
    """Reads an image file.

    Raises:
        RequestError: It cannot be read.
    """
    try:
        return image.read_bytes()
    except OSError as error:
        raise RequestError(f"{printable(image)}: {error.strerror}") from error


def scan(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Lists path and label of the images of a split, and the names of its classes.

    Raises:
        RequestError: A class has no image, or an image is no regular file.
    """
    from sequencer.data.files import scan_folder
    from sequencer.files import check_regular

    path = str(folder)
    try:
        samples, classes = scan_folder(path)
        for path, _ in samples:
            check_regular(path)
    except OSError as error:
        raise RequestError(f"{printable(path)}: {printable(error.strerror or error)}") from error
    return samples, classes


def index_shards(args: Namespace) -> None:
    """Writes the index of existing shards."""
    from sequencer.data.shard_files import read_samples
    from sequencer.names import MOST_CLASSES

    paths = sorted(Path(path) for path in glob.glob(args.shards))
    if not paths:
        raise RequestError(f"{printable(args.shards)}: there is no such file")
    if len({path.parent for path in paths}) > 1:
        raise RequestError(f"{printable(args.shards)}: the shards of a split must be in one folder")
    counts, highest = {}, -1
    for path in paths:
        try:
            labels = [sample.label for sample in read_samples(str(path))]
        except (OSError, TarError, ValueError, EOFError) as error:
            raise RequestError(f"{printable(path)} cannot be read: {printable(error)}") from error
        if not labels:
            raise RequestError(f"{printable(path)} holds no sample")
        wrong = next((n for n, label in enumerate(labels) if not 0 <= label < MOST_CLASSES), None)
        if wrong is not None:
            raise RequestError(f"{printable(path)}: sample {wrong} has no .cls file with a number below {MOST_CLASSES}")
        counts[path], highest = len(labels), max(highest, *labels)
    classes = [str(label) for label in range(highest + 1)]
    if args.classes:
        classes = read_names(args.classes)[: highest + 1]
        if len(classes) <= highest:
            names = printable(args.classes)
            raise RequestError(f"--classes {names} names {len(classes)} classes, labels go up to {highest}")
    index = paths[0].parent / f"{args.split}.json"
    write_index(index, counts, classes)
    print(f"{printable(index)}: {sum(counts.values()):,} samples in {len(paths)} shards, {len(classes)} classes")


def read_names(path: Path) -> list[str]:
    """Reads the names of classes, one per line.

    Raises:
        RequestError: The file cannot be read.
    """
    from sequencer.files import check_regular

    try:
        check_regular(path)
        return path.read_text("utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise RequestError(f"--classes {printable(path)}: {printable(error.strerror or error)}") from error


def write_index(path: Path, counts: dict[Path, int], classes: list[str]) -> None:
    """Writes WebDataset's index of shards with their numbers of samples, and the names of the classes."""
    from sequencer.files import write_json

    shards = [{"url": shard.name, "nsamples": count} for shard, count in counts.items()]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "classes": classes}
    write_json(path, index)


if __name__ == "__main__":
    raise SystemExit(main())
