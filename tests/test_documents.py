"""The commands and links of the README and of docs/."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer.config.command import parse_command
from sequencer.config.composition import to_config
from sequencer.config.sweep import prepare_sweep

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(document: Path, language: str = "bash") -> Iterator[str]:
    """Yields the commands of a document, without comments; a continued line is one command."""
    for block in re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#"))


def split(command: str) -> Iterator[list[str]]:
    """Yields the Python commands of a shell line as lists of arguments, without the interpreter."""
    for part in re.split(r"&&|\|", command):
        words = shlex.split(part, comments=True)
        if words and words[0] in ("python", "torchrun"):
            scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
            yield words[scripts[0] if scripts else 1 :]


PYTHON = [
    pytest.param(words, id=f"{document.name}: {' '.join(words)}")
    for document in DOCUMENTS
    for command in commands(document)
    for words in split(command)
]


@pytest.mark.parametrize("words", PYTHON)
def test_every_command_is_valid(words, load_script):
    if words[0] == "train.py":
        command = parse_command(words[1:])
        if command.resume or command.is_question:
            return
        composed = command.compose()
        if command.flags.multirun or composed.multirun:
            prepare_sweep(command, composed)
        else:
            to_config(composed.config)
    elif words[0].startswith("scripts/"):
        script = load_script(Path(words[0]).stem)  # and an empty working directory
        if script.__name__.startswith("evaluate"):
            Path(words[1]).mkdir(parents=True)  # MODEL has to exist
        if hasattr(script, "parse"):
            script.parse(words[1:])
    else:
        assert words[:2] in (["-m", "pip"], ["-m", "pytest"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_file_named_exists(document):
    names = re.findall(r"`((?:tests|scripts|conf|docs|sequencer)/[\w./-]+)`", document.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_the_readme_as_a_new_user_runs_it(tmp_path):
    """Every command but those that need a network or the real CIFAR-10, in their order, cut short."""
    random = np.random.RandomState(0)
    for path in ("photograph.jpg", "folder/1.jpg", *(f"PHOTOS/{s}/{c}/{n}.jpg" for s in ("train", "val")
                                                     for c in "ab" for n in range(4))):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(256, size=(40, 40, 3), dtype=np.uint8)).save(tmp_path / path)
    short = ["trainer.limit_train_batches=1", "trainer.max_epochs=1", "trainer.limit_val_batches=1",
             "trainer.limit_test_batches=1", "data.num_workers=0", "data.batch_size=2", "data.eval_batch_size=8",
             "optim.warmup_epochs=0"]  # fmt: skip
    done = 0
    for line in commands(ROOT / "README.md"):
        if "pip install" in line:
            line = line.partition("&&")[2] if "train.py" in line else ""
        if not line or "(network)" in line or "data.root=WHERE" in line:
            continue
        (words,) = split(line)
        if words[0] == "train.py" and "resume=RUN" not in words:
            words += short if any(word.startswith("init_from") or "PHOTOS" in word for word in words) else short[1:2]
            words += ["run_dir=RUN"] if done == 0 else ["run_dir=PHOTOS_RUN"] if done == 1 else []
            words = [word.replace("init_from=RUN", "init_from=PHOTOS_RUN") for word in words]  # a run of the same model
        script = str(ROOT / words[0])
        result = subprocess.run([sys.executable, script, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        done += 1
    assert done >= 9
