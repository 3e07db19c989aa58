"""Writes the page of a run again: report.html and the folder report/ with the numbers behind its pictures.

    python scripts/report.py outputs/digits/2026-01-31_12-00-00
    python scripts/report.py RUN --receptive-fields      # for images above 64 px, which takes a backward pass a token

RUN is the folder of a finished run. Its model is evaluated once more, on the split of its result.
"""

from argparse import Namespace, RawDescriptionHelpFormatter

from _cli import Parser, load, pick_device, run

from sequencer.config.composition import to_config
from sequencer.config.errors import RequestError
from sequencer.config.named_runs import named_run
from sequencer.config.request import load_run, load_summary
from sequencer.console import say
from sequencer.printing import printable


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("--receptive-fields", action="store_true", help="compute them for images above 64 px too")
    add("--data-root", metavar="DIR", help="folder that holds the data set; default: the run's")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    run_dir = named_run(args.run)
    config = to_config(load_run(run_dir))
    summary = load_summary(run_dir)
    if summary is None:
        raise RequestError(f"{run_dir} has no result: python train.py resume={run_dir} finishes the run")

    from sequencer.evaluation import evaluation_data
    from sequencer.report import open_subject, write_report

    args.arch = args.slot = None
    args.trust = False
    loaded = load(str(run_dir), args)
    data = evaluation_data(loaded, root=args.data_root)
    config.data.root = data.root
    subject, results = open_subject(config, summary, loaded, pick_device(args.device), run_dir)
    page = write_report(subject, results, run_dir, args.receptive_fields)
    say(f"written: {printable(page)}")


if __name__ == "__main__":
    raise SystemExit(main())
