"""What TensorBoard and W&B hold of a finished run, read by TensorBoard's reader and with W&B's message types."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

from sequencer.training import run

PICTURES = {  # in the run folder, by the names under which they are logged
    "confusion": "confusion.png",
    "curves": "curves.png",
    "mistakes": "report/mistakes.png",
    "reliability": "report/reliability.png",
}


def read_wandb(run_dir: Path) -> list[Record]:
    """Reads the records of the only offline run in a folder; wandb itself has no reader in Python.

    The file is a header of 7 bytes and LevelDB's log: blocks of 32 KiB with chunks, each of which has a checksum of 4
    bytes, a length of 2, and a type: 1 is a whole record, 2, 3 and 4 the first, a middle and the last part of one.
    """
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    content, place, records, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # the rest of a block is padding
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A trial of a sweep, which logs to both."""
    from tests.helpers import small_config

    folder = tmp_path_factory.mktemp("logged") / "rates" / "lr-0.01"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        loggers = ["logger=[wandb,tensorboard]", "logger.group=rates", "logger.report=true"]
        summary = run(small_config(folder, *loggers, "optim.lr=0.01"))
    return folder, summary


def test_tensorboard(logged):
    folder, summary = logged
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("loss", "top1", "top5"):
        (point,) = events.Scalars(f"test/{name}")
        assert point.step == summary["updates"]
        assert point.value == pytest.approx(summary[f"test/{name}"])
    assert [point.step for point in events.Scalars("val/top1")] == [3, 7]
    assert sorted(events.Tags()["images"]) == sorted(PICTURES)
    for name, path in PICTURES.items():
        (event,) = events.Images(name)
        with Image.open(io.BytesIO(event.encoded_image_string)) as shown, Image.open(folder / path) as written:
            assert shown.tobytes() == written.convert("RGB").tobytes()
    (config,) = events.Tensors("config/text_summary")
    assert b"lr: 0.01\n" in config.tensor_proto.string_val[0]
    start = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert start.session_start_info.hparams["optim.lr"].number_value == 0.01


def test_wandb(logged):
    folder, summary = logged
    records = read_wandb(folder)
    (start,) = (record.run for record in records if record.HasField("run"))
    assert (start.display_name, start.run_group) == ("lr-0.01", "rates")
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert config["optim"]["lr"] == 0.01
    rows = [{item.key or item.nested_key[0]: item.value_json for item in record.history.item} for record in records
            if record.HasField("history")]  # fmt: skip
    assert "val/top1" in rows[0]
    assert float(rows[-1]["test/top1"]) == summary["test/top1"]
    assert rows[-1]["trainer/global_step"] == str(summary["updates"])
    media = list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert sorted(path.name.partition("_")[0] for path in media) == sorted(PICTURES)
    for path in media:
        assert path.read_bytes() == (folder / PICTURES[path.name.partition("_")[0]]).read_bytes()
    (page,) = folder.glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert page.read_bytes() == (folder / "report.html").read_bytes()
    assert "report" in rows[-1]
    (end,) = (record.exit for record in records if record.HasField("exit"))
    assert end.exit_code == 0
