"""`pack`, `index` and `encode` to an address: complete before the manifest lies there, nothing sent twice."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_maker import toy_image, write_shards

from ldmlab.app.cli import dispatch
from ldmlab.data import shards
from ldmlab.data.output_folder import Destination
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from s3_server import S3, running_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(autouse=True)
def _own_cache(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_SHARDS", str(tmp_path / "shards"))
    shards._FETCHED.clear()
    s3.faults.planted.clear()
    s3.faults.puts.clear()


def images(folder: Path, count: int = 6) -> Path:
    """A folder of images with captions."""
    folder.mkdir()
    for number in range(count):
        toy_image(number, 8).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    return folder


def pack(source: Path, out: str) -> None:
    dispatch(["pack", str(source), out, "--size", "8", "--val", "0.4", "--shard-size", "2", "--workers", "1"])


@pytest.mark.slow
def test_pack_sends_what_it_writes_and_nothing_twice(s3: S3, tmp_path: Path) -> None:
    source = images(tmp_path / "in")
    pack(source, str(tmp_path / "out"))
    s3.faults.plant("500", "packed/train/train-000001.tar", 2)
    s3.faults.plant("500 PUT", "packed/train/train-000000.tar", 2)
    pack(source, "s3://lab/packed")
    for split in ("train", "val"):
        here, there = tmp_path / "out" / split, f"s3://lab/packed/{split}"
        assert s3.names(f"packed/{split}") == {path.name for path in here.iterdir()}
        data = ShardData(there, there, image_size=8, workers=0)
        assert data.manifest().hash == ShardData(str(here), str(here), image_size=8).manifest().hash
        assert [batch["key"] for batch in data.eval_loader("val", 4)]
    sent = s3.faults.puts.copy()
    assert sent["train-000000.tar"] == 3  # two that failed and one
    pack(source, "s3://lab/packed")
    assert s3.faults.puts == sent
    s3.client.delete_object(Bucket="lab", Key="packed/train/train-000001.tar")
    pack(source, "s3://lab/packed")
    assert s3.faults.puts == sent + type(sent)({"train-000001.tar": 1})


def test_an_interrupted_sending_continues_and_the_manifest_comes_last(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images(tmp_path / "in")
    s3.faults.plant("500 PUT", "halfway/val/val-000000.tar", 1000)
    with pytest.raises(InputError, match=r"OUT: s3://lab/halfway/val/val-000000.tar failed 6 times"):
        pack(source, "s3://lab/halfway")
    there = s3.names("halfway")
    assert "train/train-000001.tar" in there
    assert not [name for name in there if name.endswith("manifest.json")]
    s3.faults.planted.clear()
    pack(source, "s3://lab/halfway")
    assert {"train/manifest.json", "val/manifest.json", "val/val-000000.tar"} <= s3.names("halfway")


def test_what_was_not_sent_from_here_is_kept(s3: S3, tmp_path: Path) -> None:
    s3.client.put_object(Bucket="lab", Key="mine/train/notes.txt", Body=b"mine")
    with pytest.raises(InputError, match=r"OUT=s3://lab/mine holds something else \(train/notes.txt\)"):
        pack(images(tmp_path / "in"), "s3://lab/mine")
    pack(tmp_path / "in", "s3://lab/changed")
    s3.client.put_object(Bucket="lab", Key="changed/train/train-000000.tar", Body=b"another")
    with pytest.raises(InputError, match=r"OUT=s3://lab/changed holds something else \(train/train-000000.tar\)"):
        pack(tmp_path / "in", "s3://lab/changed")
    assert not list((tmp_path / "shards" / "outgoing").glob("*/mine"))


@pytest.mark.parametrize("out", ["https://host/out", "pipe:cat > x.tar", "s3://lab/{a,b}"])
def test_places_that_take_no_files(out: str) -> None:
    with pytest.raises(InputError, match="nothing can be written there"):
        Destination.of(out)


def test_a_missing_bucket_is_not_made(s3: S3, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"OUT: s3://nowhere/out/.* does not exist"):
        pack(images(tmp_path / "in"), "s3://nowhere/out")
    assert [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]] == ["lab"]


@pytest.mark.parametrize("place", ["s3://lab/foreign", "s3://lab/foreign/0000{0..1}.tar", "file://FOLDER"])
def test_index_writes_the_manifest_beside_the_tars(s3: S3, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "foreign"
    write_shards(folder, [3, 2])
    expected = json.loads((folder / "manifest.json").read_text())
    for path in folder.glob("manifest.*"):
        path.unlink()
    for name in s3.names("foreign"):
        s3.client.delete_object(Bucket="lab", Key=f"foreign/{name}")
    s3.upload(folder, "foreign")
    place = place.replace("FOLDER", str(folder))
    dispatch(["index", place, "--workers", "1"])
    at = place.partition("/0000{")[0]
    found = ShardData(at, at, image_size=8).manifest()
    assert [shard.samples for shard in found.shards] == [3, 2]
    assert [shard.sha256 for shard in found.shards] == [shard["sha256"] for shard in expected["shards"]]
    assert found.source == "foreign"


def test_index_names_a_cut_tar_by_its_address(s3: S3, tmp_path: Path) -> None:
    write_shards(tmp_path / "cut", [3])
    content = (tmp_path / "cut" / "00000.tar").read_bytes()
    s3.client.put_object(Bucket="lab", Key="cut/00000.tar", Body=content[:-1024])
    with pytest.raises(InputError, match=r"shard s3://lab/cut/00000.tar is cut off"):
        dispatch(["index", "s3://lab/cut", "--workers", "1"])
    with pytest.raises(InputError, match=r"TARS: s3://lab/empty does not exist"):
        dispatch(["index", "s3://lab/empty"])
    assert "manifest.json" not in s3.names("cut")
