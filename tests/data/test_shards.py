"""Splits in shards: every sample once per epoch, for any ranks and workers, from a disk, over HTTP and from S3."""

import csv
import functools
import json
import os
import shutil
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from sequencer.config.composition import compose
from sequencer.config.errors import RequestError
from sequencer.config.schema import AugmentConfig
from sequencer.data import DataModule, TooManyBadImages, open_split
from sequencer.data.shard_files import ShardReader, read_samples
from sequencer.data.shard_order import ShardOrder
from sequencer.data.shards import EvaluationStream, ShardSampler, TrainingStream
from sequencer.data.streams import open_stream
from sequencer.models import read_checkpoint
from sequencer.training import run
from tests.data.shard_helpers import SIZES, config, module, val_split

webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")


def values(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_sample_once_an_epoch(shards_root, workers):
    loader = module(shards_root, num_workers=workers).train_dataloader()
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
def test_orders_of_ranks_and_workers_cover_every_sample_once(workers, world_size):
    starts = np.cumsum([0, *SIZES])
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        order = ShardOrder(starts, 28, 4 // world_size, workers, rank, world_size, seed=3, buffer=5)
        assert len(order) == 28 // world_size
        seen.update(order.sample(6, index) for index in range(len(order)))
    assert len(seen) == 28
    assert max(seen.values()) == 1


def test_the_order_of_an_epoch_never_changes():
    """A run that is resumed with a later version goes on in the same order."""
    order = ShardOrder(np.cumsum([0, 4, 3, 5]), 12, 2, 2, seed=1, buffer=3, salts={5: "1 1"})
    assert [[order.sample(epoch, index) for index in range(12)] for epoch in (4, 5)] == [
        [5, 4, 10, 0, 6, 8, 11, 3, 7, 9, 2, 1],
        [1, 2, 8, 6, 0, 4, 7, 10, 3, 5, 9, 11],
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_every_batch(shards_root, workers):
    ranks = [module(shards_root, rank, 2, num_workers=workers) for rank in range(2)]
    loaders = [data.train_dataloader() for data in ranks]
    for number, batches in enumerate(zip(*loaders, strict=True)):
        together = [value for images, _ in batches for value in values(images)]
        assert together == ranks[0].images_of(0, number) == ranks[1].images_of(0, number)
    assert number == 6


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(shards_root, workers, world_size):
    found = []
    wanted = config(shards_root, num_workers=workers, eval_batch_size=2)
    for rank in range(world_size):
        for batch, labels, indices in val_split(shards_root).evaluation_loader(wanted, rank, world_size):
            assert values(batch) == indices.tolist()
            assert labels.tolist() == [index % 3 for index in indices.tolist()]
            found += indices.tolist()
    assert sorted(found) == list(range(9))


def test_what_a_split_tells_of_its_samples(shards_root):
    split = val_split(shards_root)
    assert (len(split), split.class_names, split.labels) == (9, ["a", "b", "c"], None)
    assert split.ids[4:6] == [f"{shards_root}/val-0.tar#4", f"{shards_root}/val-1.tar#0"]
    assert split.probe(5) == (0, [])
    with pytest.raises(NotImplementedError, match="validation split"):
        split.subset(np.arange(3))


def test_examples_are_readable_samples(shards_copy):
    (shards_copy / "val.json").write_text(
        (shards_copy / "val.json").read_text().replace('["a", "b", "c"]', '["a", "b"]')
    )
    examples = val_split(shards_copy).examples(3)  # of samples 0 to 8, of which every third has a label too many
    assert values(torch.stack([image for image, _ in examples])) == [0, 1, 3]
    assert [label for _, label in examples] == [0, 1, 0]
    assert len(val_split(shards_copy).examples(100)) == 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 2, 5])
def test_an_epoch_goes_on_where_it_was(shards_root, workers, done):
    data = module(shards_root, num_workers=workers, augment=AugmentConfig(hflip=0.5, scale=[0.3, 1.0]))
    whole = list(data.train_dataloader())
    data.load_state_dict({"epoch": 0, "batches": done, "reshuffles": []})
    rest = list(data.train_dataloader())
    assert len(rest) == 7 - done
    for (images, labels), (expected, expected_labels) in zip(rest, whole[done:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_a_reshuffled_epoch_is_another_order_of_its_own(shards_root):
    data, again = module(shards_root), module(shards_root)
    for wanted, reshuffles in ((data, [2]), (again, [])):
        wanted.load_state_dict({"epoch": 1, "batches": 2, "reshuffles": reshuffles})
    orders = [[wanted.images_of(epoch, 3) for wanted in (data, again)] for epoch in range(3)]
    assert [a == b for a, b in orders] == [True, False, True]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    assert [values(images) for images, _ in loader] == [data.images_of(1, batch) for batch in range(2, 7)]


def test_the_augmentation_depends_on_seed_epoch_and_sample_alone(shards_root):
    split = open_split(config(shards_root), "train", lambda image: (image.getpixel((0, 0))[0], torch.rand(1).item()))
    drawn = []
    for seed, epoch, workers in ((3, 1, 1), (3, 1, 2), (4, 1, 1), (3, 2, 1)):
        order = ShardOrder(split.starts, 30, 4, workers, seed=seed, buffer=5)
        items = TrainingStream(split, order, seed).__getitems__([(epoch, index) for index in range(30)])
        drawn.append(sorted(image for image, _ in items))
    assert drawn[0] == drawn[1]
    assert [value for value, _ in drawn[0]] == list(range(30))
    assert len({number for draws in (drawn[0], *drawn[2:]) for _, number in draws}) == 90


def test_images_of_a_batch_are_named(shards_root):
    data = module(shards_root)
    batches = list(data.train_dataloader())
    assert [data.images_of(0, number) for number in range(7)] == [values(images) for images, _ in batches]


def test_a_worker_opens_each_of_its_shards_once(shards_root, monkeypatch):
    opened: list[str] = []

    def counting(url: str):
        opened.append(url)
        return read_samples(url)

    monkeypatch.setattr("sequencer.data.shard_files.read_samples", counting)
    list(module(shards_root).train_dataloader())
    assert sorted(opened) == sorted(set(opened))
    assert len(opened) >= len(SIZES) - 1  # 28 of 30 samples may leave out a shard of one


class Server(SimpleHTTPRequestHandler):
    broken: ClassVar[dict[str, int]] = {}  # by name: bytes after which the connection ends, as often as `times` says
    times: ClassVar[Counter[str]] = Counter()
    redirects: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if name in self.redirects:
            self.send_response(302)
            self.send_header("Location", self.redirects[name])
            self.end_headers()
            return
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
def address(shards_copy):
    Server.broken, Server.times, Server.redirects = {}, Counter(), {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(shards_copy)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_over_http(address, shards_copy, workers):
    there, here = (module(root, num_workers=workers).train_dataloader() for root in (address, shards_copy))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(there, here, strict=True))


def test_a_shard_that_breaks_off_once_is_read_again(address, shards_copy):
    Server.broken, Server.times = {"train-2.tar": 9000}, Counter({"train-2.tar": 1})
    there, here = (module(root).train_dataloader() for root in (address, shards_copy))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(there, here, strict=True))
    assert Server.times["train-2.tar"] == 0


def test_what_a_broken_shard_lacks_is_listed_and_replaced(address, shards_copy, tmp_path):
    Server.broken, Server.times = {"train-2.tar": 9000}, Counter({"train-2.tar": -1})
    data = DataModule(
        config(address, max_bad_share=0.9, shuffle_buffer=20), 0, bad_samples=tmp_path / "bad_samples.csv"
    )
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(images) for images, _ in batches] == [4] * 7
    with open(tmp_path / "bad_samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["path"].startswith(f"{address}/train-2.tar#") and "breaks off" in row["reason"] for row in rows)
    strict = DataModule(config(address, max_bad_share=0.01), 0, bad_samples=tmp_path / "strict.csv")
    strict.setup()
    with pytest.raises(TooManyBadImages, match=r"than data\.max_bad_share=0\.01 allows"):
        list(strict.train_dataloader())


def test_a_shard_cut_short_on_the_disk(shards_copy, tmp_path):
    path = shards_copy / "train-2.tar"
    path.write_bytes(path.read_bytes()[:9000])
    data = DataModule(config(shards_copy, max_bad_share=0.9), 0, bad_samples=tmp_path / "bad.csv")
    data.setup()
    readable = data.count_readable()
    with open(tmp_path / "bad.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"train"}
    assert all(row["path"].startswith(f"{shards_copy}/train-2.tar#") for row in rows)
    assert 30 - 11 + 9 < readable == 30 + 9 - len(rows)


def test_a_shard_with_fewer_samples_than_its_index_says(shards_copy):
    found = ShardReader([f"{shards_copy}/train-1.tar"], np.array([0, 5])).read(np.arange(5))
    assert [found[number].name for number in range(3)] == [
        f"{shards_copy}/train-1.tar#{value:05}" for value in (7, 8, 9)
    ]
    assert [found[number].path for number in (3, 4)] == [f"{shards_copy}/train-1.tar#{number}" for number in (3, 4)]
    assert {found[number].reason for number in (3, 4)} == {"the shard breaks off: it ends after 3 samples"}


def test_shards_without_a_readable_sample_are_an_error(shards_copy):
    for path in shards_copy.glob("train-*.tar"):
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of 5 consecutive samples of the shards can be read"):
        next(iter(module(shards_copy).train_dataloader()))


def test_from_s3(shards_copy, tmp_path, monkeypatch):
    """Through the aws command, here one that copies from the folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "aws").write_text(f'#!/bin/sh\ntest "$1 $2 $4" = "s3 cp -" && cat "{shards_copy}/$(basename "$3")"\n')
    (programs / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    there, here = (module(root).train_dataloader() for root in ("s3://bucket/set", shards_copy))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(there, here, strict=True))


def test_a_command_gets_addresses_as_they_are(shards_copy, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "aws").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    (programs / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    url = f"s3://bucket/$(touch {tmp_path}/made);`id`|a b.tar"
    with open_stream(url) as file:
        assert file.read(10) == b"s3\ncp\ns3:/"
        with pytest.raises(OSError, match="aws ends with exit code 3"):
            file.read()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("target", ["file://{}/val-0.tar", "ftp://127.0.0.1:1/val-0.tar", "scp://127.0.0.1/a.tar"])
def test_a_redirect_does_not_leave_http(address, shards_copy, target):
    Server.redirects = {"moved.tar": f"{address}/val-0.tar", "evil.tar": target.format(shards_copy)}
    assert len(list(read_samples(f"{address}/moved.tar"))) == 5
    with pytest.raises(OSError, match="curl ends with exit code 1"):
        list(read_samples(f"{address}/evil.tar"))


def test_an_address_is_no_pattern(address, shards_copy):
    shutil.copy(shards_copy / "val-0.tar", shards_copy / "{a,b}[1-9].tar")
    assert len(list(read_samples(f"{address}/{{a,b}}[1-9].tar"))) == 5


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "c", "b"], ["a", "b", "c", "d"]])
def test_splits_with_different_classes_are_refused(shards_copy, classes):
    index = json.loads((shards_copy / "val.json").read_text())
    (shards_copy / "val.json").write_text(json.dumps(index | {"classes": classes}))
    with pytest.raises(
        RequestError, match=r"val\.json has other classes, or the same in another order, than .*train\."
    ):
        module(shards_copy)


def test_the_order_of_a_trillion_samples_takes_no_memory():
    starts = np.arange(0, 10**12 + 1, 10**7)
    order = ShardOrder(starts, 10**12, 256, 8, 1, 2, seed=1, buffer=100)
    assert len(order) == 5 * 10**11
    found = [order.sample(epoch, index) for epoch in range(2) for index in range(0, 10**11, 10**10 + 1)]
    assert len(set(found)) == len(found)
    assert 0 <= min(found) <= max(found) < 10**12


SMALL = ["model.name=sequencer2d_t_32", "trainer.accelerator=cpu", "trainer.max_epochs=2", "data.batch_size=4",
         "data.num_workers=0", "trainer.enable_progress_bar=false", "data.img_size=8", "data.augment.scale=[0.5,1]",
         "logger.report=false",
         "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}"]  # fmt: skip


@pytest.mark.usefixtures("unrendered")
def test_a_run_on_shards_ends_the_same_when_it_is_resumed(shards_root, tmp_path):
    from sequencer.training.module import Classifier

    def wanted(name: str):
        return compose(["data=webdataset", f"data.root={shards_root}", f"run_dir={tmp_path / name}", *SMALL,
                        "trainer.checkpoint_interval=0"])  # fmt: skip

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


def test_the_sampler_serves_the_share_of_its_rank(shards_root):
    split = open_split(config(shards_root), "train", np.asarray)
    sampler = ShardSampler(
        split, config(shards_root, batch_size=8), 0, 1, 2, {"epoch": 1, "batches": 2, "reshuffles": []}
    )
    assert len(sampler) == 12
    sampler.set_epoch(1)
    assert list(sampler) == [(1, index) for index in range(8, 12)]
    sampler.set_epoch(2)
    assert list(sampler) == [(2, index) for index in range(12)]


def test_a_stream_knows_its_length(shards_root):
    split = open_split(config(shards_root), "train", np.asarray)
    assert len(EvaluationStream(split, ShardOrder(split.starts, 30, 4, 2))) == 30


def test_plain_indices_stand_for_epoch_0(shards_root):
    """With `overfit_batches` Lightning replaces the sampler by a sequential one."""
    loader = module(shards_root).train_dataloader()
    items = loader.dataset.__getitems__([(0, 3), (0, 4)])
    assert values(torch.stack([image for image, _ in loader.dataset.__getitems__([3, 4])])) == values(
        torch.stack([image for image, _ in items])
    )
