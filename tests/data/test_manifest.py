"""manifest.json: round trip, refusals in one sentence, checks of the shards it lists."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ldmlab.data.manifest import Manifest, ShardInfo, check_shards, file_sha256, read_manifest, write_manifest
from ldmlab.errors import InputError


def _manifest(folder: Path) -> Manifest:
    (folder / "a.tar").write_bytes(bytes(4096))
    info = ShardInfo("a.tar", 2, 4096, file_sha256(folder / "a.tar"), [0, 1536])
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
