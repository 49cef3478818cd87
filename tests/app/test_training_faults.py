"""Faults while training: a lost process, exhausted memory, a metric that is no number, images that cannot be read."""

import datetime
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from walk import SMALL, TINY_STAGE, Flow

from ldmlab.app import cli
from ldmlab.backbones.unet import UNet
from refusals import refusal


def words(flow: Flow, out: Path, *more: str) -> list[str]:
    """The command line of a first stage's training."""
    return ["train", "experiment=mine/first_stage", *SMALL, *flow.data, *TINY_STAGE, f"run.dir={out}", *more]


def process(rank: int, port: int, log: Path, argv: Sequence[str]) -> None:
    """One of two processes of a command, as torchrun starts them."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115  until the process ends
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    sys.exit(cli.run_command(lambda: cli.dispatch(list(argv))))


def pair(folder: Path, argv: Sequence[str], ranks: Sequence[int] = (0, 1), minutes: float = 3) -> list[ForkProcess]:
    """The processes of a command; what they print goes to FOLDER/RANK.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start, argv = multiprocessing.get_context("fork").Process, [*argv, f"trainer.timeout_minutes={minutes}"]
    members = [start(target=process, args=(rank, port, folder / f"{rank}.log", argv), daemon=True) for rank in ranks]
    for member in members:
        member.start()
    return members


def codes(members: Sequence[ForkProcess]) -> list[int | None]:
    for member in members:
        member.join(300)
    return [member.exitcode for member in members]


@pytest.mark.slow
def test_a_process_whose_partner_is_killed_says_so_and_the_run_goes_on(flow: Flow, tmp_path: Path) -> None:
    out = tmp_path / "run"
    members = pair(tmp_path, words(flow, out, "trainer.max_steps=100000", "trainer.micro_batch=2"))
    deadline = time.monotonic() + 200
    while not any(out.glob("checkpoints/step_*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(members[1].pid or 0, signal.SIGKILL)
    assert codes(members) == [2, -signal.SIGKILL]
    log = (tmp_path / "0.log").read_text()
    assert "another process of this run ended (" in log
    assert f"the newest checkpoint is {out}/checkpoints/step_" in log
    assert "run the command again to continue." in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_process_that_finds_no_other_says_so(flow: Flow, tmp_path: Path) -> None:
    members = pair(tmp_path, words(flow, tmp_path / "run"), ranks=[0], minutes=0.03)
    assert codes(members) == [2]
    log = (tmp_path / "0.log").read_text()
    assert "the 2 processes of this run did not find each other (" in log
    assert "Traceback" not in log
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("words", "minutes"), [(["trainer.timeout_minutes=7.5"], 7.5), ([], None)])
def test_the_patience_of_a_run_is_that_of_its_group(
    words: list[str], minutes: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def opened(*_: Any, **options: Any) -> None:
        given.update(options)
        raise RuntimeError("seen")

    def met(*_: Any, timeout: datetime.timedelta, **__: Any) -> Iterator[tuple[Any, int, int]]:
        assert timeout == min(datetime.timedelta(minutes=minutes or 5), datetime.timedelta(minutes=5))
        yield torch.distributed.HashStore(), 0, 2

    monkeypatch.setattr(torch.distributed, "init_process_group", opened)
    monkeypatch.setattr(torch.distributed, "rendezvous", met)
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "2"})
    for stage in ("autoencoder", "all"):
        assert "did not find each other (seen)" in refusal(lambda: cli.dispatch(["train", f"stage={stage}", *words]))  # noqa: B023
        assert given.pop("timeout") == (minutes and datetime.timedelta(minutes=minutes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_exhausted_memory_is_a_sentence(
    error: Exception, flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = UNet.forward, iter(range(1000))

    def exhausted(self: UNet, *args: Any, **options: Any) -> torch.Tensor:
        if next(calls):
            raise error
        return forward(self, *args, **options)

    monkeypatch.setattr(UNet, "forward", exhausted)
    sentence = refusal(lambda: flow.denoiser(f"run.dir={tmp_path}/run"))
    assert sentence.startswith(f"memory ran out ({str(error).partition('. ')[0] or 'MemoryError'}")
    assert f"the newest checkpoint is {tmp_path}/run/checkpoints/step_00000001.ckpt" in sentence
    assert "smaller trainer.micro_batch" in sentence


@pytest.mark.slow
def test_a_validation_metric_that_is_no_number_is_said_and_never_the_best(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = UNet.forward

    def broken(self: UNet, *args: Any, **options: Any) -> torch.Tensor:
        found = forward(self, *args, **options)
        return found if self.training else found * float("nan")

    run = ["trainer.max_steps=3", "trainer.validate_every=1", "~callbacks.panels", f"run.dir={tmp_path}/run"]
    monkeypatch.setattr(UNet, "forward", broken)
    flow.denoiser(*run)
    said = capsys.readouterr().err
    assert "step 1: val/loss is nan, which is never the best; there is no best checkpoint yet" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("best*"))


@pytest.fixture
def damaged(flow: Flow, tmp_path: Path) -> list[str]:
    """Options for the flow's images, one of each split damaged."""
    shutil.copytree(flow.packed, tmp_path / "packed")
    for split in ("train", "val"):
        shard = next((tmp_path / "packed" / split).glob("*.tar"))
        content = bytearray(shard.read_bytes())
        place = content.index(b"WEBPVP8")
        content[place + 20] ^= 255
        shard.write_bytes(content)
    return [f"data.{split}={tmp_path}/packed/{split}" for split in ("train", "val")]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_images_that_cannot_be_read_are_named_and_counted_once(
    world: int, damaged: list[str], flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["trainer.max_steps=12", "trainer.validate_every=6", "trainer.checkpoint_every=12"]
    argv = words(flow, tmp_path / "run", *damaged, *steps, f"trainer.micro_batch={8 // world}")
    if world == 1:
        assert cli.run_command(lambda: cli.dispatch(argv)) == 0
        said, said_by_others = capsys.readouterr().err, ""
    else:
        assert codes(pair(tmp_path, argv)) == [0, 0], (tmp_path / "0.log").read_text()
        said, said_by_others = ((tmp_path / f"{rank}.log").read_text() for rank in range(2))
    lines = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == ["training images", "validation images"]
    count = sum(shard["samples"] for shard in json.loads((flow.packed / "val" / "manifest.json").read_text())["shards"])
    assert f"1 of {count} validation images could not be read" in said
    assert "1 training images could not be read" in said
    assert said.count("validation images that cannot be read, left out: ") == 1
    assert "could not be read" not in said_by_others
