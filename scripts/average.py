"""Averages the weights of several models (a model soup) and writes a model folder.

    python scripts/average.py RUN_1 RUN_2 RUN_3 --output soup

For runs that started from the same weights, e.g. fine-tuned with different seeds or settings: their average is often
better than each of them, at the cost of one model. The average of runs that started from different weights is useless.
The result is not evaluated: use python scripts/evaluate.py soup.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import Parser, add_model_options, load_original, named_model, prepared, run

from sequencer.config.errors import RequestError
from sequencer.files import writing
from sequencer.printing import printable

if TYPE_CHECKING:
    from sequencer.models import LoadedModel


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="run folders, model folders, checkpoints or timm names")
    add("--output", metavar="DIR", type=Path, required=True, help="model folder to write")
    add_model_options(parser)
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if len(args.models) < 2:
        parser.error("name at least two models")
    return args


def work(args: Namespace) -> None:
    sources = [named_model(source, args) for source in args.models]
    from safetensors import SafetensorError

    from sequencer.export import write_model_folder
    from sequencer.models import CheckpointError, average_models

    def models() -> "Iterator[tuple[str, LoadedModel]]":
        for source in sources:
            yield source, load_original(source, args)

    with prepared(args.output) as folder:
        try:
            average = average_models(models())
        except CheckpointError as error:
            raise RequestError(str(error)) from error
        with writing(folder / "model.safetensors", SafetensorError):
            write_model_folder(average, folder)
    print(f"{printable(args.output)}: the average of {len(args.models)} models, {average.arch}, {average.slot} weights")


if __name__ == "__main__":
    raise SystemExit(main())
