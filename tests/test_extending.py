"""The programs of docs/extending.md, from outside the package, and what they lead to."""

import re
from pathlib import Path

import pytest

from sequencer import names
from sequencer.data import sets
from sequencer.ops import CELLS, bilstm2d

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SHORT = (
    '"trainer.limit_train_batches=2", "trainer.accelerator=cpu", "optim.warmup_epochs=0", '
    '"model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}", '
)


def program(section: str, language: str = "python") -> str:
    """Returns the program of a section."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)[1]


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Executes the program of a section with a small model and short epochs, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for table in (CELLS, sets.DATA_SETS, bilstm2d.BACKENDS):
        monkeypatch.setattr(f"{__name__}.kept", dict(table), raising=False)
    before = [(table, table.copy()) for table in (CELLS, sets.DATA_SETS, bilstm2d.BACKENDS)]
    listed = [(table, list(table)) for table in (names.DATA_SETS, names.BACKENDS)]
    yield lambda section: exec(program(section).replace("compose([", f"compose([{SHORT}"), {})
    for table, kept in before:
        table.clear()
        table.update(kept)
    for table, kept in listed:
        table[:] = kept
