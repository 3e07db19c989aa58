"""Looks inside models: a sub-command for each question.

    python scripts/analyze.py evidence outputs/digits/2026-01-31_12-00-00 photograph.jpg folder/
    python scripts/analyze.py directions MODEL 'scans/**/*.png' --output figures
    python scripts/analyze.py receptive-field MODEL convnext_tiny --images folder/
    python scripts/analyze.py memory sequencer2d_s --cells rnn,lstm1997,lstm --noise 16
    python scripts/analyze.py knock-out outputs/digits/2026-01-31_12-00-00
    python scripts/analyze.py symmetry sequencer2d_s convnext_tiny --data imagenet --data-root DIR --limit 5000
    python scripts/analyze.py resolution outputs/digits/2026-01-31_12-00-00 --sizes 6,12,16
    python scripts/analyze.py robustness outputs/digits/2026-01-31_12-00-00 --attacks fgsm,pgd

`analyze.py WHAT --help` lists the options of each. MODEL is a run folder, a model folder, a checkpoint or a timm name.
Each command prints a table and writes a picture and the numbers behind it. `evidence` and `directions` are exact: the
shares of all tokens, or the contributions of all parts of the model, sum to the logit. Knock-out, symmetry,
resolution and robustness evaluate models on labelled images.
"""

from argparse import Namespace, RawDescriptionHelpFormatter

from _analyses import attribution, knock_out, memory, receptive_field, resolution, robustness, symmetry
from _analyses.common import add_options, models_of
from _cli import Parser, named_model, run
from _labelled import check_named_data, need_data

COMMANDS = {
    "evidence": (attribution.evidence, attribution, "where in the image the evidence for a class lies"),
    "directions": (attribution.directions, attribution, "what each scan direction contributes to a logit"),
    "receptive-field": (
        receptive_field.receptive_field,
        receptive_field,
        "which pixels a token of each stage depends on",
    ),
    "memory": (memory.memory, memory, "how far back the recurrences of models remember"),
    "knock-out": (knock_out.knock_out, knock_out, "how much accuracy needs each scan direction of each block"),
    "symmetry": (symmetry.symmetry, symmetry, "accuracy on images that are turned, shifted, covered or shuffled"),
    "resolution": (resolution.resolution, resolution, "accuracy, speed and states of recurrences across input sizes"),
    "robustness": (
        robustness.robustness,
        robustness,
        "the accuracy on corrupted images, under attacks and on other sets",
    ),
}


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (analyze, module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"Shows {text}.")
        command.set_defaults(analyze=analyze)
        module.add_arguments(command)
        add_options(command)
    return parser.parse_args(argv)


def work(args: Namespace) -> int:
    is_labelled = hasattr(args, "data") and not getattr(args, "variant", None)  # a variant has a folder instead
    if is_labelled:
        for model in models_of(args):
            need_data(model, args)
    if isinstance(args.model, str):
        args.model = named_model(args.model, args)
    elif not getattr(args, "cells", None):  # MODEL names architectures, of which no weights are read
        args.model = [named_model(model, args) for model in args.model]
    if is_labelled:
        for model in models_of(args):
            check_named_data(model, args)
    return args.analyze(args)


if __name__ == "__main__":
    raise SystemExit(main())
