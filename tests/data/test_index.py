"""Tars made by others: read as they are, faults named before anything is written."""

import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldmlab.app.cli import dispatch
from ldmlab.data.decode import sample_fields
from ldmlab.data.index_tars import index_tars
from ldmlab.data.manifest import Manifest, check_shards, read_manifest, write_manifest
from ldmlab.data.tars import read_range, scan_tar
from ldmlab.errors import InputError


def index(tars: list[Path], **options: Any) -> Manifest:
    return index_tars(tars, **options).manifest


def _jpeg(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "JPEG")
    return file.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _img2dataset(path: Path, count: int, side: int = 8) -> Path:
    members = []
    for number in range(count):
        key = f"{path.stem}{number:04d}"
        members += [
            (f"{key}.jpg", _jpeg(side)),
            (f"{key}.json", b'{"url": "u", "caption": "\xc3\xa9"}'),
            (f"{key}.txt", b"x"),
        ]
    return _tar(path, members)


def test_offsets_find_every_sample(tmp_path: Path) -> None:
    for name, count in (("00000", 5), ("00001", 3)):
        _img2dataset(tmp_path / f"{name}.tar", count)
    manifest = index([tmp_path], split="val", licence="unknown", workers=2)
    assert manifest.hash == read_manifest(tmp_path).hash
    assert (manifest.total, manifest.image_size, manifest.fields) == (8, 8, ["url", "caption"])
    check_shards(tmp_path, manifest, sha256=True)
    keys = []
    for shard in manifest.shards:
        for number in range(shard.samples):
            key, sample = read_range(tmp_path / shard.name, *shard.byte_range(number))
            keys.append(key)
            assert sample["jpg"] == _jpeg()
            assert sample_fields(sample)["caption"] == "é"
    assert keys == [f"00000{n:04d}" for n in range(5)] + [f"00001{n:04d}" for n in range(3)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_folders_long_names_and_other_languages(tmp_path: Path, format: int) -> None:
    long = "folder/" + "k" * (90 if format == tarfile.USTAR_FORMAT else 150)
    names = [f"{long}.jpg", f"{long}.seg.png", f"{long}.cls", "über/тыква.JPG", "über/тыква.txt"]
    contents = [_jpeg(), b"map", b"7", _jpeg(), "тыква".encode()]
    path = _tar(tmp_path / "a.tar", [("__meta__/x.json", b"{}"), *zip(names, contents, strict=True)], format)
    info, keys = scan_tar(path)
    assert keys == [long, "über/тыква"]
    (key, first), (other, second) = (read_range(path, *info.byte_range(number)) for number in range(2))
    assert (key, first["seg.png"], sample_fields(first)) == (long, b"map", {"class_id": 7})
    assert (other, sample_fields(second)) == ("über/тыква", {"caption": "тыква"})


def test_images_of_several_sizes_have_no_size(tmp_path: Path) -> None:
    _img2dataset(tmp_path / "a.tar", 1, side=8)
    _img2dataset(tmp_path / "b.tar", 1, side=9)
    assert index([tmp_path / "a.tar", tmp_path / "b.tar"]).image_size is None
    assert index([tmp_path / "a.tar"]).image_size == 8


@pytest.mark.parametrize("keep", [0.35, 0.9, 1.0])
def test_truncated_tars_are_named(tmp_path: Path, keep: float) -> None:
    path = _img2dataset(tmp_path / "00007.tar", 40)
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"00007\.tar"):
        index([path])
    assert not (tmp_path / "manifest.json").exists()


def test_other_faults_are_named(tmp_path: Path) -> None:
    apart = _tar(tmp_path / "apart/a.tar", [("1.jpg", _jpeg()), ("2.jpg", _jpeg()), ("1.txt", b"x")])
    with pytest.raises(InputError, match="key 1 are not next to each other"):
        index([apart])
    bare = _tar(tmp_path / "bare/a.tar", [("1.txt", b"x")])
    with pytest.raises(InputError, match="holds no images"):
        index([bare])
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.tar").write_text("hello" * 1000)
    with pytest.raises(InputError, match=r"a\.tar"):
        index([tmp_path / "text/a.tar"])
    (tmp_path / "text/a.tar").write_bytes(gzip.compress(apart.read_bytes()))
    with pytest.raises(InputError, match="compressed"):
        index([tmp_path / "text/a.tar"])
    broken = _tar(tmp_path / "json/a.tar", [("1.jpg", _jpeg()), ("1.json", b"{")])
    found = index_tars([broken])  # the sample is skipped while reading, and named now
    assert found.manifest.total == 1
    assert [name for name, _ in found.bad] == ["a.tar: 1"]
    assert json.loads((tmp_path / "json/bad.json").read_text())[0]["name"] == "a.tar: 1"
    with pytest.raises(InputError, match="several folders"):
        index([apart, bare])
    with pytest.raises(InputError, match="does not exist"):
        index([tmp_path / "none.tar"])
    with pytest.raises(InputError, match=r"there is no \.tar"):
        index([tmp_path])


def test_all_broken_tars_are_counted(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.tar").write_bytes(b"x" * 600)
    with pytest.raises(InputError, match=r"a\.tar.*\(and 2 more\)"):
        index([tmp_path])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _img2dataset(tmp_path / "in/00000.tar", 2)
    dispatch(["index", str(tmp_path / "in"), "--workers", "1", "--licence", "CC BY 4.0"])
    assert "2 samples, 1 shards" in " ".join(capsys.readouterr().err.split())
    manifest = read_manifest(tmp_path / "in")
    assert (manifest.source, manifest.licence) == ("in", "CC BY 4.0")


_INTERNAL = ("__url__", "__local_path__")


def test_webdataset_finds_the_same_samples(tmp_path: Path) -> None:
    """Another reader of the format, on names and tar formats of all sorts."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        long = "folder/" * 12 + "name" * 6
        with tarfile.open(path, "w", format=kind) as made:
            for name in ("a.jpg", "a.json", "./b.seg.png", "./b.JPG", f"{long}.jpg", f"{long}.txt", "тыква/1.png"):
                info = tarfile.TarInfo(name)
                info.size = len(name)
                made.addfile(info, io.BytesIO(name.encode()[: info.size]))
        with open(path, "rb") as file:
            files = [{**one, "__url__": "here"} for one in tar_file_iterator(file)]
        theirs = [{k: v for k, v in one.items() if k not in _INTERNAL} for one in group_by_keys(files)]
        info, _ = scan_tar(path)
        ours = [read_range(path, *info.byte_range(number)) for number in range(info.samples)]
        assert [{"__key__": key, **files} for key, files in ours] == theirs


def test_the_manifest_of_packed_shards_is_kept(tmp_path: Path) -> None:
    _img2dataset(tmp_path / "shard.tar", 2)
    manifest = index([tmp_path])
    index([tmp_path])  # again, perhaps with more tars
    write_manifest(tmp_path, replace(manifest, transform={"size": 8}))
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="has the manifest that it was written with"):
        index([tmp_path])
    assert (tmp_path / "manifest.json").read_bytes() == before
