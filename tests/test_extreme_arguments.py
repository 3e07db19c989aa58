"""Arguments of the scripts with extreme values: refused with exit code 2 in two lines, and nothing is written."""

import pytest

from tests.helpers import exit_code

LONG = "a" * 300
COMMANDS = {
    "evaluate": ["run"],
    "predict": ["run", "image.png"],
    "export": ["run", "--format", "onnx", "--output", "out"],
    "benchmark": ["model", "--output", "out"],
    "average": ["run", "run", "--output", "out"],
    "shards": ["write", "photographs", "--output", "out"],
}
NUMBERS = [
    ("evaluate", "--batch-size"),
    ("evaluate", "--img-size"),
    ("evaluate", "--num-workers"),
    ("predict", "--batch-size"),
    ("predict", "--num-workers"),
    ("export", "--img-size"),
    ("benchmark", "--img-size"),
    ("benchmark", "--batch"),
    ("benchmark", "--rounds"),
    ("shards", "--images"),
]


def refused(script: str, arguments: list[str], load_script, capsys, tmp_path) -> str:
    assert exit_code(load_script(script), arguments) == 2
    output, errors = capsys.readouterr()
    assert not output
    assert 0 < len(errors.splitlines()) <= 2, errors
    assert all(c.isprintable() or c == "\n" for c in errors)
    assert not list(tmp_path.iterdir())
    return errors


@pytest.mark.parametrize(("script", "option"), NUMBERS, ids=" ".join)
def test_numbers(script, option, load_script, capsys, tmp_path):
    for value in ("-1", "1e9", "nan", "inf", "0x10", str(2**31), str(10**40)):
        errors = refused(script, [*COMMANDS[script], option, value], load_script, capsys, tmp_path)
        assert errors.startswith(f"error: argument {option}: ")


@pytest.mark.parametrize("script", COMMANDS)
def test_texts_that_name_no_file(script, load_script, capsys, tmp_path):
    command = COMMANDS[script]
    for text in ("", "a\0b", LONG, "a/" * 3000):
        for arguments in ([*command[:-1], text], [*command, text], [text, *command[1:]]):
            errors = refused(script, arguments, load_script, capsys, tmp_path)
            assert errors.startswith("error: argument '")


@pytest.mark.parametrize(("option", "limit"), [("--img-size", 8192), ("--num-workers", 1024)])
def test_sizes_are_bounded(option, limit, load_script, capsys, tmp_path):
    errors = refused("evaluate", ["run", option, str(limit + 1)], load_script, capsys, tmp_path)
    assert f"is more than {limit}" in errors
