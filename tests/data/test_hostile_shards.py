"""Shards and indexes that lie, are damaged, or name what they may not."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sequencer.config.errors import RequestError
from sequencer.data import Quarantine, UnreadableImage
from sequencer.data.shard_files import Sample, read_samples, resolve
from tests.data.shard_helpers import config, module, png, val_split, webdataset


@pytest.mark.parametrize("name", ["/etc/a.tar", "file:///etc/a.tar", "~/a.tar", "file:a.tar"])
def test_a_remote_index_names_no_local_file(name):
    for root in ("http://host/set", "https://host", "s3://bucket"):
        with pytest.raises(RequestError, match="may not name files of this machine"):
            resolve(root, name)


def test_addresses_that_an_index_may_name():
    assert resolve("/data/o'clock", "a b.tar") == "/data/o'clock/a b.tar"
    assert resolve("/data", "/other/a.tar") == "/other/a.tar"
    assert resolve("/data", "~/a.tar") == os.path.expanduser("~/a.tar")
    assert resolve("/data", "https://host/a.tar") == "https://host/a.tar"
    assert resolve("https://host/set/", "s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert resolve("https://host/set/", "a.tar") == "https://host/set/a.tar"
    for name in ("https://host/\n.tar", "gopher://host/a.tar", "pipe:id", "scp://host/a.tar", "sftp://host/a.tar"):
        with pytest.raises(RequestError, match="addresses are files, http, https or s3"):
            resolve("/data", name)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_shards_and_indexes_are_regular_files(shards_copy, make):
    (shards_copy / "val-0.tar").unlink()
    make(shards_copy / "val-0.tar")
    found = val_split(shards_copy).reader().read(np.arange(5))
    assert all("no regular file" in error.reason for error in found.values())
    (shards_copy / "train.json").unlink()
    make(shards_copy / "train.json")
    with pytest.raises(RequestError, match="no regular file"):
        module(shards_copy)


def test_an_index_is_read_up_to_a_bound(shards_copy, monkeypatch):
    monkeypatch.setattr("sequencer.data.shard_files.MOST_INDEX", 100)
    with pytest.raises(RequestError, match="an index has at most"):
        module(shards_copy)


def test_a_damaged_index_of_the_test_split_is_not_taken_for_none(shards_copy):
    (shards_copy / "test.json").write_text("{")
    with pytest.raises(RequestError, match=r"test\.json: invalid JSON"):
        module(shards_copy)


def test_files_in_a_shard_are_read_up_to_a_bound(shards_copy, monkeypatch):
    """A compressed shard may hold a file that is far larger than itself."""
    with tarfile.open(shards_copy / "val-0.tar", "w:gz") as tar:
        for name, size in (("0.png", len(png(7))), ("0.cls", 1), ("1.png", 10**7), ("1.cls", 1), ("2.png", 8)):
            member = tarfile.TarInfo(name)
            member.size = size
            content = {"0.png": png(7), "0.cls": b"1", "1.cls": b"2"}.get(name, bytes(size))
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    monkeypatch.setattr("sequencer.data.shard_files.MOST_FILE", 10**6)
    samples = list(read_samples(str(shards_copy / "val-0.tar")))
    assert [(len(sample.file), sample.label) for sample in samples] == [(len(png(7)), 1), (0, 2), (8, -1)]


@pytest.mark.parametrize("label", [b"9" * 5000, b"-1", b"1.5", b"\xff", "٣".encode(), b"1e3"])
def test_a_label_that_is_no_number(shards_copy, label):
    with webdataset.TarWriter(str(shards_copy / "val-0.tar")) as writer:
        writer.write({"__key__": "0", "png": png(0), "cls": label})
    assert [sample.label for sample in read_samples(str(shards_copy / "val-0.tar"))] == [-1]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"no complete set in .*/train\.json \(No such file or directory\)\nscripts/shards\.py writes"),
        ("{}", r"no complete set in .*/train\.json \(train\.json: shardlist: field required\)"),
        ("{", r"train\.json: invalid JSON"),
        ("[" * 300, r"train\.json: invalid JSON"),
        ("[1]", r"train\.json: input should be an object"),
        ('{"shardlist": []}', r"train\.json: shardlist: list should have at least 1 item"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 0}]}', r"shardlist\.0\.nsamples: .* greater than or equal to 1"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 1e308}]}', r"nsamples: input should be a valid integer"),
        (
            '{"shardlist": [{"url": "a.tar", "nsamples": 1000000000000}]}',
            r"nsamples: .* less than or equal to 10000000",
        ),
        ('{"shardlist": [{"url": "", "nsamples": 1}]}', "url: input should have 1 to 4096 characters"),
        ('{"shardlist": [{"url": 5, "nsamples": 1}]}', r"url: input should be a valid string"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 1}], "classes": 5}', r"classes: input should be a valid array"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 1}], "classes": [[1]]}', r"classes\.0\.str: input should be"),
        (
            '{"shardlist": [{"url": "a.tar", "nsamples": 1}], "classes": ["a"]}',
            r"data\.num_classes=3, but 1 classes were",
        ),
        ('{"shardlist": [{"url": "pipe:rm x", "nsamples": 1}], "classes": ["a"]}', "addresses are files, http"),
        (
            '{"shardlist": [{"url": "http://host/\'; rm x; \'.tar", "nsamples": 1}], "classes": ["a"]}',
            "addresses are files, http",
        ),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 1}]}', r"names no classes: set data\.num_classes"),
    ],
)
def test_a_wrong_index_is_refused(shards_copy, index, message):
    path = shards_copy / "train.json"
    path.unlink() if index is None else path.write_text(index)
    with pytest.raises(RequestError, match=message):
        module(shards_copy, num_classes=3 if index and '["a"]' in index else None)


def test_a_label_that_no_class_has(shards_copy, tmp_path):
    (shards_copy / "val.json").write_text(
        (shards_copy / "val.json").read_text().replace('["a", "b", "c"]', '["a", "b"]')
    )
    split = val_split(shards_copy)
    split.quarantine = Quarantine(tmp_path / "bad.csv", "val", 9, 1.0)
    batches = list(split.evaluation_loader(config(shards_copy)))
    assert [index for _, _, indices in batches for index in indices.tolist()] == [0, 1, 3, 4, 6, 7]
    assert (tmp_path / "bad.csv").read_text().count("its label is 2 of 2 classes") == 3


def test_a_sample_without_a_label(shards_root):
    with pytest.raises(UnreadableImage, match=r"its label is -1 of 3 classes"):
        val_split(shards_root).decode(Sample(png(0), -1, "sample"))


def test_a_header_is_read_up_to_a_bound(shards_copy):
    """A compressed shard may hold a header, of names and attributes, that is far larger than itself."""
    size = 2**26
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.XHDTYPE, size
    with gzip.open(shards_copy / "val-0.tar", "wb", compresslevel=1) as file:
        file.write(header.tobuf())
        for _ in range(size >> 20):
            file.write(bytes(2**20))
    reader = val_split(shards_copy).reader()
    tracemalloc.start()
    found = reader.read(np.arange(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a header of 67108864 bytes" in found[0].reason
    assert peak < 2**24


def test_a_damaged_header_is_not_taken_for_the_end(shards_copy):
    with tarfile.open(shards_copy / "val-0.tar") as tar:
        third = tar.getmember("00002.cls").offset
    content = bytearray((shards_copy / "val-0.tar").read_bytes())
    content[third] ^= 1  # the first letter of its name
    (shards_copy / "val-0.tar").write_bytes(content)
    found = val_split(shards_copy).reader().read(np.arange(3))
    assert isinstance(found[0], Sample)
    assert "damaged header: bad checksum" in found[2].reason


def test_a_shard_may_have_a_name_that_is_not_utf8(shards_copy):
    name = os.fsdecode(b"val-\xff.tar")
    (shards_copy / "val-0.tar").rename(shards_copy / name)
    index = json.loads((shards_copy / "val.json").read_text())
    index["shardlist"][0]["url"] = name
    (shards_copy / "val.json").write_text(json.dumps(index))
    assert isinstance(val_split(shards_copy).reader().read(np.arange(1))[0], Sample)
