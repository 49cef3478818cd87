"""Faults of single samples: each is skipped, counted and named, never a traceback, a hang or a program that runs."""

import io
import json
import os
import shutil
import stat
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_maker import stored_samples, webp

from ldmlab.data.annotation_files import read_annotations, read_classes
from ldmlab.data.decode import (
    BAD_SAMPLE,
    checked_fields,
    clean_fields,
    decode_image,
    decode_moments,
    required_fields,
    sample_fields,
)
from ldmlab.data.image_sources import list_source
from ldmlab.data.index_tars import index_tars
from ldmlab.data.manifest import Manifest, read_manifest, write_manifest
from ldmlab.data.pack_shards import PackOptions, PackResult, pack
from ldmlab.data.shard_data import ShardData
from ldmlab.data.shards import ShardReader
from ldmlab.data.tars import END_MARKER, parse_sample, scan_tar, tar_bytes
from ldmlab.data.transforms import Transform
from ldmlab.errors import InputError
from ldmlab.inference.inputs import boxes_of
from ldmlab.interop.diffusers import diffusers_config
from ldmlab.open_image import open_image
from ldmlab.report.metrics_json import read_record

FORMAT_2 = Path(__file__).parents[1] / "assets/format2/train"  # made with the code of that format
HALF = "\ud83d"  # of a surrogate pair


def png(size: int = 8) -> bytes:
    file = io.BytesIO()
    open_image(webp(1, size)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def tar(path: Path, samples: list[dict[str, bytes]], tail: bytes = END_MARKER) -> Path:
    """A tar of samples 00000, 00001, ... from their files by ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [tar_bytes(f"{number:05}.{e}", c) for number, files in enumerate(samples) for e, c in files.items()]
    path.write_bytes(b"".join(members) + tail)
    return path


def with_fields(*fields: Any) -> list[dict[str, bytes]]:
    return [{"json": f if isinstance(f, bytes) else json.dumps(f).encode(), "webp": webp(0, 8)} for f in fields]


def data(folder: Path, **options: Any) -> ShardData:
    return ShardData(str(folder), str(folder), image_size=8, workers=0, **options)


def packed(source: Path, out: Path, **options: Any) -> PackResult:
    return pack(list_source(source), out, PackOptions(Transform(8)), workers=1, max_bad=1.0, **options)


FIELDS: list[tuple[Any, dict[str, Any] | None]] = [  # KEY.json => caption and class_id as used; None: a bad sample
    ({"caption": "a cat", "class_id": 1}, {"caption": "a cat", "class_id": 1}),
    ({"caption": ["a", "b"], "class_id": 2.0}, {"caption": "a", "class_id": 2}),
    ({"caption": [None, "b"], "class_id": "2"}, {"caption": "b", "class_id": 2}),
    ({"caption": 7, "class_id": 0}, {"caption": "7", "class_id": 0}),
    ({"caption": 1.5, "class_id": 0}, {"caption": "1.5", "class_id": 0}),
    ({"caption": f"x{HALF}y", "class_id": 0}, {"caption": "x\ufffdy", "class_id": 0}),
    ({"caption": "\U0001f600", "class_id": 0}, {"caption": "\U0001f600", "class_id": 0}),
    ({"caption": None, "class_id": 1}, None),
    ({"caption": float("nan"), "class_id": 1}, None),
    ({"caption": [], "class_id": 1}, None),
    ({"caption": [None], "class_id": 1}, None),
    ({"caption": {"en": "a"}, "class_id": 1}, None),
    ({"caption": True, "class_id": 1}, None),
    ({"caption": [["a"]], "class_id": 1}, None),
    *(
        ({"caption": "a", "class_id": value}, None)
        for value in (None, float("nan"), float("inf"), 1.5, "c1", "", "-1", 1e30, 10**30, -1, True, [1], {}, 3)
    ),
    (b"{", None),
    (b"[]", None),
    (b'{"caption": "\xff"}', None),
    (b"[" * 200_000, None),
    (b'{"caption": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", None),
    (b'{"caption": "a", "class_id": ' + b"9" * 5_000 + b"}", None),
]


@pytest.mark.parametrize(("content", "used"), FIELDS, ids=lambda value: str(value)[:40])
def test_one_rule_for_fields(content: Any, used: dict[str, Any] | None) -> None:
    files = with_fields(content)[0]
    if used is None:
        with pytest.raises(BAD_SAMPLE):
            required_fields(files, ("caption", "class_id"), classes=3)
    else:
        assert required_fields(files, ("caption", "class_id"), classes=3) == used


def test_loader_index_and_pack_agree_on_fields(tmp_path: Path) -> None:
    limited = [(c, u) for c, u in FIELDS if not (isinstance(c, dict) and c["class_id"] == 3)]  # no class is named here
    good = [{"caption": "fine", "class_id": 1}] * len(limited)
    path = tar(tmp_path / "in/a.tar", with_fields(*good, *(content for content, _ in limited)))
    bad = [len(good) + number for number, (_, used) in enumerate(limited) if used is None]
    found = index_tars([path])
    indexed = [int(name.rpartition(" ")[2]) for name, _ in found.bad]
    result = packed(tmp_path / "in", tmp_path / "out")
    left_out = [int(name.rpartition("/")[2]) for name, _ in result.bad]
    reading = data(tmp_path / "in", fields=("caption", "class_id"))
    batches = list(reading.eval_loader("val", 8))
    skipped = [int(name.split("[")[1].split("]")[0]) for name in reading.skipped("val").names]
    assert sorted(skipped) == indexed == left_out == bad
    assert "nan" not in {caption for batch in batches for caption in batch["caption"]}
    again = data(tmp_path / "out/train", fields=("caption", "class_id"))
    assert sum(len(batch["key"]) for batch in again.eval_loader("val", 8)) == 2 * len(good) - len(bad)


def test_all_captions_of_a_list_are_kept(tmp_path: Path) -> None:
    tar(tmp_path / "in/a.tar", with_fields({"caption": ["a", "b"]}))
    packed(tmp_path / "in", tmp_path / "out")
    (sample,) = stored_samples(tmp_path / "out/train").values()
    assert {k: v for k, v in json.loads(sample["json"]).items() if k.startswith("caption")} == {
        "caption": "a",
        "captions": ["a", "b"],
    }


@pytest.mark.parametrize("lacking", [range(0, 10, 2), range(1, 10, 2)], ids=["first one too", "first one has it"])
def test_a_field_that_some_lack(tmp_path: Path, lacking: range) -> None:
    fields = [{} if number in lacking else {"caption": str(number)} for number in range(10)]
    index_tars([tar(tmp_path / "a.tar", with_fields(*fields))])
    reading = data(tmp_path)
    batches = list(reading.eval_loader("val", 4))
    assert [caption for batch in batches for caption in batch["caption"]] == [
        str(n) for n in range(10) if n not in lacking
    ]
    assert reading.skipped("val").count == 5
    assert "no field caption" in reading.skipped("val").names[0]


def test_a_field_that_most_lack_is_one_sentence(tmp_path: Path) -> None:
    fields = [{"caption": "first"}, *[{"caption": None}] * 9]
    index_tars([tar(tmp_path / "a.tar", with_fields(*fields))])
    with pytest.raises(InputError, match=r"data.fields=\['caption'\]: 9 of 10 samples of data.val=.* no field caption"):
        data(tmp_path).val_dataset()
    index_tars([tar(tmp_path / "a.tar", with_fields(*[{"class_id": 9}] * 10))])
    with pytest.raises(InputError, match=r"data.fields=\['class_id'\]: 10 of 10 samples of data.train=.*class_id '9'"):
        data(tmp_path, fields=("class_id",), classes=5).train_dataset()


BOXES: list[Any] = [
    None,
    "x",
    7,
    [7],
    [{}],
    [{"class_id": 1}],
    [{"class_id": 1, "box": [0, 0, 1]}],
    [{"class_id": 1, "box": [0, 0, float("nan"), 1]}],
    [{"class_id": 1, "box": [0, 0, 1e400, 1]}],
    [{"class_id": 1, "box": [0, 0, True, 1]}],
    [{"class_id": 1, "box": ["0", 0, 1, 1]}],
    [{"class_id": 1.5, "box": [0, 0, 1, 1]}],
    [{"class_id": "c1", "box": [0, 0, 1, 1]}],
    [{"class_id": None, "box": [0, 0, 1, 1]}],
    [{"class_id": -1, "box": [0, 0, 1, 1]}],
]


@pytest.mark.parametrize("boxes", BOXES, ids=str)
def test_boxes_of_the_wrong_type(boxes: Any) -> None:
    with pytest.raises(BAD_SAMPLE):
        required_fields(with_fields({"boxes": boxes})[0], ("boxes",))


def test_class_of_a_box_is_made_whole() -> None:
    found = checked_fields({"boxes": [{"class_id": "3", "box": [0, 0, 1, 1]}, {"class_id": 2.0, "box": [0, 0, 1, 1]}]})
    assert [box["class_id"] for box in found["boxes"]] == [3, 2]


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def test_every_flip_in_a_npy_header_is_a_bad_sample() -> None:
    content = npy(np.ones((2, 8, 4, 4), np.float16))
    assert decode_moments({"npy": content}, 1, (8, 4, 4)).shape == (8, 4, 4)
    for bit in range(1024):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BAD_SAMPLE):
            decode_moments({"npy": bytes(flipped)}, 1, (8, 4, 4))


@pytest.mark.parametrize(
    "values",
    [
        np.full((2, 8, 4, 4), np.nan, np.float16),
        np.full((2, 8, 4, 4), np.inf, np.float16),
        np.ones((2, 4, 4, 4), np.float16),
        np.ones((2, 8, 8, 4), np.float16),
        np.ones((1, 8, 4, 4), np.float16),
        np.ones((2, 8, 16), np.float16),
        np.ones((2, 8, 4, 4), np.int16),
        np.ones((2, 8, 4, 4), ">f2"),
        np.ones((2, 8, 4, 4), np.complex64),
        np.asfortranarray(np.ones((2, 8, 4, 4), np.float16)),
        np.ones((0, 8, 4, 4), np.float16),
    ],
    ids=lambda v: f"{v.dtype}{v.shape}",
)
def test_moments_that_cannot_be_used(values: Any) -> None:
    with pytest.raises(BAD_SAMPLE):
        decode_moments({"npy": npy(values)}, 1, (8, 4, 4))


def test_moments_that_end_early_or_hold_objects() -> None:
    whole = npy(np.ones((2, 8, 4, 4), np.float16))
    for content in (b"", whole[:5], whole[:100], whole[:-1], whole + b"x", b"\x80\x04."):
        with pytest.raises(BAD_SAMPLE):
            decode_moments({"npy": content}, 0, (8, 4, 4))


def test_a_flipped_byte_is_a_bad_sample_by_default(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", with_fields(*({"caption": f"number {n}"} for n in range(6))))
    index_tars([path])
    content = bytearray(path.read_bytes())
    content[content.index(b"number 3") + 7] ^= 1  # number 2, a caption like any other
    path.write_bytes(content)
    reading = data(tmp_path)
    captions = [caption for batch in reading.eval_loader("val", 4) for caption in batch["caption"]]
    assert captions == [f"number {n}" for n in range(6) if n != 3]
    assert reading.skipped("val").names == ["a.tar[3]: OSError: its bytes differ from the manifest's checksum"]
    taken = [next(iter(reading.train_loader(micro_batch=6)))]
    assert "a.tar[3]" in " ".join(taken[0]["skipped"])


def test_manifests_of_format_1_read_without_checksums(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_2, tmp_path, dirs_exist_ok=True)
    now = read_manifest(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    for shard in content["shards"]:
        del shard["crc32c"]
    content |= {"format_version": 1, "picture_size": content.pop("image_size")}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    then = read_manifest(tmp_path)
    assert (then.image_size, then.shards[0].summed, then.hash) == (8, False, now.hash)
    assert len(data(tmp_path).val_dataset()) == 5


def test_folders_of_format_2_read_as_they_were(tmp_path: Path) -> None:
    manifest = read_manifest(FORMAT_2)
    assert manifest.hash == "cb2657abac3017976ca7228cebd8d67702b1ba62ce6cf1a760bb75dffec8a02f"  # of that version
    shutil.copytree(FORMAT_2, tmp_path / "train")
    (batch,) = data(tmp_path / "train").eval_loader("val", 8)
    assert batch["caption"] == [f"image {n}" for n in range(5)]
    shard = tmp_path / "train" / manifest.shards[0].name
    shard.write_bytes(shard.read_bytes().replace(b"image 1", b"image 7"))
    reading = data(tmp_path / "train")
    assert sum(len(batch["key"]) for batch in reading.eval_loader("val", 8)) == 4
    assert "differ from the manifest's checksum" in reading.skipped("val").names[0]


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n1 0 0 setrgbcolor 0 0 8 8 rectfill showpage\n"


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    mark = tmp_path / "ran"
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {mark}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(BAD_SAMPLE):
        decode_image({ending: eps()}, 8, (255, 255, 255))
    (tmp_path / f"file.{ending}").write_bytes(eps())
    with pytest.raises(BAD_SAMPLE):
        open_image(tmp_path / f"file.{ending}")
    path = tar(tmp_path / "in/a.tar", [*with_fields({}), {ending: eps()}])
    assert len(index_tars([path]).bad) == 1
    assert len(packed(tmp_path / "in", tmp_path / "out").bad) == 1
    assert not mark.exists()


def huge_png(side: int) -> bytes:
    """A header that claims side x side pixels."""
    content = bytearray(png())
    content[16:24] = side.to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_bombs_and_absurd_sizes_are_refused_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    for side in (20_000, 2**31 - 1):
        with pytest.raises(BAD_SAMPLE):
            decode_image({"png": huge_png(side)}, 8, (255, 255, 255))
    sparse = tarfile.TarInfo("00001.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    beyond = tarfile.TarInfo("00001.png")
    beyond.size = 2**50
    negative = tarfile.TarInfo("00001.png")
    negative.size = -1
    for name, member in (("beyond", beyond), ("negative", negative)):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(tar_bytes("00000.png", png()) + member.tobuf(tarfile.GNU_FORMAT) + END_MARKER)
        with pytest.raises(InputError, match=name):
            scan_tar(path)
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse/a.tar").write_bytes(tar_bytes("00000.png", png()) + bytes(header) + END_MARKER)
    assert index_tars([tmp_path / "sparse/a.tar"]).manifest.total == 1
    assert time.monotonic() - began < 5


def no_file(path: Path, kind: str) -> None:
    """Something else than a file under the name of one."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("metadata.jsonl", lambda path: list_source(path.parent)),
        ("names.csv", lambda path: list_source(path.parent)),
        ("list.txt", lambda path: list_source(path.parent, only=path)),
        ("boxes.json", lambda path: read_annotations([path], None, set())),
        ("boxes.csv", lambda path: read_annotations([path], path.parent / "known.tsv.txt", set())),
        ("classes.csv", lambda path: read_classes(path)),
        ("input.json", boxes_of),
        ("metrics.json", lambda path: read_record(path, "leave it out.")),
        ("config.json", diffusers_config.read_json),
    ],
)
def test_texts_that_are_no_files_block_nothing(tmp_path: Path, kind: str, name: str, read) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "known.tsv.txt").write_text("0\ta\n")
    no_file(tmp_path / name, kind)
    with pytest.raises(InputError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "<NA>"])
def test_a_word_for_a_missing_caption_is_no_caption(tmp_path: Path, word: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png())
    table = tmp_path / "metadata.csv"
    table.write_text(f"file_name,caption\na.png,{word}\nb.png,one\n")
    assert [item.fault for item in list_source(tmp_path).items] == ["its row has no caption", None]
    assert clean_fields({"caption": word}) == clean_fields({"caption": [word, None]}) == {}
    assert checked_fields({"caption": [word, "one"]})["captions"] == ["one"]
    table.unlink()
    (tmp_path / "a.txt").write_text(word)
    (tmp_path / "b.txt").write_text("one")
    assert [item.fault for item in list_source(tmp_path).items] == ["its caption file holds no caption", None]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device"])
def test_shards_and_images_that_are_no_files(tmp_path: Path, kind: str) -> None:
    shard = tar(tmp_path / "set/a.tar", with_fields({"caption": "a"}))
    index_tars([shard])
    shard.unlink()
    no_file(shard, kind)
    with pytest.raises(InputError, match=r"a\.tar is no regular file"):
        data(tmp_path / "set").val_dataset()
    with pytest.raises(InputError, match=r"a\.tar"):
        scan_tar(shard)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/good.png").write_bytes(png())
    no_file(tmp_path / "images/bad.png", kind)
    found = packed(tmp_path / "images", tmp_path / "out")
    assert found.manifests["train"].total == 1
    assert [name for name, _ in found.bad] == ([] if kind == "folder" else ["bad.png"])


MANIFESTS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("samples less", lambda m: m["shards"][0].update(samples=1)),
    ("samples more", lambda m: m["shards"][0].update(samples=9)),
    ("samples -1", lambda m: m["shards"][0].update(samples=-1)),
    ("samples 2.5", lambda m: m["shards"][0].update(samples=2.5)),
    ("samples text", lambda m: m["shards"][0].update(samples="2")),
    ("samples true", lambda m: m["shards"][0].update(samples=True)),
    ("bytes null", lambda m: m["shards"][0].update(bytes=None)),
    ("bytes huge", lambda m: m["shards"][0].update(bytes=2**70)),
    ("name 3", lambda m: m["shards"][0].update(name=3)),
    ("name outside", lambda m: m["shards"][0].update(name="../a.tar")),
    ("name absolute", lambda m: m["shards"][0].update(name="/etc/passwd")),
    ("name empty", lambda m: m["shards"][0].update(name="")),
    ("name with NUL", lambda m: m["shards"][0].update(name="a\0.tar")),
    ("shard twice", lambda m: m["shards"].append(m["shards"][0])),
    ("offsets text", lambda m: m["shards"][0].update(offsets=["a", "b"])),
    ("offsets fall", lambda m: m["shards"][0]["offsets"].reverse()),
    ("offset off by one", lambda m: m["shards"][0]["offsets"].__setitem__(1, m["shards"][0]["offsets"][1] + 1)),
    ("offset huge", lambda m: m["shards"][0]["offsets"].__setitem__(1, 2**50)),
    ("offset negative", lambda m: m["shards"][0]["offsets"].__setitem__(0, -512)),
    ("checksums short", lambda m: m["shards"][0].update(crc32c="00")),
    ("checksums no text", lambda m: m["shards"][0].update(crc32c=[1, 2])),
    ("sha256 null", lambda m: m["shards"][0].update(sha256=None)),
    ("shard unknown key", lambda m: m["shards"][0].update(more=1)),
    ("shards null", lambda m: m.update(shards=None)),
    ("shards of text", lambda m: m.update(shards=["a.tar"])),
    ("fields text", lambda m: m.update(fields="caption")),
    ("fields of numbers", lambda m: m.update(fields=[1])),
    ("image_size 0", lambda m: m.update(image_size=0)),
    ("image_size huge", lambda m: m.update(image_size=3_200_000_000)),
    ("image_size text", lambda m: m.update(image_size="8")),
    ("transform null", lambda m: m.update(transform=None)),
    ("background name", lambda m: m.update(transform={"background": "white"})),
    ("background short", lambda m: m.update(transform={"background": [1]})),
    ("classes number", lambda m: m.update(classes=3)),
    ("kind unknown", lambda m: m.update(kind="sounds")),
    ("kind latents", lambda m: m.update(kind="latents")),
    ("latents empty", lambda m: m.update(kind="latents", latents={})),
    ("latents list", lambda m: m.update(latents=[])),
    ("split null", lambda m: m.update(split=None)),
    ("version 4", lambda m: m.update(format_version=4)),
    ("version of another format", lambda m: m.update(format_version=5 - m["format_version"])),
    ("version text", lambda m: m.update(format_version="1")),
    ("version list", lambda m: m.update(format_version=[[[1]]])),
    ("unknown key", lambda m: m.update(more=1)),
    ("missing key", lambda m: m.pop("source")),
]


IN_JSON = ("samples less", "samples more", "offsets fall", "offset off by one", "offset huge", "offset negative")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("name", "change"), MANIFESTS, ids=[name for name, _ in MANIFESTS])
def test_a_manifest_against_itself(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any], version: int
) -> None:
    if version == 3 and name in IN_JSON:
        return  # the places of format 3 lie in a file of their own: test_manifest.py
    content = json.loads((FORMAT_2 / "manifest.json").read_text())
    if version == 3:
        content |= {"format_version": 3, "places_sha256": "0" * 64}
        content["shards"] = [
            {k: shard[k] for k in ("name", "samples", "bytes", "sha256")} for shard in content["shards"]
        ]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    read_manifest(tmp_path)
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"manifest\.json") as caught:
        read_manifest(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"null", b"[" * 200_000, b"{" * 10, b'{"a":' * 100_000])
def test_a_manifest_that_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_an_unfinished_download_is_told_by_its_zeros(tmp_path: Path) -> None:
    members = b"".join(tar_bytes(f"{n:05}.png", png()) for n in range(4))
    for tail in (512, 1024, 10240):
        (tmp_path / "whole.tar").write_bytes(members + bytes(tail + 512))
        assert scan_tar(tmp_path / "whole.tar")[1] == [f"{n:05}" for n in range(4)]
    (tmp_path / "cut.tar").write_bytes(members + bytes(50_000))
    with pytest.raises(InputError, match=r"cut\.tar ends in 50000 bytes of zeros after its sample 4"):
        scan_tar(tmp_path / "cut.tar")
    last = tar_bytes("00004.png", png()[:-40] + bytes(40))
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros/a.tar").write_bytes(members + last + END_MARKER)
    found = index_tars([tmp_path / "zeros/a.tar"])
    assert [(name, "zeros" in reason) for name, reason in found.bad] == [("a.tar: 00004", True)]


def test_names_with_dots_and_what_macos_adds(tmp_path: Path) -> None:
    names = ["photo 2.0 (clean)", "IMG.2020.0001", "IMG.2020.0002", "plain"]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/a.tar", "w", format=tarfile.GNU_FORMAT) as made:

        def put(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))

        put("set/.DS_Store", b"x")
        for name in names:
            put(f"set/._{name}.png", b"apple")
            put(f"set/{name}.png", png())
            put(f"set/{name}.txt", f"caption of {name}".encode())
        put("__MACOSX/set/._plain.png", b"apple")
        put("set/Thumbs.db", b"x")
    found = index_tars([tmp_path / "in/a.tar"])
    assert (found.manifest.total, found.bad) == (4, [])
    reader = ShardReader(tmp_path / "in", read_manifest(tmp_path / "in"))
    read = [reader.read(0, number) for number in range(4)]
    assert [key for key, _ in read] == [f"set/{name}" for name in names]
    assert [sample_fields(files)["caption"] for _, files in read] == [f"caption of {name}" for name in names]
    result = packed(tmp_path / "in", tmp_path / "out")
    assert (result.manifests["train"].total, result.bad) == (4, [])


def test_several_files_of_a_sample_stay_together(tmp_path: Path) -> None:
    members = ["a.jpg", "a.low.jpg", "a.seg.png", "a.json", "b.png", "b.text.states.npy"]
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(tar_bytes(name, b"x") for name in members) + END_MARKER)
    seen = list[tuple[str, str]]()
    _, keys = scan_tar(path, lambda key, data: seen.extend((key, ending) for ending in parse_sample(data, "a.tar")[1]))
    assert keys == ["a", "b"]
    assert seen == [tuple(name.split(".", 1)) for name in members]


def test_a_moment_of_another_shape_is_skipped_and_named(tmp_path: Path) -> None:
    good = npy(np.ones((1, 8, 4, 4), np.float16))
    others = [npy(np.ones((1, 8, 2, 2), np.float16)), npy(np.full((1, 8, 4, 4), np.nan, np.float16))]
    folder = tmp_path / "val"
    path = tar(folder / "a.tar", [{"json": b'{"caption": "a"}', "npy": c} for c in (good, *others, good)])
    latents = {
        **{"fingerprint": "f", "latent_channels": 4, "downsampling": 2, "image_size": 8, "mirrored": False},
        **{"has_logvar": True, "carries_images": False, "states": None},
        "statistics": {"images": 4, "mean": [0.0], "std": [1.0], "overall_mean": 0.0, "overall_std": 1.0},
    }
    manifest = Manifest("latents", "val", [scan_tar(path)[0]], ["caption"], 8, {}, "", "", {}, latents=latents)
    write_manifest(folder, manifest)
    reading = data(tmp_path, latents=str(tmp_path))
    (batch,) = reading.eval_loader("val", 4)
    assert batch["moments"].shape == (2, 8, 4, 4)
    assert [name.split(":")[0] for name in reading.skipped("val").names] == ["a.tar[1]", "a.tar[2]"]
    assert replace(manifest, latents=latents).hash == read_manifest(folder).hash
