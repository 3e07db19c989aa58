"""Shards: each sample once an epoch, whoever reads them, from wherever they come."""

import csv
import functools
import io
import json
import os
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer.config.errors import RequestError
from sequencer.config.request import compose, to_config
from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import DataModule, TooManyBadImages, check_images, evaluation_loader
from sequencer.data.shards import ShardSet, StreamSampler, StreamSet, Stretches, read_samples
from sequencer.models import read_checkpoint
from sequencer.training import run

webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
SIZES = (7, 3, 11, 1, 8)  # samples of the shards of the training part


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write_part(folder: Path, part: str, sizes: tuple[int, ...]) -> None:
    """Image `n` of a part is of the grey value `n`, its label is n % 3."""
    first, shards = 0, []
    for number, size in enumerate(sizes):
        name = f"{part}-{number}.tar"
        with webdataset.TarWriter(str(folder / name)) as writer:
            for value in range(first, first + size):
                writer.write({"__key__": f"{value:05}", "png": png(value), "cls": str(value % 3)})
        shards.append({"url": name, "nsamples": size})
        first += size
    (folder / f"{part}.json").write_text(json.dumps({"shardlist": shards, "classes": ["a", "b", "c"]}))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_part(tmp_path, "train", SIZES)
    write_part(tmp_path, "val", (5, 4))
    return tmp_path


def config(root: object, **changes: object) -> DataConfig:
    plain = {"img_size": 8, "mean": [0.0], "std": [1.0], "crop_pct": 1.0, "augment": AugmentConfig(), "num_workers": 0}
    changes = {"batch_size": 4, "eval_batch_size": 4, "shuffle_buffer": 5} | plain | changes
    return DataConfig(name="webdataset", root=str(root), **changes)  # type: ignore[arg-type]


def module(root: object, **changes: object) -> DataModule:
    data = DataModule(config(root, **changes), seed=0)
    data.setup()
    return data


def values(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_sample_once_an_epoch(folder, workers):
    loader = module(folder, num_workers=workers).train_dataloader()
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert all(labels.tolist() == [value % 3 for value in values(images)] for images, labels in batches)
        orders.append([value for images, _ in batches for value in values(images)])
        assert len(orders[-1]) == 28  # of 30, in batches of 4
        assert max(Counter(orders[-1]).values()) == 1
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_of_processes_and_workers(folder, workers, world_size):
    images = ShardSet(config(folder), "train", np.asarray)
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        stretches = Stretches(images, 28, 4 // world_size, workers, rank, world_size, seed=3, buffer=5)
        assert len(stretches) == 28 // world_size
        seen.update(stretches.number(6, index) for index in range(len(stretches)))
    assert len(seen) == 28
    assert max(seen.values()) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(folder, workers, world_size):
    found = []
    for rank in range(world_size):
        images = ShardSet(config(folder), "val", lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
        loader = evaluation_loader(images, config(folder, num_workers=workers, eval_batch_size=2), rank, world_size)
        for batch, labels, indices in loader:
            assert values(batch) == indices.tolist()
            assert labels.tolist() == [index % 3 for index in indices.tolist()]
            found += indices.tolist()
    assert sorted(found) == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 2, 5])
def test_an_epoch_goes_on_where_it_was(folder, workers, done):
    data = module(folder, num_workers=workers, augment=AugmentConfig(hflip=0.5, scale=[0.3, 1.0]))
    whole = list(data.train_dataloader())
    data.load_state_dict({"epoch": 0, "batches": done, "reshuffles": []})
    rest = list(data.train_dataloader())
    assert len(rest) == 7 - done
    for (images, labels), (expected, expected_labels) in zip(rest, whole[done:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_images_of_a_batch_are_named(folder):
    data = module(folder)
    batches = list(data.train_dataloader())
    assert [data.images_of(0, number) for number in range(7)] == [values(images) for images, _ in batches]


def test_a_worker_opens_each_of_its_shards_once(folder, monkeypatch):
    opened: list[str] = []

    def counting(url: str):
        opened.append(url)
        return read_samples(url)

    monkeypatch.setattr("sequencer.data.shards.read_samples", counting)
    list(module(folder).train_dataloader())
    assert len(opened) <= len(SIZES)
    assert len(set(opened)) == len(opened)


class Server(SimpleHTTPRequestHandler):
    broken: ClassVar[dict[str, int]] = {}  # by name: bytes after which the connection ends, as often as `times` says
    times: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if name in self.broken and self.times[name] != 0:
            self.times[name] -= 1
            data = Path(self.directory, name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.broken[name]])
            self.wfile.flush()
            self.connection.close()
            return
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(folder):
    Server.broken, Server.times = {}, Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves it to the collector to close its pipes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_over_http(address, folder, workers):
    there, here = (module(root, num_workers=workers).train_dataloader() for root in (address, folder))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(there, here, strict=True))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_shard_that_breaks_off_once_is_read_again(address, folder):
    Server.broken, Server.times = {"train-2.tar": 9000}, Counter({"train-2.tar": 1})
    there, here = (module(root).train_dataloader() for root in (address, folder))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(there, here, strict=True))
    assert Server.times["train-2.tar"] == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_broken_shard_lacks_is_listed_and_replaced(address, folder, tmp_path):
    Server.broken, Server.times = {"train-2.tar": 9000}, Counter({"train-2.tar": -1})
    data = DataModule(config(address, max_bad_share=0.9, shuffle_buffer=20), 0, tmp_path / "bad_samples.csv")
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(images) for images, _ in batches] == [4] * 7
    with open(tmp_path / "bad_samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["path"].startswith(f"{address}/train-2.tar#") and "breaks off" in row["reason"] for row in rows)
    strict = DataModule(config(address, max_bad_share=0.01), 0, tmp_path / "strict.csv")
    strict.setup()
    with pytest.raises(TooManyBadImages, match=r"than data\.max_bad_share=0\.01 allows"):
        list(strict.train_dataloader())


def test_a_shard_cut_short_on_the_disk(folder, tmp_path):
    path = folder / "train-2.tar"
    path.write_bytes(path.read_bytes()[:9000])
    data = DataModule(config(folder, max_bad_share=0.9), 0, tmp_path / "bad.csv")
    data.setup()
    assert check_images("webdataset", data.parts, 0, False) < 39
    assert "train-2.tar#" in (tmp_path / "bad.csv").read_text()


def test_from_s3(folder, tmp_path, monkeypatch):
    """Through the aws command, here one that copies from the folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "aws").write_text(f'#!/bin/sh\ntest "$1 $2 $4" = "s3 cp -" && cat "{folder}/$(basename "$3")"\n')
    (programs / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    there, here = (module(root).train_dataloader() for root in ("s3://bucket/set", folder))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"no index .*/train\.json"),
        ("{}", r"no index .*/train\.json"),
        ('{"shardlist": []}', "no shard"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 0}]}', "a shard without samples"),
        ('{"shardlist": [{"url": "pipe:rm x", "nsamples": 1}], "classes": ["a"]}', "addresses are files, http"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 1}]}', r"names no classes: set data\.num_classes"),
    ],
)
def test_a_wrong_index_is_refused(folder, index, message):
    path = folder / "train.json"
    path.unlink() if index is None else path.write_text(index)
    with pytest.raises(RequestError, match=message):
        module(folder)


def test_a_label_that_no_class_has(folder, tmp_path):
    (folder / "val.json").write_text((folder / "val.json").read_text().replace('["a", "b", "c"]', '["a", "b"]'))
    images = ShardSet(config(folder), "val", lambda image: torch.zeros(3, 8, 8))
    batches = list(evaluation_loader(images, config(folder)))
    assert sum(len(labels) for _, labels, _ in batches) == 6


SMALL = ["model.name=sequencer2d_t_32", "trainer.accelerator=cpu", "trainer.max_epochs=2", "data.batch_size=4",
         "data.num_workers=0", "trainer.enable_progress_bar=false", "data.img_size=8", "data.augment.scale=[0.5,1]",
         "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}"]  # fmt: skip


def test_a_run_on_shards_ends_the_same_when_it_is_resumed(folder, tmp_path):
    from sequencer.training.module import Classifier

    def wanted(name: str):
        return to_config(compose(["data=webdataset", f"data.root={folder}", f"run_dir={tmp_path / name}", *SMALL,
                                  "trainer.checkpoint_interval=0"]))  # fmt: skip

    run(wanted("whole"))
    step, steps = Classifier.training_step, 0

    def stopping(self, batch, batch_idx):
        nonlocal steps
        steps += 1
        if steps == 10:
            raise OSError("the power is gone")
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", stopping)
        with pytest.raises(OSError, match="power"):
            run(wanted("cut"))
    run(wanted("cut"), resume=True)
    whole, cut = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut"))
    assert all(torch.equal(whole["state_dict"][key], cut["state_dict"][key]) for key in whole["state_dict"])


def test_stream_sampler_serves_its_share():
    sampler = StreamSampler(30, 8, 0, rank=1, world_size=2, epoch=1, batches_done=2)
    assert len(sampler) == 12
    sampler.set_epoch(1)
    assert list(sampler) == [(1, index) for index in range(8, 12)]
    sampler.set_epoch(2)
    assert list(sampler) == [(2, index) for index in range(12)]


def test_stream_set_knows_its_length(folder):
    stretches = Stretches(ShardSet(config(folder), "train", np.asarray), 30, 4, 2)
    assert len(StreamSet(stretches)) == 30
