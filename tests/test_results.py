"""The stated results: how they are measured, and that the pages have the figures of the CSV files."""

import shlex

import pytest

from sequencer.config.command import parse_command
from sequencer.config.composition import to_config
from tests.helpers import SMALL, SMALL_MODEL, read_csv
from tests.test_documents import ROOT


@pytest.fixture
def results(load_script):
    return load_script("results")


@pytest.fixture
def record(load_script, monkeypatch):
    """The script in a checkout without changes."""
    script = load_script("record")
    monkeypatch.setattr(script, "_git", lambda *arguments: "0123abc\n" if arguments[0] == "rev-parse" else "")
    return script


def test_the_pages_have_the_figures_of_the_csv_files(results):
    for page in results.PAGES:
        assert results.fill(page.read_text()) == page.read_text(), f"{page.name}: run python scripts/results.py"


def test_every_table_is_in_a_page(results):
    texts = "".join(page.read_text() for page in results.PAGES)
    assert [name for name in results.TABLES if f"<!-- results: {name} -->" not in texts] == []


def test_the_command_of_every_record_composes(results):
    from _results.common import RESULTS, read

    commands = {row["command"] for row in read(RESULTS / "records.csv")}
    assert commands
    for command in commands:
        python, script, *overrides = shlex.split(command)
        assert (python, script) == ("python", "train.py")
        to_config(parse_command(overrides).compose().config)


@pytest.mark.parametrize("seeds", ["3", pytest.param("3,4", marks=pytest.mark.slow)])
def test_a_record_has_a_row_for_each_seed(record, tmp_path, capfd, seeds):
    output = tmp_path / "records.csv"
    wanted = [*SMALL, SMALL_MODEL, "trainer.max_epochs=1", "data.root=somewhere"]
    assert record.main([*wanted, "--seeds", seeds, "--output", str(output)]) == 0
    rows = read_csv(output)
    assert [row["seed"] for row in rows] == seeds.split(",")
    assert shlex.split(rows[0]["command"]) == ["python", "train.py", *wanted[:-1], "data.root=WHERE"]
    assert rows[0]["commit"] == "0123abc"
    assert float(rows[0]["minutes"]) > float(rows[0]["training_minutes"])
    assert len({row["top1"] for row in rows}) == len(rows)
    assert (ROOT / "docs" / "results" / "records.csv").read_text().startswith(",".join(rows[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "a"], "give numbers"),
        (["seed=1"], "sets seed"),
        (["run_dir=here"], "sets run_dir"),
        (["--output", "."], "--output . is a folder"),
        (["optim.lrr=1"], "optim.lr"),
    ],
)
def test_wrong_requests(record, capsys, arguments, message):
    assert record.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_checkout_with_changes_is_refused(record, capsys, monkeypatch):
    monkeypatch.setattr(record, "_git", lambda *arguments: " M sequencer/names.py\n")
    assert record.main([]) == 2
    assert "sequencer/names.py has changes" in capsys.readouterr().err
