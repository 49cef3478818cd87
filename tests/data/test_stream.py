"""The loader: the same images for any split of the work, bad samples replaced, faults named at the start."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_maker import keys_of, toy_image, write_shards
from torch.utils.data import DataLoader, Dataset

from ldmlab.data import shards
from ldmlab.data.batch_spec import BatchSpec
from ldmlab.data.dataset import ShardDataset
from ldmlab.data.loaders import QuietLoader, eval_loader
from ldmlab.data.manifest import read_manifest, write_manifest
from ldmlab.data.order import image_random
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError

COUNTS = [5, 1, 9, 3]  # 18 images, uneven


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "train", COUNTS)
    write_shards(tmp_path / "val", [4, 3])
    return tmp_path


def data(folder: Path, **options: Any) -> ShardData:
    options = {"image_size": 8, "workers": 0, "mix": 2, "seed": 1, **options}
    return ShardData(str(folder / "train"), str(folder / "val"), **options)


def take(loader: DataLoader[Any], count: int) -> list[dict[str, Any]]:
    return list(islice(loader, count))


def test_batch_contents(folder: Path) -> None:
    loader = data(folder, fields=("caption", "category", "class_id")).train_loader(4)
    for batch in take(loader, 6):
        numbers = [int(key) for key in batch["key"]]
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape == (4, 3, 8, 8)
        for image, number in zip(batch["image"], numbers, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(toy_image(number, 8)))
        assert batch["caption"] == [f"image {n}" for n in numbers]
        assert batch["class_id"].tolist() == [n % 3 for n in numbers]
        assert batch["skipped"] == []
    assert batch["position"].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("micro", "accumulate", "world"), [(6, 1, 1), (3, 1, 2), (1, 3, 2)])
def test_global_batches_for_any_split(folder: Path, workers: int, micro: int, accumulate: int, world: int) -> None:
    straight = [sorted(batch["key"]) for batch in take(data(folder).train_loader(6), 6)]
    loaders = [data(folder, workers=workers).train_loader(micro, accumulate, world, rank) for rank in range(world)]
    ranks = [take(loader, 6 * accumulate) for loader in loaders]
    for step in range(6):
        parts = [batch for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate]]
        assert sorted(keys_of(parts)) == straight[step]
    epoch = keys_of([batch for rank in ranks for batch in rank[: 3 * accumulate]])  # 3 steps = ceil(18 / 6)
    assert sorted(epoch) == [f"{n:05}" for n in range(18)]


def test_resume_goes_on_with_the_next_image(folder: Path) -> None:
    straight = keys_of(take(data(folder).train_loader(4), 12))
    before = keys_of(take(data(folder).train_loader(4), 5))
    after = keys_of(take(data(folder, workers=2).train_loader(4, start_position=20), 7))
    assert before + after == straight


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_image_once(folder: Path, world: int) -> None:
    loaders = [data(folder).eval_loader("val", 3, world, rank) for rank in range(world)]
    assert sorted(keys_of([batch for loader in loaders for batch in loader])) == [f"{n:05}" for n in range(7)]
    assert keys_of(list(data(folder).eval_loader("train", 2, limit=5))) == [f"{n:05}" for n in range(5)]


def test_flips_are_drawn_per_epoch_and_key(folder: Path) -> None:
    flips = []
    for batch in take(data(folder, flip=True).train_loader(6), 6):
        for position, key, image in zip(batch["position"].tolist(), batch["key"], batch["image"], strict=True):
            plain = torch.from_numpy(np.array(toy_image(int(key), 8))).permute(2, 0, 1)
            flipped = image_random(1, position // 18, key).random() < 0.5
            assert torch.equal(image, plain.flip(-1) if flipped else plain)
            flips.append(flipped)
    assert 0.2 < np.mean(flips) < 0.8
    assert flips[:18] != flips[18:]


def test_bad_samples_are_replaced_and_listed(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [6, 6], bad=(2, 7, 8))
    write_shards(tmp_path / "val", [4, 4], bad=(0, 1, 5))
    for workers in (0, 2):
        batches = take(data(tmp_path, workers=workers).train_loader(4), 6)
        assert all(len(batch["key"]) == 4 for batch in batches)
        assert not {"00002", "00007", "00008"} & set(keys_of(batches))
        skipped = [reason for batch in batches for reason in batch["skipped"]]
        assert len([reason for reason in skipped if reason.startswith("00000.tar[2]")]) >= 2  # once an epoch, at least
        assert "OSError" in skipped[0]
    reading = data(tmp_path)
    held_out = list(reading.eval_loader("val", 2))
    assert keys_of(held_out) == ["00002", "00003", "00004", "00006", "00007"]
    assert held_out[0]["image"].shape == (0, 3, 8, 8)  # a batch of nothing but bad samples keeps its form
    assert [len(batch["skipped"]) for batch in held_out] == [2, 0, 1, 0]
    list(reading.eval_loader("val", 3))  # a second pass finds the same
    found = reading.skipped("val")
    assert (found.count, found.total) == (3, 8)
    assert [name.partition(":")[0] for name in found.names] == ["00000.tar[0]", "00000.tar[1]", "00001.tar[1]"]
    assert "OSError" in found.names[0]
    rank = data(tmp_path, workers=2)
    list(rank.eval_loader("val", 2, world=2, rank=1))
    assert (rank.skipped("val").count, rank.skipped("val").total) == (2, 4)


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [3], bad=(0, 1, 2))
    with pytest.raises(InputError, match="none of the first samples can be read"):
        data(tmp_path).train_dataset()


def test_a_shard_cut_off_in_mid_run(folder: Path) -> None:
    dataset = data(folder).train_dataset()
    shard = folder / "train" / "00002.tar"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    samples = [dataset[position] for position in range(18)]
    assert all("image" in sample for sample in samples)
    assert any("the shard ends inside this sample" in reason for sample in samples for reason in sample["skipped"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": ("boxes",)}, r"data.fields=\['boxes'\].*no field boxes \(it has caption, category, class_id\)"),
        ({"balance": "colour"}, "data.balance=colour"),
        ({"cache": True, "cache_limit_gib": 1e-9}, "data.cache_limit_gib=1e-09"),
        ({"mix": 0}, "data.mix=0"),
        ({"image_size": 0}, "data.image_size=0"),
    ],
)
def test_wrong_options_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data(folder, **options).train_dataset()


def test_a_field_that_the_manifest_does_not_list_is_named(folder: Path) -> None:
    path = folder / "train" / "manifest.json"
    path.write_text(path.read_text().replace('"class_id"', '"/etc/passwd"'))
    with pytest.raises(InputError, match=r"its manifest\.json does not list the field 'class_id', which sample 00000"):
        data(folder).train_loader(2)


def test_wrong_folders_are_named(folder: Path) -> None:
    train = folder / "train"
    with pytest.raises(InputError, match="latents is not set"):
        data(folder).train_dataset("latents")
    with pytest.raises(InputError, match="holds images, not latents"):
        data(folder, latents=str(folder)).train_dataset()
    with pytest.raises(InputError, match="split=test"):
        data(folder).eval_loader("test", 2)
    with pytest.raises(InputError, match="micro_batch=0"):
        data(folder).train_loader(0)
    with open(train / "00001.tar", "r+b") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="another checksum"):
        data(folder, sha256=True).train_dataset()
    with open(train / "00001.tar", "r+b") as file:
        file.truncate(512)
    with pytest.raises(InputError, match="shorter than its manifest records"):
        data(folder).train_dataset()
    write_manifest(train, replace(read_manifest(train), shards=[]))
    with pytest.raises(InputError, match="holds no samples"):
        data(folder).train_dataset()
    (train / "manifest.json").unlink()
    with pytest.raises(InputError, match="ldmlab index"):
        data(folder).train_dataset()


def test_images_are_resized_and_cropped(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [2], size=32)
    image = data(tmp_path, image_size=8).val_dataset(split="train")[1]["image"]
    expected = toy_image(1, 32).resize((8, 8), 3)  # bicubic, antialiased
    assert np.array_equal(image, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_gives_the_same_images(folder: Path, workers: int) -> None:
    options = {"image_size": 4, "flip": True, "workers": workers}
    plain = take(data(folder, **options).train_loader(6), 9)
    cached = take(data(folder, cache=True, **options).train_loader(6), 9)
    for a, b in zip(plain, cached, strict=True):
        assert a["key"] == b["key"]
        assert torch.equal(a["image"], b["image"])


def test_cache_is_filled_by_workers_for_all(folder: Path) -> None:
    dataset = data(folder, cache=True).val_dataset(split="train")
    list(eval_loader(dataset, batch_size=4, workers=2))
    assert dataset._cache is not None
    assert all(dataset._cache.get(index) is not None for index in range(18))


def test_held_out_images_are_decoded_once(folder: Path) -> None:
    reading = data(folder, cache=True, workers=1, image_size=4)
    first, second = list(reading.eval_loader("val", 3)), list(reading.eval_loader("val", 3))
    cache = reading.val_dataset()._cache
    assert cache is not None
    assert all(cache.get(index) is not None for index in range(7))
    assert torch.equal(first[0]["image"], second[0]["image"])


def test_balanced_stream(folder: Path) -> None:
    batches = take(data(folder, balance="category", balance_temperature=0, fields=("category",)).train_loader(9), 2)
    classes = [name for batch in batches for name in batch["category"]]
    assert sorted(classes) == ["c0"] * 6 + ["c1"] * 6 + ["c2"] * 6


def test_exchanged_splits_are_refused(tmp_path: Path) -> None:
    for split, recorded in (("train", "val"), ("val", "train")):
        write_shards(tmp_path / split, [6], split=recorded)
    for made in (data(tmp_path).train_dataset, data(tmp_path).val_dataset):
        with pytest.raises(InputError, match=r"data.train=.*/train holds the split val, and .*; exchange the two"):
            made()
    with pytest.raises(InputError, match=r"data.latents=.*/train holds the split val"):
        replace(data(tmp_path), latents=str(tmp_path)).check_sides("latents")
    write_shards(tmp_path / "val", [6], split="val")
    assert len(data(tmp_path).train_dataset()) == 6  # the validation images for both, or a split of another name


def test_data_set_survives_pickling(folder: Path) -> None:
    dataset = data(folder, cache=True).train_dataset()
    before = dataset[5]
    after = pickle.loads(pickle.dumps(dataset))[5]
    assert before["key"] == after["key"]
    assert np.array_equal(before["image"], after["image"])


def test_open_files_do_not_grow_with_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 4)
    write_shards(tmp_path / "train", [1] * 30)
    dataset = ShardDataset(tmp_path / "train", BatchSpec(8))
    before = len(os.listdir("/proc/self/fd"))
    assert [dataset[position]["key"] for position in range(30)] == [f"{n:05}" for n in range(30)]
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def _read_part(folder: Path, world: int, rank: int, results: Any) -> None:
    torch.set_num_threads(1)
    results.put((rank, keys_of(take(data(folder).train_loader(2, 1, world, rank), 9))))


def test_two_processes_with_uneven_shards_read_equally_much(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_part, args=(folder, 2, rank, results)) for rank in range(2)]
    for process in processes:
        process.start()
    parts = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert [len(keys) for keys in parts.values()] == [18, 18]
    assert sorted(parts[0] + parts[1]) == sorted(2 * [f"{n:05}" for n in range(18)])


def thread_of_another_package() -> None:
    """What a package does that starts a thread in every forked process."""
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


os.register_at_fork(after_in_child=lambda: _in_children and thread_of_another_package())
_in_children: list[bool] = []


def test_workers_leave_signals_to_the_main_process(folder: Path) -> None:
    _in_children.append(True)
    try:
        check_signals(folder)
    finally:
        _in_children.clear()


def check_signals(folder: Path) -> None:
    batches = iter(data(folder, workers=1).train_loader(2))
    next(batches)
    worker = batches._workers[0]  # type: ignore[attr-defined]
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, name)
    sender = multiprocessing.get_context("fork").Process(target=os.kill, args=(worker.pid, signal.SIGTERM))
    sender.start()
    sender.join()
    assert len(take(batches, 10)) == 10
    assert worker.is_alive()
    worker.terminate()  # from its parent
    deadline = time.monotonic() + 20
    while worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_alive()


KILLED_WHILE_IT_TAKES_A_BATCH = """
import os, signal, sys
from multiprocessing.connection import Connection
from ldmlab.data.shard_data import ShardData

def killed(self, message):
    os.kill(os.getpid(), signal.SIGKILL)

data = ShardData(sys.argv[1], None, image_size=8, workers=1, mix=2, seed=1)
batches = iter(data.train_loader(2))
Connection.send = killed  # connected with the worker; the number of the batch was never sent
next(batches)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere batches are handed over by name, not by a connection")
def test_the_worker_of_a_killed_process_ends_without_a_traceback(folder: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_IT_TAKES_A_BATCH, str(folder / "train")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # its worker's standard error as well
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ""


class Unsendable(Dataset[Any]):
    """Its samples cannot be handed over to another process, as where there is no shared memory left."""

    def __getitem__(self, index: int) -> Any:
        return lambda: index

    def __len__(self) -> int:
        return 4


@pytest.mark.slow
def test_a_batch_that_cannot_be_handed_over_ends_the_loader(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        next(iter(QuietLoader(Unsendable(), workers=1, batch_size=None, timeout=8)))
    said = capfd.readouterr().err
    assert "a loader process cannot hand over a batch (" in said
    assert "set data.workers=0" in said
    assert "Traceback" not in said
