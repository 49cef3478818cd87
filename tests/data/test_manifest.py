"""manifest.json: round trip, refusals in one sentence, checks of the shards it lists."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_maker import write_shards

from ldmlab.data.manifest import Manifest, check_shards, file_sha256, read_manifest, write_manifest
from ldmlab.data.output_folder import finished_shard
from ldmlab.data.shard_info import ShardInfo
from ldmlab.data.shards import ShardReader
from ldmlab.errors import InputError
from ldmlab.files import write_json


def _manifest(folder: Path) -> Manifest:
    (folder / "a.tar").write_bytes(bytes(4096))
    info = ShardInfo.of("a.tar", 4096, file_sha256(folder / "a.tar"), [0, 1536], [7, 8])
    return Manifest("images", "train", [info], ["caption"], 64, {"rule": "adm"}, "наши", "MIT", {"commit": "x"})


def test_round_trip(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.total == 2
    assert manifest.shards[0].byte_range(0) == (0, 1536)
    assert manifest.shards[0].byte_range(1) == (1536, 4096)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_hash_is_of_the_content_only(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    assert replace(manifest, provenance={"commit": "y"}).hash == manifest.hash
    assert replace(manifest, licence="other").hash != manifest.hash


def test_missing_manifest_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ldmlab pack"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        read_manifest(tmp_path / "none")
    manifest = _manifest(tmp_path)
    with pytest.raises(InputError, match="ldmlab index"):
        read_manifest(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="interrupted"):
        read_manifest(tmp_path)
    (tmp_path / "up" / "val").mkdir(parents=True)
    write_manifest(tmp_path / "up" / "val", manifest)
    with pytest.raises(InputError, match="folders val have"):
        read_manifest(tmp_path / "up")


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 99}', '{"format_version": 1, "shards": [{}]}'])
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, replace(_manifest(tmp_path), licence="\U0001f600"))
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content))  # a pair of escapes is one character
    assert read_manifest(tmp_path).licence == "\U0001f600"
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"licence": "\ud83d"}))
    with pytest.raises(InputError, match=r"manifest\.json is not a manifest of ours .*surrogates"):
        read_manifest(tmp_path)


def test_unknown_field_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest(tmp_path))
    content = json.loads((tmp_path / "manifest.json").read_text()) | {"surprise": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="surprise"):
        read_manifest(tmp_path)


def test_check_shards(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    check_shards(tmp_path, manifest, sha256=True)
    (tmp_path / "a.tar").write_bytes(bytes(4095) + b"x")
    check_shards(tmp_path, manifest)
    with pytest.raises(InputError, match="checksum"):
        check_shards(tmp_path, manifest, sha256=True)
    (tmp_path / "a.tar").write_bytes(bytes(100))
    with pytest.raises(InputError, match="shorter than its manifest records"):
        check_shards(tmp_path, manifest)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(InputError, match="missing"):
        check_shards(tmp_path, manifest)


@pytest.mark.parametrize("name", ["\ud83d", "a\udfff.tar", "\ud83d.tar", "a/b.tar", "..", "", "x\0.tar", "x" * 300])
def test_shard_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, _manifest(tmp_path))
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not a manifest of ours"):
        read_manifest(tmp_path)


def _row(blocks: list[int]) -> bytes:
    return np.array([[block, 7] for block in blocks], "<u4").tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_row([0]), "has 8 bytes, not the 16 of its manifest's samples"),
        (_row([0, 3, 4]), "has 24 bytes"),
        (_row([0, 2]), "another checksum than its manifest records"),
        (_row([3, 0]), "offsets of shard a.tar do not rise from 0 to its 4096 bytes"),
        (_row([0, 0]), "do not rise"),
        (_row([0, 8]), "do not rise"),
        (_row([0, 2**32 - 1]), "do not rise"),
        (None, "is missing although its manifest lists it"),
    ],
)
def test_places_that_are_not_those_of_the_manifest(tmp_path: Path, content: bytes | None, message: str) -> None:
    write_manifest(tmp_path, _manifest(tmp_path))
    path = tmp_path / "manifest.places"
    assert path.read_bytes() == np.array([[0, 7], [3, 8]], "<u4").tobytes()
    ShardReader(tmp_path, read_manifest(tmp_path))
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=rf"manifest\.places .*{message}.*again") as caught:
        ShardReader(tmp_path, read_manifest(tmp_path))
    assert str(caught.value).count(";") == 1  # the way out once


def test_wrong_places_with_the_right_checksum_are_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest(tmp_path))
    (tmp_path / "manifest.places").write_bytes(_row([3, 0]))
    manifest = replace(read_manifest(tmp_path), places_sha256=file_sha256(tmp_path / "manifest.places"))
    with pytest.raises(InputError, match="do not rise"):
        ShardReader(tmp_path, manifest)


def test_places_are_mapped_by_every_process(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 500])
    reader = ShardReader(tmp_path, read_manifest(tmp_path))
    content = pickle.dumps(reader)
    assert len(content) < 1500  # not 8 bytes a sample
    again = pickle.loads(content)
    assert again.read(1, 499) == reader.read(1, 499)
    assert again.read(1, 499)[0] == "00502"
    assert not again._places.flags.owndata


def test_reading_a_manifest_and_its_hash_touch_no_places(tmp_path: Path) -> None:
    made = write_shards(tmp_path, [3, 2])
    (tmp_path / "manifest.places").unlink()
    assert read_manifest(tmp_path).hash == made.hash


def test_an_interrupted_pack_of_format_2_goes_on(tmp_path: Path) -> None:
    info = _manifest(tmp_path).shards[0]
    row = {"name": "a.tar", "samples": 2, "bytes": 4096, "sha256": info.sha256, "offsets": [0, 1536]}
    write_json(tmp_path / "a.tar.json", {"info": row | {"crc32c": "0000000700000008"}})
    found = finished_shard(tmp_path / "a.tar.json", tmp_path / "a.tar", lambda side: side["info"])
    assert found == info
    assert np.array_equal(found.places, info.places)
    write_json(tmp_path / "a.tar.json", {"info": row | {"crc32c": "7"}})
    assert finished_shard(tmp_path / "a.tar.json", tmp_path / "a.tar", lambda side: side["info"]) is None


def test_a_shard_too_long_for_its_places(tmp_path: Path) -> None:
    ShardInfo.of("a.tar", 2**41, "0" * 64, [0, 2**41 - 512], [7, 8])
    with pytest.raises(ValueError, match="more than the 2199023255552 of the longest"):
        ShardInfo.of("a.tar", 2**41 + 512, "0" * 64, [0, 2**41], [7, 8])
