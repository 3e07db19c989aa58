"""The wheel holds the package with its YAML, and nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
USE = """
import conf  # a module of the user's own
from sequencer.config import compose, conf_dir
from sequencer.config.conf_files import ConfigFiles
assert compose(["data=cifar10"]).data.num_classes == 10
assert "imagenet_s" in ConfigFiles(conf_dir()).groups["experiment"]
print(conf.MINE, conf_dir())
"""


def test_a_wheel_is_complete(tmp_path):
    source = tmp_path / "source"
    for name in ("sequencer", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    result = subprocess.run([sys.executable, *command], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    site = tmp_path / "site"
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"sequencer"}
    for folder, inside in (("sequencer", "sequencer"), ("conf", "sequencer/conf")):
        files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.*") if path.is_file()}
        expected = {path for path in files if path.suffix in (".py", ".yaml", ".cpp")}
        assert expected <= {path.relative_to(site / inside) for path in (site / inside).rglob("*")}
    (site / "conf.py").write_text("MINE = 5\n")
    used = subprocess.run([sys.executable, "-c", USE], cwd=site, capture_output=True, text=True)
    assert used.stdout.split() == ["5", str(site / "sequencer" / "conf")], used.stderr
