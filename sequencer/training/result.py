"""The result of a finished run: test metrics, model folder, pictures and summary."""

import itertools
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sequencer.analysis.plots import plot_confusion, plot_curves
from sequencer.config.schema import Config
from sequencer.console import table_lines
from sequencer.data import DataModule
from sequencer.distributed import is_first
from sequencer.evaluation import Collector, describe_unpredicted, evaluate, metric_names
from sequencer.export import commit, save_model_folder, versions
from sequencer.files import WriteError, write_json
from sequencer.models import LoadedModel, load_weights, read_checkpoint, select_weights, timm_preprocessing
from sequencer.printing import first_line
from sequencer.report import examine, make_subject, write_report
from sequencer.training.checkpoints import RunCheckpoints
from sequencer.training.module import parameters_of
from sequencer.training.report import EpochReport

log = logging.getLogger("sequencer")

NEXT_STEPS = (  # lines of what is done with a finished run; {run} is its folder
    "python scripts/evaluate.py {run}",
    "python scripts/predict.py {run} IMAGES",
    "python scripts/export.py {run} \\",
    "    --format onnx --output {run}/onnx",
)


def finish(
    config: Config,
    model: nn.Module,
    data: DataModule,
    device: torch.device,
    checkpoints: RunCheckpoints,
    report: EpochReport,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Evaluates the best weights on the test split and writes the result of the run.

    This is the only time that the test split is read. A set without one is evaluated on its validation split.

    Args:
        model: takes the best weights of the slot `trainer.slot`; on the CPU afterwards.
        device: where the model is evaluated.
        checkpoints, report: of the finished run.

    Returns:
        The content of `summary.json` and, on rank 0, the pictures and the page that loggers receive, by name.
    """
    run_dir = Path(config.run_dir)
    best = checkpoints.folder / "best.ckpt"
    load_weights(model, select_weights(read_checkpoint(best), config.trainer.slot), source=str(best))
    split: Literal["val", "test"]
    if data.test_set is not None:
        split, loader, limit = "test", data.test_dataloader(), config.trainer.limit_test_batches
    else:
        split, loader, limit = "val", data.val_dataloader(), config.trainer.limit_val_batches
    batches = limited(len(loader), limit)
    collector = Collector(len(data.splits[split]), data.num_classes) if config.logger.report else None
    metrics = evaluate(model.to(device), itertools.islice(loader, batches), data.num_classes, device, None, collector)
    predictions = collector.predictions() if collector is not None else None
    model.cpu()
    values = metrics.compute()
    names = [name for name in metric_names(data.num_classes) if name != "balanced" or metrics.unbalanced]
    best_row = next(row for row in report.rows if row["epoch"] == checkpoints.best_epoch)
    summary: dict[str, Any] = {
        "name": config.name,
        "model": config.model.name,
        "parameters": parameters_of(model),
        "data": config.data.name,
        "seed": config.seed,
        "slot": config.trainer.slot,
        "epochs": len(report.rows),
        "updates": int(report.rows[-1]["step"]),
        "best_epoch": int(best_row["epoch"]) + 1,
        **{name: best_row[name] for name in ("train/loss", "train/top1")},
        **{f"{slot}/{name}": best_row[f"{slot}/{name}"] for slot in report.slots for name in names},
        **({f"test/{name}": float(values[name]) for name in names} if split == "test" else {}),
        "time/train_s": round(sum(row["time/epoch_s"] for row in report.rows), 1),
    }
    if remark := describe_unpredicted(metrics.per_class(data.class_names)):
        summary["remark"] = remark
    if not is_first():
        return summary, {}
    preprocessing = timm_preprocessing(asdict(config.data))
    results = None
    if predictions is not None:
        with _page_may_fail():
            results = examine(model, split, predictions, preprocessing["input_size"])
    confusion = run_dir / "confusion.png"
    plot_confusion(metrics.confusion.cpu(), data.class_names, confusion, f"{config.name}: {split} split")
    result = LoadedModel(
        model,
        config.model.name,
        config.trainer.slot,
        tuple(data.class_names),
        preprocessing,
        config.model.kwargs,
        {
            "metrics": summary,
            **({"figures": results.figures.model_dump()} if results is not None else {}),
            "images": {name: len(images) for name, images in data.splits.items()},
            "config": asdict(config),
            "commit": commit(),
            "versions": versions(),
        },
    )
    save_model_folder(result, run_dir / "model", confusion)
    report.write()  # the file may have been deleted or edited since the last epoch
    plot_curves(run_dir / "metrics.csv", run_dir / "curves.png", summary["best_epoch"])
    write_json(run_dir / "summary.json", summary)
    written = {"curves": run_dir / "curves.png", "confusion": confusion}
    if results is not None:
        with _page_may_fail():
            subject = make_subject(config, summary, result, device, run_dir, split, data.splits[split], data.train_set)
            written |= {"report": write_report(subject, results, run_dir)}
            written |= {path.stem: path for path in sorted((run_dir / "report").glob("*.png"))}
        model.cpu()
    for line in describe_result(summary, run_dir, next_steps=config.logger.group is None):
        log.info(line)
    return summary, written


@contextmanager
def _page_may_fail() -> Iterator[None]:
    """Turns an error into a warning, since the result is complete without the page; but not that of a full disk."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        log.warning("report.html could not be written: %s", first_line(error))
        log.debug("", exc_info=True)


def limited(available: int, limit: int | float | None) -> int:
    """Returns the number of batches under Lightning's limit: an integer counts batches, a float is a share of them."""
    if limit is None:
        return available
    return min(limit, available) if isinstance(limit, int) else int(limit * available)


def describe_result(summary: dict[str, Any], run_dir: Path, next_steps: bool = True) -> list[str]:
    """Describes the result of a finished run, line by line.

    Args:
        summary: The content of its `summary.json`.
        run_dir: Its folder.
        next_steps: Also name the commands that come next; too much for each run of a group, such as a sweep's.
    """
    columns = {"top1": "top-1", "balanced": "balanced", "top5": "top-5", "loss": "loss"}
    shown = [name for name in columns if f"val/{name}" in summary]
    labels = {"val": "validation, raw weights", "val_ema": "validation, EMA weights"}
    rows = [
        [label, *(_cell(name, summary[f"{prefix}/{name}"]) for name in shown)]
        for prefix, label in (labels | {"test": f"test, {summary['slot']} weights"}).items()
        if f"{prefix}/top1" in summary
    ]
    steps = ["open {run}/report.html in a browser"] if (run_dir / "report.html").is_file() else []
    following = ["next steps:", *(step.format(run=shlex.quote(str(run_dir))) for step in [*steps, *NEXT_STEPS])]
    return [
        *table_lines(["", *(columns[name] for name in shown)], rows),
        *([summary["remark"]] if "remark" in summary else []),
        f"best epoch: {summary['best_epoch']} of {summary['epochs']}; trained in {summary['time/train_s']:.0f} s",
        *(following if next_steps else []),
    ]


def _cell(name: str, value: float | None) -> str:
    if value is None:  # a number that was not finite
        return "nan"
    return f"{value:.4f}" if name == "loss" else f"{value:.2%}"
