"""Writes the results in docs/results into the pages that state them: `python scripts/results.py`.

The tables stand between comments such as `<!-- results: records -->` and `<!-- end -->`; the pictures are
docs/images/ablation_*.png and inside_memory.png. The CSV files are made by

    python scripts/record.py experiment=cifar10_cpu data.root=WHERE                          # records.csv
    python scripts/compare.py outputs/ablation_* --test --output docs/results/ablations.csv
    python scripts/compare.py outputs/overfitting --test --output docs/results/overfitting.csv
    python scripts/inside.py outputs/ablation_cell                                           # inside.csv
    python scripts/compare.py outputs/photographs_* outputs/tenth_* --test --output docs/results/transfer.csv
    python scripts/baselines.py data.root=WHERE --seeds 0,1                                  # baselines.csv
"""

import re
from collections.abc import Callable
from functools import partial

from _results.ablations import ABLATIONS, ablation_table, draw_ablations, hidden_table
from _results.baselines import baselines_table
from _results.common import DOCS, ROOT
from _results.inside import draw_inside, knock_out_table, memory_table, robustness_table, symmetry_table
from _results.overfitting import overfitting_table
from _results.records import latest_table, records_table
from _results.transfer import transfer_table

PAGES = [ROOT / "README.md", DOCS / "records.md", DOCS / "ablations.md", DOCS / "inside.md", DOCS / "finetune.md"]
TABLES: dict[str, Callable[[], str]] = {
    "records": records_table,
    "latest": latest_table,
    **{name: partial(ablation_table, name) for name in ABLATIONS},
    "hidden": hidden_table,
    "overfitting": overfitting_table,
    "memory": memory_table,
    "knock_out": knock_out_table,
    "symmetry": symmetry_table,
    "robustness": robustness_table,
    "transfer": transfer_table,
    "baselines": baselines_table,
}


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text()))
    draw_ablations(DOCS / "images")
    draw_inside(DOCS / "images")


def fill(text: str) -> str:
    """Replaces what stands between the comments of each table.

    Raises:
        KeyError: There is no table of that name.
    """
    return re.sub(
        r"(<!-- results: (\w+) -->).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    main()
