"""Measures a result that the project states: trains the seeds one after another, and adds a row for each to a CSV file.

    python scripts/record.py experiment=cifar10_cpu data.root=WHERE

Each seed is trained by train.py in a process of its own. Its row has the accuracy on the test split, the minutes from
the start of the process to its end, the machine, the commit, and the load average before the start, in which the seed
before still counts. The checkout must be clean, so that the commit says what was measured. `scripts/results.py` writes
the rows into the pages.
"""

import csv
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from datetime import date
from pathlib import Path

from _cli import Parser, add_training_options, check_training_options, prepare_files, run
from _results.common import RESULTS, ROOT

from sequencer.config import RequestError, compose
from sequencer.config.request import load_summary
from sequencer.console import say

COLUMNS = (
    "date", "command", "seed", "top1", "loss", "parameters", "epochs", "minutes", "training_minutes", "load",
    "machine", "torch", "commit",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_training_options(parser, RESULTS / "records.csv")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    """Trains the seeds and adds a row for each as soon as it is done.

    Raises:
        RequestError: The overrides are wrong, a seed is no number, or the checkout has changes.
        RuntimeError: A training failed.
    """
    seeds = check_training_options(args, ("seed", "run_dir"))
    config = compose(args.overrides)
    prepare_files({"--output": args.output})
    commit = _git("rev-parse", "--short", "HEAD").strip()
    if changed := _git("status", "--porcelain", "--", ".", ":!docs/results").splitlines():
        raise RequestError(f"a record is of a commit, and {changed[0][3:]} has changes")
    shown = [override if not override.startswith("data.root=") else "data.root=WHERE" for override in args.overrides]
    for seed in seeds:
        load = os.getloadavg()[0]
        run_dir = Path("outputs", "records", f"{config.name}-{seed}-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        start = time.monotonic()
        command = [sys.executable, str(ROOT / "train.py"), *args.overrides, f"seed={seed}", f"run_dir={run_dir}"]
        if code := subprocess.run(command).returncode:
            raise RuntimeError(f"training seed {seed} ended with exit code {code}")
        minutes = (time.monotonic() - start) / 60
        found = load_summary(run_dir)
        assert found is not None  # the run has finished
        row = (
            date.today(), shlex.join(["python", "train.py", *shown]), seed, found["test/top1"], found["test/loss"],
            found["parameters"], found["epochs"], f"{minutes:.2f}", f"{found['time/train_s'] / 60:.2f}", f"{load:.2f}",
            *_machine(), commit,
        )  # fmt: skip
        is_new = not args.output.exists()
        with open(args.output, "a", newline="") as file:
            csv.writer(file).writerows([COLUMNS, row] if is_new else [row])
        say(f"seed {seed}: {found['test/top1']:.2%} in {minutes:.1f} minutes")


def _git(*arguments: str) -> str:
    """Returns what git prints.

    Raises:
        RequestError: The code is no checkout.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RequestError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def _machine() -> tuple[str, str]:
    """The processor with its cores and its best instructions for bfloat16, and the version of torch."""
    import torch

    from sequencer.processor import processor_flags, processor_name

    best = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in processor_flags()), "")
    name = re.sub(r"\((R|TM)\)", "", processor_name())
    return " ".join(f"{os.cpu_count()} cores of {name}, {best.upper()}".split()), torch.__version__


if __name__ == "__main__":
    raise SystemExit(main())
