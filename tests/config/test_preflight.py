"""What is found before torch is imported: models, published weights, data, folders of runs."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
from safetensors.torch import load, save
from timm.models import _registry

from sequencer.config import RequestError, compose, preflight
from sequencer.config.layouts import check_data
from sequencer.config.named_runs import named_run
from sequencer.config.preflight import check_published, check_request, check_source, may_be_model
from sequencer.models import create_model
from tests.helpers import SCRIPTS

TRAIN = SCRIPTS.parent / "train.py"
UNREACHABLE = "http://127.0.0.1:9"  # a port that nobody listens on


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sets the address of the hub, whose cache is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def set_address(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)

    return set_address


def test_every_model_of_timm_may_be_one():
    names = {*timm.list_models(), *timm.list_models(pretrained=True), *_registry._deprecated_models}
    assert [name for name in names if not may_be_model(name)] == []
    assert [
        name for name in ("resnet1x8", "nothing", "a", "hf-hub:timm/resnet18", "x" * 300) if may_be_model(name)
    ] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=resnet1x8"], r"unknown model resnet1x8; did you mean resnet18, "),
        (["data=imagefolder", "data.root=nowhere"], r"no complete set in .*nowhere/train \(there is no such file"),
        (["init_from=outputs/nowhere"], "^init_from=outputs/nowhere is neither a file or folder nor a"),
        (["optim.distill_from=v_sequencer_s"], "^optim.distill_from=v_sequencer_s has no published"),
    ],
)
def test_what_a_run_needs_is_missing(overrides, message):
    with pytest.raises(RequestError, match=message):
        check_request(compose(overrides))


def test_torch_is_not_imported_for_what_is_missing(tmp_path):
    code = (
        "import sys, train\n"
        "for line in (['data=cifar10', 'data.root=x'], ['model.name=resnet1x8'], ['init_from=sequencer2d_s']):\n"
        "    try:\n        train.main(train.parse_command(line))\n"
        "    except train.RequestError as error:\n        print(str(error).splitlines()[0])\n"
        "print('torch' in sys.modules)"
    )
    environment = os.environ | {"HF_ENDPOINT": UNREACHABLE, "HF_HOME": str(tmp_path), "PYTHONPATH": str(TRAIN.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("data=cifar10: no complete set in "), done.stderr
    assert lines[1].startswith("unknown model resnet1x8; did you mean ")
    assert lines[2] == (
        "init_from=sequencer2d_s: its weights are not here, and http://127.0.0.1:9 does not answer "
        "([Errno 111] Connection refused)"
    )
    assert lines[3:] == ["False"]


def test_a_hub_that_says_nothing_is_waited_for_a_limited_time(hub, monkeypatch):
    monkeypatch.setattr(preflight, "HUB_LIMIT", 0.3)
    release = threading.Event()
    monkeypatch.setattr(preflight, "urlopen", lambda *args, **kwargs: release.wait(60))
    hub("http://silent")
    with pytest.raises(RequestError, match=r"http://silent does not answer \(no answer within 0\.3 s\)"):
        check_published("resnet18")
    release.set()


def test_cached_weights_need_no_hub(hub, tmp_path):
    from huggingface_hub import constants

    hub(UNREACHABLE)
    (tmp_path / "cache" / "models--timm--resnet18.a1_in1k").mkdir(parents=True)
    check_published("resnet18")
    check_source("resnet18.a1_in1k")
    assert constants.HF_HUB_OFFLINE is False
    check_published("vit_base_patch16_224")  # may be in the cache under another name: looked up there alone
    assert constants.HF_HUB_OFFLINE is True


def test_weights_are_downloaded_from_a_hub_that_answers(hub, tmp_path, monkeypatch):
    """By the real client, from a server that has one file."""
    weights = save({name: value.contiguous() for name, value in create_model("sequencer2d_s").state_dict().items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _hub_of(weights))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    code = (
        "from sequencer.config.preflight import check_published\n"
        "check_published('sequencer2d_s')\n"
        "from sequencer.models import create_model\n"
        "model = create_model('sequencer2d_s', pretrained=True)\n"
        "print(sum(float(value.sum()) for value in model.state_dict().values()))"
    )
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(sum(float(value.sum()) for value in load(weights).values()), rel=1e-6)


def _hub_of(weights: bytes) -> type[BaseHTTPRequestHandler]:
    class Hub(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            found = self.path == "/" or self.path.endswith("/model.safetensors")
            self.send_response(200 if found else 404)
            self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
            self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
            self.send_header("Content-Length", str(len(weights) if found else 0))
            self.end_headers()
            if body and found:
                self.wfile.write(weights)

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def log_message(self, *args) -> None:
            pass

    return Hub


@pytest.mark.parametrize("folder", ["val", "validation", "valid"])
def test_names_of_the_validation_folder(tmp_path, folder):
    config = compose(["data=imagefolder", f"data.root={tmp_path}"]).data
    (tmp_path / "train").mkdir()
    with pytest.raises(RequestError, match="/val "):
        check_data(config)
    (tmp_path / folder).mkdir()
    check_data(config)


def test_a_root_that_is_one_level_too_deep(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / "photos" / split / "ants").mkdir(parents=True)
    config = compose(["data=imagefolder", f"data.root={tmp_path}/photos/train"]).data
    for root, name in (("data.root=...", "data.root="), ("--data-root DIR", "--data-root ")):
        with pytest.raises(RequestError) as error:
            check_data(config, root=root)
        assert str(error.value).splitlines()[1] == (
            f"its parent has train/ and val/: did you mean {name}{tmp_path}/photos?"
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("folder", None, "folder is a folder\ndata.root=... must name a CSV or Parquet file with a column of paths"),
        ("list.txt", "", "list.txt ends neither with .csv nor with .parquet"),
        ("list.csv", "file,species\n", "list.csv has no column 'path'; it has file, species\nset data.path_column="),
        ("list.csv", "", "list.csv has no column 'path'; it is empty\nset data.path_column="),
    ],
)
def test_a_list_of_files_is_checked_by_its_header(name, content, message, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(content)
    config = compose(["data=filelist", f"data.root={path}"]).data
    with pytest.raises(RequestError) as error:
        check_data(config)
    assert message in str(error.value)


def test_data_is_asked_for_in_the_words_of_the_command(tmp_path):
    config = compose(["data=cifar10", f"data.root={tmp_path}"]).data
    with pytest.raises(RequestError, match=r"\)\nfetch it with data\.download=true, or .* with data\.root=\.\.\.$"):
        check_data(config)
    with pytest.raises(
        RequestError, match=r"\)\nname the folder that holds cifar-10-batches-py/ with --data-root DIR$"
    ):
        check_data(config, ["test"], root="--data-root DIR")


def test_a_folder_of_runs_stands_for_the_one_started_last(tmp_path, capsys):
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        os.utime(tmp_path / name / "config.yaml", (1000 + age, 1000 + age))
    assert named_run(tmp_path) == tmp_path / "a"
    assert capsys.readouterr().err == f"newest run in {tmp_path}: {tmp_path / 'a'}\n"
    assert named_run(tmp_path, besides=str(tmp_path / "a")) == tmp_path / "c"
    assert named_run(tmp_path / "a") == tmp_path / "a"
    assert named_run("resnet18") == named_run("resnet18")
    (tmp_path / "config.json").write_text(json.dumps({}))  # a model folder
    assert named_run(tmp_path) == tmp_path
