"""The table of the Sequencer beside models of timm, of docs/results/baselines.csv."""

from collections import defaultdict
from statistics import fmean

from _results.common import Row, finished_runs, markdown
from sequencer.analysis.comparison import spread

MODELS = {  # by model.name
    "sequencer2d_p4_32": "Sequencer2D",
    "resnet18": "ResNet",
    "convnext_atto": "ConvNeXt",
    "deit_tiny_patch16_224": "DeiT",
    "mixer_p4_32": "MLP-Mixer",
}


def baselines_table() -> str:
    """Accuracy, size, training minutes and speed of each model; the speed is that of one measurement."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in finished_runs("baselines.csv"):
        found[row["model.name"]].append(row)
    lines = []
    for name, label in MODELS.items():
        runs = found[name]
        first = runs[0]
        lines.append(
            (
                label,
                spread([float(row["test/top1"]) for row in runs]),
                f"{int(first['parameters']) / 1e6:.2f}",
                f"{float(first['speed/operations']) / 1e6:.1f}",
                f"{fmean(float(row['time/train_s']) for row in runs) / 60:.1f}",
                *(f"{float(first[f'speed/{each}']):,.0f}" for each in ("training", "inference")),
                f"{float(first['speed/latency']):.2f}",
            )
        )
    header = ("model", "test top-1, %", "parameters, M", "MFLOP", "minutes of training")
    return markdown((*header, "training, images/s", "inference, images/s", "one image, ms"), lines)
