"""Repeats the update at which a run diverged, from the last checkpoint before it and in a folder of its own.

    python scripts/replay.py RUN

prints what RUN/divergence.json says beside what happens now. Exit code 0: it happened again; 1: it did not.
"""

import dataclasses
import json
import shutil
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from _cli import Parser, run

from sequencer.config.errors import RequestError
from sequencer.config.request import resume_request

EQUAL = ("reason", "epoch", "update", "batches", "gradient_norm", "weight_norm", "lr")


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with a divergence.json")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    path, copy = args.run / "divergence.json", args.run / "replay"
    if not path.is_file():
        raise RequestError(f"{args.run} has no divergence.json: it has not diverged, or is no run folder")
    wanted = resume_request([f"resume={args.run}"])
    assert wanted is not None
    record = json.loads(path.read_text())
    from sequencer.training import Diverged
    from sequencer.training import run as train

    prepare(args.run, copy, record["reshuffles"])
    config = dataclasses.replace(wanted.config, run_dir=str(copy))
    config.trainer.on_divergence = "stop"
    config.logger.wandb = config.logger.tensorboard = False
    try:
        train(config, resume=True)
    except Diverged as error:
        differing = [key for key in EQUAL if same(record[key]) != same(error.record[key])]
        if not differing:
            print(f"the same again: {record['reason']} at epoch {record['epoch'] + 1}, update {record['update']}")
            return
        raise RuntimeError(f"it diverged otherwise: {', '.join(differing)} differ; see {copy / path.name}") from error
    raise RuntimeError(f"the run did not diverge again; see {copy}")


def prepare(run_dir: Path, copy: Path, reshuffles: list[int]) -> None:
    """What the run had when it diverged, in a new folder."""
    import torch

    from sequencer.models import read_checkpoint

    shutil.rmtree(copy, ignore_errors=True)
    (copy / "checkpoints").mkdir(parents=True)
    before = run_dir / "checkpoints" / "before_divergence.ckpt"
    if before.exists():
        checkpoint = read_checkpoint(before)
        checkpoint["DataModule"]["reshuffles"] = reshuffles
        torch.save(checkpoint, copy / "checkpoints" / "last.ckpt")
    elif reshuffles:
        raise RequestError(f"{run_dir} was on its second attempt at the first updates, which cannot be replayed")


def same(value: Any) -> str:
    """A form in which NaN equals NaN."""
    return json.dumps(value)


if __name__ == "__main__":
    raise SystemExit(main())
