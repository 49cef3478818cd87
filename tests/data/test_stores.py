"""Shards behind addresses and patterns: the same samples as from their folder, each shard fetched once and whole."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from shard_maker import write_shards

from ldmlab import instantiate
from ldmlab.data import shards
from ldmlab.data.manifest import read_manifest
from ldmlab.data.shard_cache import ShardCache
from ldmlab.data.shard_data import ShardData
from ldmlab.data.shards import ShardReader, Store, manifest_of, shards_at
from ldmlab.errors import InputError
from s3_server import S3, running_s3

COUNTS = [5, 3, 4, 6]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Path:
    """Local shards, which also lie at s3://lab/train."""
    folder = tmp_path_factory.mktemp("stores") / "train"
    write_shards(folder, COUNTS)
    s3.upload(folder, "train")
    return folder


@pytest.fixture(autouse=True)
def _forget(s3: S3) -> None:
    shards._FETCHED.clear()
    s3.faults.planted.clear()
    s3.faults.gets.clear()
    s3.faults.puts.clear()


def data_at(place: str, tmp_path: Path, **options: Any) -> ShardData:
    cache = str(tmp_path / "cache")
    return ShardData(train=place, val=place, image_size=8, mix=2, shard_cache=cache, **{"workers": 0, **options})


def first_batches(data: ShardData, number: int = 8) -> list[dict[str, Any]]:
    loader = iter(data.train_loader(3))
    return [next(loader) for _ in range(number)]


def read_all(place: str, tmp_path: Path, gib: float = 1.0) -> list[tuple[str, dict[str, bytes]]]:
    """Every sample as stored, by the reader."""
    folder = shards_at(place, "data.train", ShardCache(tmp_path / "cache", gib))
    manifest = manifest_of(folder, "data.train")
    reader = ShardReader(folder, manifest)
    return [reader.read(s, n) for s, shard in enumerate(manifest.shards) for n in range(shard.samples)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_images_and_fetches_each_shard_once(
    s3: S3, folder: Path, tmp_path: Path, workers: int
) -> None:
    there = first_batches(data_at("s3://lab/train", tmp_path, workers=workers))
    here = first_batches(data_at(str(folder), tmp_path))
    for a, b in zip(there, here, strict=True):
        assert a["key"] == b["key"]
        assert torch.equal(a["image"], b["image"])
    assert {name: s3.faults.gets[name] for name in sorted(os.listdir(folder)) if name.endswith(".tar")} == {
        f"{n:05}.tar": 1 for n in range(4)
    }


@pytest.mark.parametrize("place", ["http://127.0.0.1:{port}/lab/train", "file://{folder}", "memory://train"])
def test_other_protocols(s3: S3, folder: Path, tmp_path: Path, place: str) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/train/{path.name}", path.read_bytes())
    found = read_all(place.format(port=s3.port, folder=folder), tmp_path)
    assert found == read_all(str(folder), tmp_path)


@pytest.mark.parametrize("place", ["{folder}/", "s3://lab/train/", "pipe:cat '{folder}'/", "pipe:cat {folder}/"])
def test_a_pattern_names_some_shards(folder: Path, tmp_path: Path, place: str) -> None:
    found = read_all(f"{place.format(folder=folder)}0000{{1..2}}.tar", tmp_path)
    assert found == read_all(str(folder), tmp_path)[5:12]


def test_the_hash_is_that_of_the_named_shards(folder: Path, tmp_path: Path) -> None:
    def read(place: str) -> str:
        return manifest_of(shards_at(place, "data.train", ShardCache(tmp_path, 1.0))).hash

    assert read("s3://lab/train") == read(str(folder)) == read_manifest(folder).hash
    some = read(f"{folder}/0000{{1..2}}.tar")
    assert some == read("s3://lab/train/0000{1..2}.tar") != read(str(folder))


@pytest.mark.parametrize(("kind", "times"), [("500", 3), ("cut", 2), ("altered", 2), ("reset", 2), ("slow", 1)])
def test_faults_that_pass(s3: S3, folder: Path, tmp_path: Path, kind: str, times: int) -> None:
    s3.faults.plant(kind, "train/00001.tar", times)
    s3.faults.plant(kind, "train/manifest.json", 1 if kind in ("500", "slow") else 0)
    assert read_all("s3://lab/train", tmp_path) == read_all(str(folder), tmp_path)
    assert s3.faults.gets["00001.tar"] >= times + 1
    assert s3.faults.gets["00000.tar"] == 1
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words", "workers"),
    [
        ("500", "failed 6 times", 0),
        ("500", "failed 6 times", 1),
        ("cut", "failed 6 times", 0),
        ("altered", "failed 6 times", 0),
        ("403", "access to s3://lab/train/00001.tar is refused", 0),
    ],
)
def test_a_shard_that_cannot_be_had_ends_the_run(
    s3: S3, folder: Path, tmp_path: Path, kind: str, words: str, workers: int
) -> None:
    s3.faults.plant(kind, "train/00001.tar", 1000)
    data = data_at("s3://lab/train", tmp_path, workers=workers)
    with pytest.raises(InputError) as caught:
        first_batches(data)
    sentence = str(caught.value)
    assert words in sentence
    assert "s3://lab/train/00001.tar" in sentence
    assert sentence.startswith("data.train")
    assert "Traceback" not in sentence
    if kind == "403":
        assert s3.faults.gets["00001.tar"] == 1  # no other try


@pytest.mark.slow
def test_faults_of_the_place(s3: S3, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, words in {
        "s3://lab/nothing": "data.train=s3://lab/nothing has no manifest.json beside its shards; write it with",
        "s3://no-such-bucket/train": "has no manifest.json",
        "s3://lab/train/0000{3..5}.tar": "names 00004.tar and 1 more, which the manifest.json beside it does not list",
        f"{folder}/0000{{3..5}}.tar": "names 00004.tar and 1 more",
        f"{folder}/0000{{3..5.tar": "is no brace pattern",
        "nonsense://lab/train": "cannot be used",
        "pipe:cat file": "names 0 shards",
        "pipe:cat /does/not/exist/{0..3}.tar 2>/dev/null": "failed 6 times",
        f"http://127.0.0.1:{s3.port}/lab/nothing": "has no manifest.json",
    }.items():
        with pytest.raises(InputError, match=r"data.train") as caught:
            data_at(place, tmp_path).train_dataset()
        assert words in str(caught.value), str(caught.value)
    shards._FETCHED.clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3.faults.gets.clear()
    with pytest.raises(InputError, match=r"access to s3://lab/train/manifest.json is refused"):
        data_at("s3://lab/train", tmp_path).train_dataset()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert not s3.faults.gets


def test_a_missing_package_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"needs gcsfs .* run `pip install gcsfs`"):
        data_at("gs://lab/train", tmp_path).train_dataset()


def test_a_pass_over_all_shards_ends_at_a_lost_one(s3: S3, folder: Path, tmp_path: Path) -> None:
    s3.faults.plant("403", "train/00002.tar", 1000)
    with pytest.raises(InputError, match=r"access to s3://lab/train/00002.tar is refused"):
        data_at("s3://lab/train", tmp_path, balance="category").train_dataset()
    s3.faults.planted.clear()
    there = data_at("s3://lab/train", tmp_path, balance="category")
    here = data_at(str(folder), tmp_path, balance="category")
    assert [b["key"] for b in first_batches(there)] == [b["key"] for b in first_batches(here)]


def test_a_damaged_manifest_is_named_by_its_address(s3: S3, folder: Path, tmp_path: Path) -> None:
    s3.client.put_object(Bucket="lab", Key="damaged/manifest.json", Body=b"{}")
    with pytest.raises(InputError, match=r"s3://lab/damaged/manifest.json has format_version=None"):
        data_at("s3://lab/damaged", tmp_path).train_dataset()


def test_sizes_are_compared_at_the_start(s3: S3, folder: Path, tmp_path: Path) -> None:
    s3.upload(folder, "short")
    s3.client.put_object(Bucket="lab", Key="short/00003.tar", Body=b"short")
    with pytest.raises(InputError, match=r"shard s3://lab/short/00003.tar has 5 bytes"):
        data_at("s3://lab/short", tmp_path).train_dataset()
    s3.client.delete_object(Bucket="lab", Key="short/00003.tar")
    with pytest.raises(InputError, match=r"shard s3://lab/short/00003.tar is missing"):
        data_at("s3://lab/short", tmp_path).train_dataset()


def test_another_shard_of_the_same_size_is_refused(s3: S3, folder: Path, tmp_path: Path) -> None:
    s3.upload(folder, "other")
    content = (folder / "00001.tar").read_bytes()
    s3.client.put_object(Bucket="lab", Key="other/00001.tar", Body=content.replace(b"image", b"imago"))
    with pytest.raises(InputError, match=r"6 times .*what arrived has another checksum than its manifest records"):
        read_all("s3://lab/other", tmp_path)


def test_the_cache_keeps_its_limit_and_what_was_read_last(s3: S3, folder: Path, tmp_path: Path) -> None:
    sizes = {shard.name: shard.bytes for shard in read_manifest(folder).shards}
    limit = (max(sizes.values()) + sorted(sizes.values())[-2] + 100) / 2**30  # two shards
    store = shards_at("s3://lab/train", "data.train", ShardCache(tmp_path / "cache", limit))
    assert isinstance(store, Store)
    shards = manifest_of(store).shards
    for number, shard in enumerate(shards):
        with store.opened(shard.name, shard.bytes, shard.sha256) as file:
            assert len(file.read()) == shard.bytes
        path = tmp_path / "cache" / f"{shard.sha256}.tar"
        os.utime(path, (number, number))
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= limit * 2**30
    kept = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
    assert kept == {shards[2].sha256, shards[3].sha256}
    with store.opened(shards[2].name, shards[2].bytes, shards[2].sha256) as file:  # in use: the other one goes
        os.utime(tmp_path / "cache" / f"{shards[2].sha256}.tar", (0, 0))
        store.fetch_ahead(shards[0].name, shards[0].bytes, shards[0].sha256)
        assert {path.stem for path in (tmp_path / "cache").glob("*.tar")} == {shards[2].sha256, shards[0].sha256}
        with store.opened(shards[0].name, shards[0].bytes, shards[0].sha256):  # now no room can be made
            store.fetch_ahead(shards[1].name, shards[1].bytes, shards[1].sha256)
        assert not (tmp_path / "cache" / f"{shards[1].sha256}.tar").exists()
        assert len(file.read()) == shards[2].bytes


def test_one_of_several_readers_fetches(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = shards_at("s3://lab/train", "data.train", ShardCache(tmp_path / "cache", 1.0))
    assert isinstance(store, Store)
    shard = manifest_of(store).shards[0]
    found: list[int] = []

    def read() -> None:
        with store.opened(shard.name, shard.bytes, shard.sha256) as file:
            found.append(len(file.read()))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [shard.bytes] * 6
    assert s3.faults.gets[shard.name] == 1


def test_what_a_killed_process_left_takes_no_room(s3: S3, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    left = tmp_path / "cache" / f"{'0' * 64}.{2**40}.part"
    left.write_bytes(b"half")
    assert read_all("s3://lab/train", tmp_path) == read_all(str(folder), tmp_path)
    assert not left.exists()


def test_a_limit_below_the_windows_is_refused(folder: Path, tmp_path: Path) -> None:
    below = (sum(shard.bytes for shard in read_manifest(folder).shards) - 10) / 2**30
    with pytest.raises(InputError, match=r"data.shard_cache_gib=.*: the shards that data.train=s3://lab/train is"):
        data_at("s3://lab/train", tmp_path, shard_cache_gib=below).train_dataset()
    with pytest.raises(InputError, match="is less than a shard"):
        data_at("s3://lab/train", tmp_path / "other", shard_cache_gib=1e-6).val_dataset()


def test_the_next_window_is_fetched_ahead(s3: S3, folder: Path, tmp_path: Path) -> None:
    data = data_at("s3://lab/train", tmp_path, workers=1)
    loader = iter(data.train_loader(1))
    next(loader)
    for _ in range(100):
        if all(s3.faults.gets[f"{n:05}.tar"] for n in range(4)):
            return
        threading.Event().wait(0.1)
    raise AssertionError(f"only {s3.faults.gets} were fetched")


def test_a_command_of_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instantiate, "_TYPED", set())
    node = {"_target_": "ldmlab.data.shard_data.ShardData", "val": "v", "image_size": 8}
    for place in ("pipe:touch /tmp/x.tar", "simplecache::s3://lab/train"):
        with pytest.raises(InputError, match="could run any command; a file may not give it"):
            instantiate.instantiate({**node, "train": place}, where="data")


def test_latents_name_a_folder(tmp_path: Path) -> None:
    data = replace(data_at("x", tmp_path), latents="s3://lab/latents/{0..3}.tar")
    with pytest.raises(InputError, match=r"data.latents=.* names shards; give the folder"):
        data.folder("train")
    assert str(replace(data, latents="s3://lab/latents").folder("val")) == "s3://lab/latents/val"
