"""A run that is killed at any moment and started again is the run that was never killed."""

import csv
import io
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from toy_stages import Keys, TwoGroups, autoencoder, diffusion_stage, image_batch, train

from ldmlab import checkpoints
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.training.muon import MuonAdamW
from ldmlab.training.stage import Stage


class Slow(pl.Callback):
    """Gives the test time to kill."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.02)


def with_dropout() -> Stage:
    return diffusion_stage(dropout=0.3, accumulate=2)


def muon() -> Stage:
    return diffusion_stage(dropout=0.3, layers=2, accumulate=2, optimizer=MuonAdamW(1e-3))


def two_groups() -> Stage:
    return TwoGroups(accumulate=2)


def run(make: Callable[[], Stage], folder: Path, keys: Path, slow: bool) -> None:
    callbacks = [Keys(keys), *([Slow()] if slow else [])]
    train(make(), folder, micro=2, callbacks=callbacks)


def grown(path: Path, lines: int, child: ForkProcess, saved: Path | None = None) -> None:
    """Wait until the child has written so many lines more, and a checkpoint is in the run `saved`."""
    start = len(path.read_text().splitlines()) if path.exists() else 0
    while child.is_alive() and (
        not path.exists()
        or len(path.read_text().splitlines()) < start + lines
        or (saved is not None and not any(saved.glob("checkpoints/step_*.ckpt")))
    ):
        time.sleep(0.002)


def latest_keys(path: Path) -> dict[str, list[str]]:
    """The keys of each step's micro-batches as the last try saw them."""
    steps: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        position, *keys = line.split()
        steps.setdefault(position, []).extend(keys)
    return {position: keys[-2:] for position, keys in steps.items()}


@pytest.mark.slow
@pytest.mark.parametrize("make", [with_dropout, muon, two_groups, autoencoder])
def test_killed_at_any_moment_the_run_ends_bit_identical(make: Callable[[], Stage], tmp_path: Path) -> None:
    assert forked.finish(forked.start(run, make, tmp_path / "straight", tmp_path / "straight.keys", False)) == [0]
    moments = random.Random(make.__name__)
    keys, log = tmp_path / "killed.keys", tmp_path / "log"
    for kill in range(3):
        child = forked.start(run, make, tmp_path / "killed", keys, True, log=log)
        grown(keys, moments.randint(5, 9), child, tmp_path / "killed" if kill == 2 else None)
        time.sleep(moments.random() * 0.03)
        os.kill(child.pid, signal.SIGKILL)
        assert forked.finish(child) == [-signal.SIGKILL], log.read_text()
    last = forked.start(run, make, tmp_path / "killed", keys, False, log=log)
    assert forked.finish(last) == [0], log.read_text()
    assert "resuming from step" in log.read_text()
    straight, killed = (
        load_checkpoint(tmp_path / d / "checkpoints" / "step_00000012.ckpt") for d in ("straight", "killed")
    )
    forked.same(straight, killed)
    assert latest_keys(tmp_path / "straight.keys") == latest_keys(tmp_path / "killed.keys")
    assert rows(tmp_path / "straight") == rows(tmp_path / "killed")


def member(rank: int, world: int, folder: Path, keys: Path, slow: bool) -> None:
    callbacks = [Keys(keys.with_suffix(f".{rank}")), *([Slow()] if slow else [])]
    train(two_groups(), folder, 2, world, rank, callbacks)


@pytest.mark.slow
def test_two_killed_processes_end_bit_identical(tmp_path: Path) -> None:
    log, keys = tmp_path / "log", tmp_path / "keys"
    assert forked.finish(*forked.group(2, member, tmp_path / "straight", keys, False, log=log)) == [0, 0]
    children = forked.group(2, member, tmp_path / "killed", keys, True, log=log)
    grown(keys.with_suffix(".1"), 11, children[1])
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert forked.finish(*children) == [-signal.SIGKILL] * 2
    assert forked.finish(*forked.group(2, member, tmp_path / "killed", keys, False, log=log)) == [0, 0], log.read_text()
    assert "resuming from step" in log.read_text()
    straight, killed = (
        load_checkpoint(tmp_path / d / "checkpoints" / "step_00000012.ckpt") for d in ("straight", "killed")
    )
    forked.same(straight, killed)
    assert len(killed["rng"]) == 2


def rows(folder: Path) -> list[dict[str, str]]:
    """The curves, without duplicates of replayed steps; the first step of a start is logged by choice."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_curve_has_no_duplicates_and_the_seed_belongs_to_the_run(tmp_path: Path) -> None:
    stage = diffusion_stage(max_steps=7)
    train(stage, tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").open("a").write("11,9,9\n5,unfin")
    train(diffusion_stage(max_steps=10), tmp_path / "run")
    steps = [int(row["step"]) for row in rows(tmp_path / "run")]
    assert steps == sorted(set(steps))
    with pytest.raises(InputError, match="seed=4 but"):
        train(diffusion_stage(max_steps=12, seed=4), tmp_path / "run")
    with pytest.raises(InputError, match="is of stage=diffusion"):
        train(TwoGroups(), tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = train(diffusion_stage(max_steps=6), tmp_path / "run")
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    leftover = newest.parent / ".step_00000009.ckpt.x.part"
    rows_left = tmp_path / "run" / ".metrics.csv.x.part"
    other = tmp_path / "run" / ".notes.x.part"
    average = tmp_path / "run" / "averages" / ".step_00000009_length_0.050.safetensors.x.part"
    average.parent.mkdir()
    for path in (leftover, rows_left, other, average):
        path.write_bytes(b"half")
    again = train(diffusion_stage(max_steps=6), tmp_path / "run")
    assert "cannot be read" in capsys.readouterr().err
    forked.same(load_checkpoint(again)["modules"], torch.load(io.BytesIO(whole), weights_only=True)["modules"])
    assert not leftover.exists()
    assert not rows_left.exists()
    assert not average.exists()
    assert other.exists()  # whoever writes it


def die_while_writing(folder: Path) -> None:
    """The third checkpoint is half on disk when the process is killed."""
    write = checkpoints._torch_save

    def half(content: dict[str, Any], path: Path) -> None:
        write(content, path)
        if content["step"] == 9:
            path.write_bytes(path.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints._torch_save = half
    train(with_dropout(), folder)


def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    assert forked.finish(forked.start(die_while_writing, tmp_path / "run")) == [-signal.SIGKILL]
    folder = tmp_path / "run" / "checkpoints"
    assert max(p.name for p in folder.glob("step*")) == "step_00000006.ckpt"
    assert list(folder.glob(".*.part"))
    last = train(with_dropout(), tmp_path / "run")
    straight = train(with_dropout(), tmp_path / "straight")
    forked.same(load_checkpoint(last), load_checkpoint(straight))
    assert not list(folder.glob(".*.part"))


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    path = train(TwoGroups(max_steps=4), tmp_path / "run")
    written = path.stat().st_mtime_ns
    killed = path.with_name(".step_00000002.ckpt.removed.part")  # while it was deleted
    killed.mkdir()
    assert train(TwoGroups(max_steps=4), tmp_path / "run") == path
    assert path.stat().st_mtime_ns == written
    assert not killed.exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda table: table.write_bytes(table.read_bytes()[:-9]), "ends at step 3; its rows up to step 4 are lost."),
        (lambda table: table.unlink(), "ends at step 0; its rows up to step 4 are lost."),
        (lambda table: table.write_bytes(b"\xff\n"), "is damaged"),
        (lambda table: (table.unlink(), os.mkfifo(table)), "is damaged"),
    ],
    ids=["half a row", "missing", "no text", "a pipe"],
)
@pytest.mark.parametrize("steps", [4, 6], ids=["finished", "resumed"])
def test_rows_that_a_table_lost_are_named(
    damage: Callable[[Path], Any], sentence: str, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TwoGroups(max_steps=4), tmp_path / "run", log_every=1)
    train(TwoGroups(max_steps=4), tmp_path / "run", log_every=1)
    assert "lost" not in capsys.readouterr().err
    damage(tmp_path / "run" / "metrics.csv")
    train(TwoGroups(max_steps=steps), tmp_path / "run", log_every=1)
    assert sentence in capsys.readouterr().err


def test_toy_images_are_a_function_of_the_position() -> None:
    assert torch.equal(image_batch(range(3, 5))["image"], image_batch(range(53, 55))["image"])
