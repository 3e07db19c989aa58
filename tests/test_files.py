"""Writing files: JSON without NaN, and errors that name the file."""

import json
import math
import os
import stat
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from sequencer.files import WriteError, is_full, to_json, write_atomically, write_json, writing

ROOT = Path(__file__).parents[1]


def strict(text: str) -> object:
    """Parses JSON as other languages do, which refuse NaN and Infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    content = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN", "e": True}
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": True}
    assert strict(to_json(content)) == expected
    write_json(tmp_path / "new" / "record.json", content)
    assert strict((tmp_path / "new" / "record.json").read_text()) == expected


def test_every_json_file_is_written_by_one_function():
    """Only `sequencer.files` encodes JSON; timm writes config.json, from a dictionary of finite numbers."""
    sources = [ROOT / "train.py", *(ROOT / "sequencer").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert [path.name for path in sources if "json.dump" in path.read_text()] == ["files.py"]


def test_an_error_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, 1)
    with pytest.raises(WriteError, match=r"record.json could not be written: No such file or directory"):
        write_atomically(path, lambda temporary: (tmp_path / "missing" / "file").write_text(""))
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_reads_a_file(tmp_path, mask):
    def write_for_the_user_alone(path: Path) -> None:
        with NamedTemporaryFile(dir=tmp_path, delete=False) as file:  # as safetensors does
            file.write(b"weights")
        os.replace(file.name, path)

    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "weights", write_for_the_user_alone)
        write_atomically(tmp_path / "text", lambda path: path.write_text("text"))
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "weights": 0o666 & ~mask,
        "text": 0o666 & ~mask,
    }


def test_an_error_that_names_its_file_is_kept(tmp_path):
    with pytest.raises(WriteError, match=r"^inner could"), writing(Path("outer")), writing(Path("inner")):
        raise OSError(28, "No space left on device")


def test_the_cause_of_an_error_is_its_reason():
    expected = "events could not be written: No space left on device"
    with pytest.raises(WriteError, match=expected) as error, writing(Path("events"), ValueError):
        raise ValueError("\nunsupported") from OSError(28, "No space left on device")
    assert is_full(error.value)
    assert not is_full(OSError(2, "No such file or directory"))
