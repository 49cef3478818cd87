"""Commands that two processes of one srun share, each on its own part of the work and its own device."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from walk import Flow

from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.evaluate import evaluate
from ldmlab.build import pick_device
from ldmlab.data.manifest import read_manifest


def work(command: str, flow: Flow, out: Path) -> None:
    """One of the commands, over little data."""
    features = [f"features.run={flow.root}/clip"]
    if command == "encode":
        flow.encode("batch_size=3", out=str(out.relative_to(flow.root)))
    elif command == "score":
        words = [str(flow.packed / "val"), str(flow.packed / "train"), *features, "--features", "clip_run"]
        words += [
            "--metrics",
            "fid",
            "metrics.fid.small_sample=true",
            "--device",
            "cpu",
            "--workers",
            "0",
            "--batch-size",
            "5",
        ]
        assert cli.dispatch(["score", *words, "--out", str(out / "scores.json")]) == 0
    else:
        options = [f"model={flow.root}/first_stage", "features=clip_run", *features, f"out={out}", "device=cpu"]
        options += ["protocol=reconstruction", "protocol.metrics.kid.subset_size=4", "batch_size=3"]
        evaluate(plain(compose("evaluate", options)))


def task(rank: int, world: int, port: int, command: str, flow: Flow, out: Path) -> None:
    """What srun starts: SLURM's variables alone, and no terminal."""
    torch.set_num_threads(1)
    numbers = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": world, "SLURM_LOCALID": rank, "SLURM_JOB_ID": 7}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    sys.stdin = open(os.devnull)  # noqa: SIM115  a shell's tasks have a terminal
    sys.stdout = sys.stderr = open(out.with_name(f"{out.name}.{rank}.log"), "w")  # noqa: SIM115
    work(command, flow, out)


def result(command: str, out: Path) -> dict[str, Any]:
    """What the command wrote, as numbers to compare."""
    if command == "encode":
        manifests = [read_manifest(out / split) for split in ("train", "val")]
        return {manifest.hash: manifest.total for manifest in manifests}
    found = json.loads((out / ("scores.json" if command == "score" else "metrics.json")).read_text())
    return {name: score["value"] for name, score in found["scores"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["encode", "evaluate", "score"])
def test_two_tasks_of_srun_share_the_work(command: str, flow: Flow) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, two = flow.root / f"{command}_one", flow.root / f"{command}_two"
    context = multiprocessing.get_context("fork")  # torch is loaded already
    tasks = [context.Process(target=task, args=(rank, 2, port, command, flow, two)) for rank in (0, 1)]
    for process in tasks:
        process.start()
    for process in tasks:
        process.join(200)
    logs = "".join(path.read_text() for path in flow.root.glob(f"{two.name}.*.log"))
    assert [process.exitcode for process in tasks] == [0, 0], logs
    work(command, flow, one)
    assert result(command, two) == pytest.approx(result(command, one), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("typed", "own"), [("auto", "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1")])
def test_each_process_has_its_own_device(typed: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every command: all of them ask `pick_device`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert pick_device(typed) == torch.device(own)
