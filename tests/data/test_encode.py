"""Encoding: shared by processes, continued after a kill, and the same latents as running the first stage on the fly."""

import errno
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_maker import keys_of, write_shards
from torch import Tensor

from ldmlab.data.encode_shards import LatentSettings, encode
from ldmlab.data.manifest import Manifest, check_shards, read_manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError

COUNTS = [5, 2, 4, 7]
SETTINGS = LatentSettings("f" * 64, 3, 2, image_size=8, dtype="float32", first_stage={"channel_mult": (1, 2)})


def toy_moments(images: Tensor) -> Tensor:
    """Not equivariant: a mirrored image has other moments than the mirrored moments."""
    pixels = images.float() / 127.5 - 1
    ramp = torch.linspace(0.5, 2.0, 8)
    mean = torch.nn.functional.avg_pool2d(pixels * ramp, 2)
    return torch.cat([mean, mean.square() - 2], dim=1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_shards(tmp_path / "images" / "train", COUNTS)
    write_shards(tmp_path / "images" / "val", [3], split="val")
    return tmp_path / "images"


def run(images: Path, out: Path, split: str = "train", settings: LatentSettings = SETTINGS, **options: Any) -> Manifest:
    manifest = encode(images / split, out / split, toy_moments, settings, batch_size=3, **options)
    assert manifest is not None
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_manifest_says_what_the_latents_are(images: Path, tmp_path: Path) -> None:
    manifest = run(images, tmp_path / "latents")
    check_shards(tmp_path / "latents" / "train", manifest, sha256=True)
    assert manifest == read_manifest(tmp_path / "latents" / "train")
    assert [shard.samples for shard in manifest.shards] == COUNTS
    assert manifest.latents is not None
    assert manifest.latents["has_logvar"]
    assert manifest.latents["mirrored"]
    assert manifest.latents["statistics"]["images"] == 18
    assert manifest.fields == ["caption", "category", "class_id"]


def test_changed_statistics_are_refused(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "latents")
    path = tmp_path / "latents" / "train" / "manifest.json"
    content = json.loads(path.read_text())
    content["latents"]["statistics"]["std"][0] *= 2
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="statistics_sha256"):
        read_manifest(path.parent)


@pytest.mark.parametrize("name", ["00001.tar", "manifest.places"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-4])])
def test_a_finished_encode_that_was_damaged_is_not_taken_as_complete(
    images: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    run(images, tmp_path / "latents")
    damage(tmp_path / "latents" / "train" / name)
    with pytest.raises(InputError, match=rf"OUT=.*was complete and is damaged: .*{name}.*; copy .* delete the folder"):
        run(images, tmp_path / "latents")


def test_the_same_size_and_other_bytes_are_found_where_sums_are_checked(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "latents")
    path = tmp_path / "latents" / "train" / "00000.tar"
    path.write_bytes(path.read_bytes()[::-1])
    run(images, tmp_path / "latents")
    with pytest.raises(InputError, match="another checksum"):
        run(images, tmp_path / "latents", sha256=True)


def test_the_precision_of_the_encoder_is_recorded_where_it_is_another(images: Path, tmp_path: Path) -> None:
    assert "precision" not in (run(images, tmp_path / "latents").latents or {})  # as older ldmlab wrote them
    lower = replace(SETTINGS, precision="bfloat16")
    with pytest.raises(InputError, match="precision"):
        run(images, tmp_path / "latents", settings=lower)
    assert (run(images, tmp_path / "lower", settings=lower).latents or {})["precision"] == "bfloat16"


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_and_online_views_agree(images: Path, tmp_path: Path, workers: int) -> None:
    run(images, tmp_path / "latents")
    run(images, tmp_path / "latents", "val")
    options = {"image_size": 8, "flip": True, "seed": 5, "mix": 2, "fields": ("caption",)}
    online = ShardData(str(images / "train"), str(images / "val"), workers=0, **options)
    cached = replace(online, latents=str(tmp_path / "latents"), workers=workers)
    for a, b in islice(zip(online.train_loader(6), cached.train_loader(6), strict=False), 9):
        assert a["key"] == b["key"]
        assert a["caption"] == b["caption"]
        assert torch.equal(a["position"], b["position"])
        assert torch.allclose(toy_moments(a["image"]), b["moments"], atol=1e-6, rtol=0)
        assert "image" not in b
    held_out = list(cached.eval_loader("val", 2))
    assert keys_of(held_out) == ["00000", "00001", "00002"]


def test_an_unmirrored_cache_refuses_to_flip(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "latents", settings=replace(SETTINGS, mirrored=False))
    data = ShardData(str(images / "train"), str(images / "val"), 8, latents=str(tmp_path / "latents"), workers=0)
    assert next(iter(data.train_loader(2)))["moments"].shape == (2, 6, 4, 4)
    with pytest.raises(InputError, match=r"data.flip=true.*without their mirror images"):
        replace(data, flip=True).train_dataset()
    with pytest.raises(InputError, match=r"data.image_size=16, but .* encoded at 8"):
        replace(data, image_size=16).train_dataset()
    as_images = replace(data, train=str(tmp_path / "latents" / "train"))
    with pytest.raises(InputError, match="latents without their images"):
        as_images.train_dataset("images")


def test_images_can_be_carried(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "latents", settings=replace(SETTINGS, carries_images=True))
    online = ShardData(str(images / "train"), str(images / "val"), 8, workers=0, seed=2)
    carried = replace(online, train=str(tmp_path / "latents" / "train"))
    a, b = (next(iter(data.train_loader(8, kind="images"))) for data in (online, carried))
    assert torch.equal(a["image"], b["image"])


def _encode_part(images: Path, out: Path, world: int, rank: int) -> None:
    torch.set_num_threads(1)
    encode(images / "train", out / "train", toy_moments, SETTINGS, rank=rank, world=world, batch_size=3)


def test_two_processes_write_what_one_writes(images: Path, tmp_path: Path) -> None:
    alone = run(images, tmp_path / "alone")
    context = multiprocessing.get_context("fork")
    parts = [context.Process(target=_encode_part, args=(images, tmp_path / "shared", 2, rank)) for rank in range(2)]
    for part in parts:
        part.start()
    for part in parts:
        part.join(60)
        assert part.exitcode == 0
    shared = read_manifest(tmp_path / "shared" / "train")
    assert shared.hash == alone.hash
    assert contents(tmp_path / "shared" / "train") == contents(tmp_path / "alone" / "train")


def killed_after(count: int) -> Callable[[Tensor], Tensor]:
    seen = 0

    def moments(images: Tensor) -> Tensor:
        nonlocal seen
        seen += len(images)
        if seen > count:
            raise KeyboardInterrupt
        return toy_moments(images)

    return moments


def test_an_interrupted_encode_continues(images: Path, tmp_path: Path) -> None:
    source, out = images / "train", tmp_path / "latents" / "train"
    with pytest.raises(KeyboardInterrupt):
        encode(source, out, killed_after(18), SETTINGS, batch_size=3)  # 9 of 18 images, two views each
    assert not (out / "manifest.json").exists()
    assert sorted(contents(out)) == ["00000.tar", "00001.tar"]
    data = ShardData(str(source), str(source), 8, latents=str(tmp_path / "latents"))
    with pytest.raises(InputError, match="unfinished encode"):
        data.train_dataset()
    first = (out / "00000.tar").stat().st_mtime_ns
    (out / "00002.tar.99999.tmp").write_bytes(b"left by a killed process")
    seen = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    manifest = encode(source, out, toy_moments, SETTINGS, batch_size=3, progress=progress)
    assert (seen[0], seen[-1]) == ((10, 18), (18, 18))  # 7 images were kept
    assert (out / "00000.tar").stat().st_mtime_ns == first
    assert not list(out.glob("*.tmp"))
    assert manifest is not None
    assert manifest.hash == run(images, tmp_path / "straight").hash
    again = encode(source, out, killed_after(0), SETTINGS)  # all is done: nothing runs
    assert again is not None
    assert again.hash == manifest.hash


def test_one_process_of_two_leaves_the_manifest_to_the_last(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents" / "train"
    options = {"world": 2, "batch_size": 3}
    assert encode(images / "train", out, toy_moments, SETTINGS, rank=1, **options) is None
    assert encode(images / "train", out, toy_moments, SETTINGS, rank=0, **options) is not None


def test_what_does_not_fit_is_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    run(images, out)
    with pytest.raises(InputError, match="latents of another first stage"):
        run(images, out, settings=replace(SETTINGS, fingerprint="0"))
    with pytest.raises(InputError, match=r"dtype=float32 \(now float16\)"):
        run(images, out, settings=replace(SETTINGS, dtype="float16"))
    with pytest.raises(InputError, match="holds latents, not images"):
        encode(out / "train", tmp_path / "again", toy_moments, SETTINGS)
    with pytest.raises(InputError, match="holds something else than latents"):
        encode(images / "train", images / "val", toy_moments, SETTINGS)
    with pytest.raises(InputError, match=r"data.image_size=9 is not divisible"):
        replace(SETTINGS, image_size=9)
    with pytest.raises(InputError, match=r"encode.dtype=bfloat16"):
        replace(SETTINGS, dtype="bfloat16")


def test_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    write_shards(tmp_path / "images" / "train", [3, 2], bad=(1, 3, 4))
    with pytest.raises(InputError, match="3 of 5 images cannot be read"):
        run(tmp_path / "images", tmp_path / "latents")
    manifest = run(tmp_path / "images", tmp_path / "latents", max_bad=0.7)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("00000.tar", 2)]
    assert [reason.split(":")[0] for reason in manifest.extra["skipped"]] == [
        "00000.tar[1]",
        "00001.tar[0]",
        "00001.tar[1]",
    ]


def _encode_slowly(images: Path, out: Path, begun: Any, go_on: Any) -> None:
    def moments(batch: Tensor) -> Tensor:
        begun.set()
        go_on.wait(60)
        return toy_moments(batch)

    torch.set_num_threads(1)
    encode(images / "train", out / "train", moments, SETTINGS, batch_size=3)


def test_a_second_encode_is_refused_and_spoils_nothing(images: Path, tmp_path: Path) -> None:
    alone = run(images, tmp_path / "alone")
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()
    first = context.Process(target=_encode_slowly, args=(images, tmp_path / "out", begun, go_on))
    first.start()
    assert begun.wait(60)
    with pytest.raises(InputError, match=r"is being encoded by another process \(process \d+ on .*\); wait"):
        run(images, tmp_path / "out")
    other = tmp_path / "out/train"
    assert list(other.glob("*.rank-0.tmp"))
    result = encode(images / "train", other, toy_moments, SETTINGS, batch_size=3, rank=1, world=2)
    assert result is None  # another rank beside it: it leaves the first one's unfinished shard alone
    assert list(other.glob("*.rank-0.tmp"))
    go_on.set()
    first.join(60)
    assert first.exitcode == 0
    assert read_manifest(other).hash == alone.hash
    assert contents(other) == contents(tmp_path / "alone" / "train")
    assert not list(other.glob("*.tmp"))


def test_what_a_killed_encode_left_is_removed(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "train"
    with pytest.raises(KeyboardInterrupt):
        encode(images / "train", out, killed_after(6), SETTINGS, batch_size=3)
    for name in ("00001.tar.rank-0.tmp", "00001.tar.rank-7.tmp", "00001.tar.12345.tmp"):  # as a kill -9 leaves them
        (out / name).write_bytes(b"half")
    (out / ".encoded" / ".00001.tar.json.01234567.part").write_bytes(b"half")
    run(images, tmp_path / "out")
    assert not [*out.rglob("*.tmp"), *out.rglob("*.part")]


def test_a_flip_is_found_by_encode(images: Path, tmp_path: Path) -> None:
    shard = images / "train" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"image 3") + 6] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"00000\.tar has another checksum"):
        run(images, tmp_path / "checked", sha256=True)


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "no space left for"), (errno.EROFS, "is read-only")])
def test_faults_of_the_disk_name_the_path(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("ldmlab.data.output_folder.os.replace", fail)
        with pytest.raises(InputError, match=rf"{tmp_path}/out/train.*|{words}") as caught:
            run(images, tmp_path / "out")
    assert words in str(caught.value)
    assert run(images, tmp_path / "out").total == sum(COUNTS)
