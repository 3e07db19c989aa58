"""Commands whose output nobody reads, or whose standard streams are closed."""

import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import SMALL, SMALL_MODEL

ROOT = Path(__file__).parents[1]
PROTECT = "from sequencer.output import drop_unread_output\ndrop_unread_output('stdout', 'stderr')\nimport sys, os\n"
PRINT = "for i in range(3): print('x' * 9000, flush=True); print('y' * 9000, file=sys.stderr)\n"
CLOSED = [">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "> /dev/full", "> /dev/full 2>&1"]


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in bash; a pipeline has the exit code of its first command that fails."""
    command = ["bash", "-c", f"set -o pipefail; {command}"]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def python(code: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("streams", CLOSED)
def test_output_that_nobody_reads_is_dropped(streams, unbuffered, tmp_path):
    """The command goes on to its end, and files do not receive what is printed."""
    code = f"{PROTECT}file = open('file', 'w')\n{PRINT}file.write('done'); file.close()\nassert sys.stdin.read() == ''"
    result = shell(f"{python(code)} {streams} {'' if '<&-' in streams else '< /dev/null'}", tmp_path,
                   PYTHONUNBUFFERED=unbuffered)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.replace("y", "").strip() == ""
    assert (tmp_path / "file").read_text() == "done"


def test_processes_inherit_what_takes_the_place_of_closed_streams(tmp_path):
    child = "import os\nfor number in (0, 1, 2): os.fstat(number)\nprint('x')"
    code = f"{PROTECT}import subprocess\nsys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    assert shell(f"{python(code)} <&- >&- 2>&-", tmp_path).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_pipe_that_does_not_block_is_waited_for(unbuffered, tmp_path):
    code = f"{PROTECT}os.set_blocking(1, False)\nfor i in range(50): print('x' * 9000)"
    result = shell(f"{python(code)} | (sleep 0.3; wc -c)", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(50 * 9001)


def test_a_terminal_that_is_gone(tmp_path):
    ours, theirs = pty.openpty()
    code = f"{PROTECT}print('ready')\ninput()\n{PRINT}open('file', 'w').write('done')"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, cwd=tmp_path)
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"ready")
    os.close(ours)
    process.communicate(b"\n")
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "done"


def test_what_is_read_arrives_in_the_encoding_of_the_stream(tmp_path):
    command = f"{python(PROTECT + 'print(chr(228))')} | od -An -tx1"
    assert shell(command, tmp_path, PYTHONIOENCODING="latin-1").stdout.split() == ["e4", "0a"]


def train(overrides: list[str], streams: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(ROOT / "train.py"), *overrides, *SMALL, SMALL_MODEL]
    return shell(f"{shlex.join(arguments)} {streams}", cwd)


def test_training_goes_on(tmp_path):
    result = train(["run_dir=run", "data.num_workers=1", "logger.tensorboard=true"], "| head -1", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (result.stderr, len(result.stdout.splitlines())) == ("", 1)
    assert (tmp_path / "run" / "summary.json").exists()
    assert "epoch 2/2" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("streams", CLOSED)
def test_training_goes_on_without_streams(streams, tmp_path):
    result = train(["run_dir=run", "data.num_workers=2"], streams, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "epoch 2/2" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["| head -1", ">&- 2>&-"])
def test_a_sweep_goes_on(streams, tmp_path):
    result = train(["-m", "run_dir=runs", "seed=1,2"], streams, tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 2
    assert (tmp_path / "runs" / "sweep.csv").exists()


@pytest.mark.slow
def test_two_ranks_go_on(tmp_path):
    result = train(["run_dir=run", "trainer.devices=2"], "2>&1 | head -1", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_sweep_by_joblib_goes_on(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    result = train(["-m", "run_dir=runs", "seed=1,2", "hydra/launcher=joblib"], "2>&1 | head -1", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 2


def test_a_script_whose_table_nobody_reads_succeeds(tmp_path):
    """rich answers a closed pipe with exit code 1."""
    script = "import sys; sys.path.insert(0, 'SCRIPTS')\nfrom argparse import Namespace\nfrom _cli import run\n"
    script += "from rich import print\ndef work(args):\n    for i in range(9): print('x' * 9000)\n"
    script += "sys.exit(run(work, Namespace(debug=False)))"
    result = shell(f"{python(script.replace('SCRIPTS', str(ROOT / 'scripts')))} | true", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
