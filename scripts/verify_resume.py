"""Verifies for a configuration that a run which is killed and resumed gives the same result as an uninterrupted one.

    python scripts/verify_resume.py --kills 20 experiment=digits trainer.max_epochs=3

The command trains once without interruption and once with SIGKILL at random moments, every other one while a checkpoint
is being written, and compares weights, averages, optimizer states and the rows of metrics.csv bit for bit. Overrides
are those of train.py; checkpoints are written after every update unless trainer.checkpoint_interval is given.
Exit code 0: the results are the same; 1: they differ.
"""

import csv
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _cli import Parser, integer, run

from sequencer.config import RequestError, compose
from sequencer.config.request import request

TRAIN = Path(__file__).parents[1] / "train.py"


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of train.py")
    add("--kills", type=integer(1), default=10, metavar="N", help="default: 10")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random moments; default: 0")
    add("--output", type=Path, default=Path("outputs/verify_resume"), metavar="DIR", help="default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    """Trains both runs and compares them.

    Raises:
        RequestError: the output folder is not empty, or the configuration is wrong.
        RuntimeError: a run failed, or the results differ.
    """
    whole, broken = args.output / "whole", args.output / "broken"
    if args.output.exists() and any(args.output.iterdir()):
        raise RequestError(f"--output {args.output} is not empty: name another folder")
    overrides = ["trainer.checkpoint_interval=0", *args.overrides]
    request(compose([*overrides, f"run_dir={whole}"]))
    seconds = train(overrides, whole)
    print(f"without interruption: {seconds:.1f} s of training", flush=True)
    draw, inside, kills = random.Random(args.seed), 0, 0
    while kills < args.kills:
        within_save = kills % 2 == 1
        ended = kill(overrides, broken, draw.uniform(0, seconds / 4), within_save)
        if ended:  # the run was over before the moment of the kill: draw another moment
            check(whole, broken)
            shutil.rmtree(broken)
            continue
        kills += 1
        inside += (broken / "checkpoints" / ".last.ckpt.partial").exists()
        print(f"kill {kills}/{args.kills}: {updates(broken)} updates are saved", flush=True)
    train(overrides, broken)
    check(whole, broken)
    print(f"{kills} kills, {inside} of them inside a save")
    print("the same run: weights, averages, optimizer states and metrics are equal bit for bit")


def check(whole: Path, broken: Path) -> None:
    """Compares two run folders.

    Raises:
        RuntimeError: the results differ.
    """
    differing = [name for name, same in compare(whole, broken) if not same]
    if differing:
        raise RuntimeError(f"NOT the same run: {', '.join(differing)} differ; see {whole} and {broken}")


def start(overrides: list[str], run_dir: Path) -> subprocess.Popen[str]:
    """Starts train.py, which resumes the run if the folder holds one."""
    command = [sys.executable, str(TRAIN), *overrides, f"run_dir={run_dir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def train(overrides: list[str], run_dir: Path) -> float:
    """Runs train.py to its end.

    Returns:
        Seconds from the start of training.

    Raises:
        RuntimeError: train.py failed.
    """
    process = start(overrides, run_dir)
    began = wait_for_training(process, run_dir)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}: {error.strip()[-300:]}")
    return time.monotonic() - began


def wait_for_training(process: subprocess.Popen[str], run_dir: Path) -> float:
    """Waits until the process has written to the run's log; returns the time by `time.monotonic`."""
    path, before = run_dir / "train.log", time.time()
    while process.poll() is None and not (path.exists() and path.stat().st_mtime > before):
        time.sleep(0.01)
    return time.monotonic()


def kill(overrides: list[str], run_dir: Path, delay: float, within_save: bool) -> bool:
    """Starts or resumes the run and kills it.

    Args:
        delay: seconds of training before the kill.
        within_save: wait from then on until the next checkpoint is being written.

    Returns:
        Whether the run was over before it could be killed.
    """
    process = start(overrides, run_dir)
    wait_for_training(process, run_dir)
    time.sleep(delay)
    partial = run_dir / "checkpoints" / ".last.ckpt.partial"
    stale = partial.stat().st_mtime_ns if partial.exists() else None
    while within_save and process.poll() is None:
        try:
            if partial.stat().st_mtime_ns != stale:
                break
        except FileNotFoundError:
            stale = None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == 0


def updates(run_dir: Path) -> int:
    """Returns the number of updates that the last checkpoint holds, 0 without one."""
    path = run_dir / "checkpoints" / "last.ckpt"
    return read(path)["global_step"] if path.exists() else 0


def compare(whole: Path, broken: Path) -> Iterator[tuple[str, bool]]:
    """Yields what is compared and whether it is the same in both runs."""
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (read(folder / "checkpoints" / name) for folder in (whole, broken))
        for part in ("state_dict", "state_dict_ema", "optimizer_states", "ranks", "train_totals"):
            if part in a or part in b:
                yield f"{name}: {part}", digest(a.get(part)) == digest(b.get(part))
    yield "metrics.csv", rows(whole) == rows(broken)


def read(path: Path) -> dict[str, Any]:
    from sequencer.models import read_checkpoint

    return read_checkpoint(path)


def digest(value: Any) -> str:
    """Hashes nested containers of tensors and plain values, bit for bit."""
    import torch

    if isinstance(value, torch.Tensor):
        content = value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else value.numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + content).hexdigest()
    if isinstance(value, dict):
        return digest([[str(key), digest(entry)] for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return hashlib.sha256("".join(digest(entry) for entry in value).encode()).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Reads metrics.csv without its timings."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


if __name__ == "__main__":
    raise SystemExit(main())
