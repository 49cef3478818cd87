"""Faults of jobs: kills at any moment, launch environments, two commands at once."""

import csv
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from faults.base import COMMANDS, MADE, digest
from faults.cases import Case, last_lines
from faults.commands import Beside

DENOISER = COMMANDS["denoiser"]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# ---- kills ----


def kill_and_resume(case: Case) -> None:
    """A training job killed once or twice at random moments, then run to its end: bit for bit the one without kills."""
    name = case.rng.choice(("denoiser", "first_stage"))
    case.copy(*(("packed", "latents") if name == "denoiser" else ("packed",)))
    workers = case.rng.choice((0, 0, 2))
    argv = [word.replace("data.workers=0", f"data.workers={workers}") for word in COMMANDS[name]]
    run, sent = case.work / MADE[name], []
    usual = case.base.results[name].seconds
    for _ in range(case.rng.choice((1, 1, 2))):
        number = case.rng.choice(SIGNALS)
        moment, what = any_moment(case.rng, run, usual)
        sent.append(f"{signal.Signals(number).name} {what}")
        result = case.run(argv, beside=killer(number, moment))
        if result.code is not None and result.code > 0 and result.code < 128 and not result.sentence:
            case.set("traceback", f"killed by {number}: {last_lines(result)}")
    case.outcome.planted = f"{name}, {workers} workers, {', '.join(sent)}"
    result = case.run(argv)
    if case.outcome.how != "harmless":
        return
    if result.code != 0:
        case.set("silent", f"does not go on: {result.sentence or last_lines(result)}")
    elif digest(name, case.work) != case.base.digests[name]:
        case.set("silent", "the last checkpoint differs from that of the run without kills")
    elif table_rows(run) != table_rows(case.base.root / MADE[name]):
        case.set("silent", "metrics.csv has other rows than that of the run without kills")
    elif left := [path.name for path in run.rglob("*.part")]:
        case.set("silent", f"{left[0]} is left")


def any_moment(rng: random.Random, run: Path, usual: float) -> tuple[Callable[[], bool], str]:
    """When to kill: a time after the start, a row of metrics, a checkpoint being written."""
    kind = rng.choice(("time", "rows", "part", "checkpoint"))
    if kind == "time":
        delay = rng.uniform(0, 1.2 * usual)
        end = time.monotonic() + delay
        return (lambda: time.monotonic() > end), f"after {delay:.2f} s"
    if kind == "rows":
        rows = rng.randrange(1, 10)
        return (lambda: _lines(run / "metrics.csv") > rows), f"after row {rows}"
    if kind == "part":
        return (lambda: any((run / "checkpoints").glob(".*.part"))), "while a checkpoint is written"
    step = rng.choice((3, 6))
    return (lambda: (run / "checkpoints" / f"step_{step:08d}.ckpt").exists()), f"after the checkpoint of step {step}"


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def killer(number: int, moment: Callable[[], bool]) -> Beside:
    def kill(pids: list[int]) -> None:
        while not moment():
            os.kill(pids[0], 0)
            time.sleep(0.001)
        os.kill(pids[0], number)

    return kill


def table_rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without times."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value for key, value in row.items() if not key.startswith(("speed/", "time", "memory"))} for row in rows
    ]


# ---- environments and neighbours ----

ENVIRONMENTS = [
    {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "bash"},
    {
        "SLURM_NTASKS": "4",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "interactive",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
    },
    {"RANK": "0"},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"},
    {"WORLD_SIZE": "two"},
    {"LDMLAB_PLUGINS": "no_such_package"},
    {"LDMLAB_PLUGINS": "os,,"},
    {"CUDA_VISIBLE_DEVICES": "9"},
    {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "LANG": "C"},
    {"COLUMNS": "3", "TERM": "dumb", "NO_COLOR": "1"},
    {"WANDB_MODE": "nonsense"},
    {"HOME": "/nowhere"},
    {"OMP_NUM_THREADS": "x"},
    {"MASTER_PORT": "99999999", "MASTER_ADDR": "nowhere.invalid"},
]


def environments(case: Case) -> None:
    """Variables of launchers, shells and services that are half there or wrong."""
    case.copy("packed", "latents")
    if case.rng.random() < 0.2:
        place = case.folder / "work" / ("t" * case.rng.choice((100, 150, 200)))
        place.mkdir()
        environment, workers = {"TMPDIR": str(place)}, 2
    else:
        environment, workers = case.rng.choice(ENVIRONMENTS), case.rng.choice((0, 0, 2))
    case.outcome.planted = f"{environment}, {workers} workers"
    argv = [word.replace("data.workers=0", f"data.workers={workers}") for word in DENOISER]
    case.classify(case.run(argv, environment=environment, anew=True), "denoiser")


def two_commands(case: Case) -> None:
    """A second command into the folder of a first one that is still at work, or that was killed."""
    name = case.rng.choice(("pack", "encode", "export", "denoiser"))
    needs = {"pack": ["images"], "encode": ["packed", "first_stage"], "export": ["denoiser"]}
    case.copy(*needs.get(name, ["packed", "latents"]))
    if name == "denoiser":
        shutil.rmtree(case.work / "denoiser", ignore_errors=True)
    delay = case.rng.uniform(0, case.base.results[name].seconds)
    case.outcome.planted = f"{name}, the second {delay:.2f} s after the first"

    note = case.folder / "run_second"

    def beside(pids: list[int]) -> None:
        time.sleep(delay)
        other = case.run(COMMANDS[name])
        if other.code and not other.sentence:
            case.set("traceback", last_lines(other))
        note.write_text(f"{case.outcome.how}\n{case.outcome.detail}")

    first = case.run(COMMANDS[name], beside=beside)
    how, _, detail = note.read_text().partition("\n") if note.exists() else ("hang", "", "has no end")
    case.set(how, f"the second: {detail}")
    case.classify(first, name)


KINDS = {
    "kill and resume, bit for bit": kill_and_resume,
    "jobs: environments": environments,
    "jobs: two commands": two_commands,
}
