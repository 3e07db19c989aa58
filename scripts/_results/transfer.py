"""The table of small training sets, from scratch and fine-tuned, of docs/results/transfer.csv."""

from collections import defaultdict

from _results.common import finished_runs, interval, markdown, paired

SETS = {  # by data.name: what the set is called, and the metric of images that decided nothing
    "imagefolder": ("244 photographs of ants and bees", "val/top1"),
    "cifar10": ("5,000 images of CIFAR-10", "test/top1"),
}


def transfer_table() -> str:
    """Top-1 of each start, and what the weights gain, paired by seed."""
    found: dict[tuple[str, bool], dict[int, float]] = defaultdict(dict)
    for row in finished_runs("transfer.csv"):
        metric = SETS[row["data.name"]][1]
        found[row["data.name"], row["init_from"] != "None"][int(row["seed"])] = float(row[metric])
    lines = []
    for name, (label, _) in SETS.items():
        scratch, tuned = found[name, False], found[name, True]
        lines.append((label, str(len(scratch)), *(_points(each) for each in (scratch, tuned)), paired(tuned, scratch)))
    header = ("", "seeds", "from scratch, %", "from the weights, %", "gain, points")
    return markdown(header, lines)


def _points(top1: dict[int, float]) -> str:
    return interval([100 * value for value in top1.values()])
