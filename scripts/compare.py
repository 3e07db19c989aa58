"""Compares runs: their results, ranked, and the settings in which they differ.

    python scripts/compare.py outputs/digits/2026-01-31_12-00-00 outputs/digits/2026-01-31_13-00-00
    python scripts/compare.py outputs/rates --output rates.csv      # every trial of a sweep

RUN is a run folder, or a folder that holds several, such as a sweep's. Runs that differ only in their seed share a row,
with the mean and the standard deviation. They are ranked by the metric that they optimise (trainer.best_metric), which
is one of the validation split; results on the test split, which should decide nothing, are shown with --test alone.
Runs that have not finished stand last, with the best epoch so far.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from _cli import Parser, make_folder, run

from sequencer.config.errors import RequestError
from sequencer.printing import printable


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="run folder, or folder of run folders")
    add("--test", action="store_true", help="also show the results on the test split")
    add("--output", metavar="FILE", type=Path, help="also write a CSV file with one row for each run")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    from sequencer.analysis import compare, find_runs, print_comparison, write_csv

    if args.output and args.output.is_dir():
        raise RequestError(f"--output {args.output} is a folder; name a file")
    found = compare(find_runs(args.runs))
    if args.output:
        make_folder(args.output.parent)
        write_csv(found, args.output, args.test)
    print_comparison(found, args.test)
    for rank, row in zip(found.ranks, found.rows, strict=True):
        for each in row.runs:
            print(f"{rank:>4}  {printable(each.folder)}")
    if args.output:
        print(f"written: {printable(args.output)}")


if __name__ == "__main__":
    raise SystemExit(main())
