"""Repeats the update at which a run diverged, from the last checkpoint before it, in the folder RUN/replay.

    python scripts/replay.py RUN

The result is compared with RUN/divergence.json. Exit code 0: the run diverged in the same way; 1: it did not.
"""

import dataclasses
import json
import shutil
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from _cli import Parser, run
from omegaconf import OmegaConf

from sequencer.config.command import parse_command
from sequencer.config.errors import RequestError
from sequencer.config.named_runs import named_run
from sequencer.config.request import resume_request
from sequencer.config.schema import Config
from sequencer.files import to_json

EQUAL = ("reason", "epoch", "update", "batches", "gradient_norm", "weight_norm", "lr")


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with a divergence.json")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    """Replays the update and compares the records.

    Raises:
        RequestError: the run has not diverged.
        RuntimeError: the replay did not diverge, or diverged in another way.
    """
    args.run = named_run(args.run)
    path, copy = args.run / "divergence.json", args.run / "replay"
    if not path.is_file():
        raise RequestError(f"{args.run} has no divergence.json: it has not diverged, or is not a run folder")
    wanted = resume_request(parse_command([f"resume={args.run}"]))
    record = json.loads(path.read_text())
    from sequencer.training import Diverged
    from sequencer.training import run as train

    config = dataclasses.replace(wanted.config, run_dir=str(copy))
    config.trainer.on_divergence = "stop"
    config.logger.wandb = config.logger.tensorboard = False
    prepare(args.run, config, record["reshuffles"])
    try:
        train(config, resume=True)
    except Diverged as error:
        differing = [key for key in EQUAL if comparable(record[key]) != comparable(error.record[key])]
        if not differing:
            place = f"epoch {record['epoch'] + 1}, update {record['update']}"
            print(f"diverged in the same way: {record['reason']} at {place}")
            return
        raise RuntimeError(
            f"it diverged in another way: {', '.join(differing)} differ; see {copy / path.name}"
        ) from error
    raise RuntimeError(f"the run did not diverge again; see {copy}")


def prepare(run_dir: Path, config: Config, reshuffles: list[int]) -> None:
    """Writes the checkpoint that the run had when it diverged to the folder of its replay.

    Args:
        run_dir: The run.
        config: The replay, whose configuration the checkpoint gets.
        reshuffles: The order of the images in the epoch, as `divergence.json` records it.

    Raises:
        RequestError: the run was reordered before its first checkpoint.
    """
    import torch

    from sequencer.models import read_checkpoint

    copy = Path(config.run_dir)
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "checkpoints").mkdir(parents=True)
    OmegaConf.save(OmegaConf.structured(config), copy / "config.yaml")
    before = run_dir / "checkpoints" / "before_divergence.ckpt"
    if before.exists():
        checkpoint = read_checkpoint(before) | {"config": dataclasses.asdict(config)}
        checkpoint["DataModule"]["reshuffles"] = reshuffles
        checkpoint["callbacks"]["RunCheckpoints"] |= {"best_value": None, "best_epoch": None}  # there is no best.ckpt
        torch.save(checkpoint, copy / "checkpoints" / "last.ckpt")
    elif reshuffles:
        raise RequestError(f"{run_dir} was rolled back to its start, after which it cannot be replayed")


def comparable(value: Any) -> str:
    """Encodes a value as `divergence.json` does, in which null stands for a number that is not finite."""
    return to_json(value)


if __name__ == "__main__":
    raise SystemExit(main())
