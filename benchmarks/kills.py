"""Kill training at named points and at any moment; the run that goes on must be the run that was never killed.

    python benchmarks/kills.py --strategy fsdp --processes 2 --kills 30 --seed 0
    python benchmarks/kills.py --strategy ddp --kills 150          also auto (one process: --processes 1) and hsdp
    python benchmarks/kills.py --strategy fsdp --seed 0 --only 7   the seventh run of that seed again

A run of 12 steps of a tiny model on the CPU is killed (SIGKILL) or asked to stop (SIGTERM, SIGINT, SIGUSR1, SIGUSR2)
once to three times, one of its processes or all of them, and then goes on to its end. Its last and its best checkpoint
(weights, averages, optimizers, random states, notes), snapshots of averages and metrics.csv are compared bit for bit
with those of a run without kills. A process whose partner is killed has to end by itself, with one sentence. A fault
follows from seed, number and strategy, but for the moments by the clock.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "training"))

import forked
from faults.kill_points import MODELS, PATIENCE_SECONDS, POINTS, RESUMING, arm
from toy_stages import train

from ldmlab import averaging, distributed
from ldmlab.app.cli import run_command
from ldmlab.checkpoints import load_checkpoint
from ldmlab.training.callbacks.average_snapshots import PowerAverages
from ldmlab.training.signals import STOPPING

STEPS, SAID = 12, 2  # SAID: exit code of a process that ended with one sentence
ANY, STOPPED, GOOD = "any moment", "any moment, asked to stop", "bit-identical"


@dataclass
class Run:
    """Of one model over several processes."""

    path: Path
    model: str
    strategy: str
    world: int
    kills: list[tuple[str, str]] = field(default_factory=list)  # point, and `one` or `all`
    verdict: str = GOOD
    seconds: float = 0.0  # of a run without kills

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def start(self, point: str = "", turn: int = 0, at: int = 0) -> list[Any]:
        """Its processes; process `at` waits where it is at `point` for the `turn`-th time."""
        return forked.group(self.world, member, self, point, turn, at, log=self.log)

    def reached(self) -> list[Path]:
        """A file of every process that waits to be killed."""
        return [*self.path.parent.glob(f"{self.path.name}.reached.*")]

    def counts(self, rank: int) -> Path:
        return self.path.with_suffix(f".counts.{rank}.json")


def member(rank: int, world: int, run: Run, point: str, turn: int, at: int) -> None:
    """A process of a run."""
    os.dup2(sys.stderr.fileno(), 2)  # what torch itself says of a lost process goes into the log too
    local = world // 2 if run.strategy == "hsdp" else world
    os.environ.update(LOCAL_WORLD_SIZE=str(local), LOCAL_RANK=str(rank % local))
    calls: Counter[str] = Counter()
    stage = MODELS[run.model]()
    for name in POINTS:
        turns = {turn} if name == point and at == rank else set()
        arm(name, turns, run.path.with_name(f"{run.path.name}.reached.{rank}"), calls, type(stage))
    every = {"log_every": 2, "validate_every": 4, "checkpoint_every": 3, "strategy": run.strategy}

    def started() -> None:
        distributed.join(timeout_minutes=PATIENCE_SECONDS / 300)
        train(stage, run.path, 2, world, rank, [PowerAverages(every=5)], **every)

    if code := run_command(started):
        sys.exit(code)
    run.counts(rank).write_text(json.dumps(calls))


def kill(run: Run, straight: Run, rng: random.Random) -> None:
    """One try of a run: it is killed, or it ends before that comes."""
    calls = [json.loads(straight.counts(rank).read_text()) for rank in range(run.world)]
    saved = max((path.name for path in run.path.glob("checkpoints/step_*.ckpt")), default="step_00000000")
    left = 1 - int(saved[5:13]) / STEPS
    known = [name for name in POINTS if any(name in own for own in calls)] + [RESUMING] * (left < 1)
    point = rng.choice([*known, *[ANY] * 4, *[STOPPED] * 4])
    at = rng.choice([rank for rank, own in enumerate(calls) if point in own] or range(run.world))
    turn = rng.randint(1, max(int(calls[at].get(point, 1) * left), 1))
    victims = "one" if run.world > 1 and rng.random() < 0.6 else "all"
    timed, number = point in (ANY, STOPPED), rng.choice(STOPPING) if point == STOPPED else signal.SIGKILL
    delay = rng.random() * (straight.seconds if timed else 0.3)
    children = run.start(point, turn, at)
    while not (timed or run.reached()) and any(child.is_alive() for child in children):
        time.sleep(0.002)
    time.sleep(delay)  # at a point the other processes and threads go on meanwhile
    chosen = [children[at]] if victims == "one" else children
    if alive := [child for child in chosen if child.is_alive()]:
        run.kills.append((point, victims))
    for child in alive:
        os.kill(child.pid, number)
    for file in run.reached():
        file.unlink()
    codes = forked.finish(*children, seconds=PATIENCE_SECONDS)
    if bad := [code for code in codes if code not in (0, SAID, -number, 128 + number)]:
        run.verdict = "hang" if None in bad else "traceback"


def compare(run: Run, straight: Run) -> None:
    """The verdict on a run that has ended."""
    try:
        forked.same(result(run.path), result(straight.path))
    except AssertionError as error:
        run.verdict = f"differs: {str(error).splitlines()[0]}"


def result(path: Path) -> dict[str, Any]:
    """What two runs must have in common."""
    with open(path / "metrics.csv", newline="") as file:
        rows = [
            {k: v for k, v in row.items() if "speed/" not in k and "memory/" not in k} for row in csv.DictReader(file)
        ]
    # of older ones it depends on the kills which are left
    kept = [max((path / "checkpoints").glob(pattern)) for pattern in ("step_*.ckpt", "best_step_*.ckpt")]
    left = [file for file in path.rglob("*") if "checkpoints" not in file.parts or file.name.endswith(".part")]
    averages = sorted((path / averaging.FOLDER).glob("step_*"))
    return {
        "metrics.csv": rows,
        "files": sorted(str(file.relative_to(path)) for file in left if file.name != ".lock"),
        "checkpoints": {file.name: load_checkpoint(file) for file in kept},
        "averages": {file.name: safetensors.torch.load_file(file) for file in averages},
    }


def table(runs: list[Run]) -> str:
    """Kills by point, and how their runs ended."""
    lines = ["| killed at | of one process | of all | their runs bit-identical |", "| --- | --- | --- | --- |"]
    for point in [ANY, STOPPED, *POINTS, "all"]:
        hits = [(run, who) for run in runs for where, who in run.kills if point in (where, "all")]
        good = sum(run.verdict == GOOD for run, _ in hits)
        count = Counter(who for _, who in hits)
        if hits:
            lines.append(f"| {point} | {count['one']} | {count['all']} | {good} of {len(hits)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Kill, compare, print; 1 where a run is not the one without kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="fsdp", choices=("auto", "ddp", "fsdp", "hsdp"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=30, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the run of this number, again")
    parser.add_argument("--out", help="a new folder for runs and logs; those of good runs are deleted")
    args = parser.parse_args(words)
    folder = Path(args.out or tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=args.out is None)
    return campaign(args, folder)


def campaign(args: argparse.Namespace, folder: Path) -> int:
    """Runs until there are enough kills; the number of bad ones."""
    names = ["denoiser", "dropout" if args.strategy in ("fsdp", "hsdp") else "autoencoder with adversary"]
    straights: dict[str, Run] = {}
    runs: list[Run] = []
    for number in [args.only] if args.only else itertools.count(1):
        rng = random.Random(f"{args.seed}:{number}:{args.strategy}")
        run = Run(folder / f"run-{number:03d}", names[number % 2], args.strategy, args.processes)
        if run.model not in straights:
            straights[run.model] = Run(folder / f"straight-{number}", run.model, args.strategy, args.processes)
            finish(straights[run.model])
            assert straights[run.model].verdict == GOOD, straights[run.model].log.read_text()
        runs.append(tried(run, straights[run.model], rng))
        done = sum(len(run.kills) for run in runs)
        if run.verdict != GOOD:
            print(
                f"{done} kills: --only {number}, {run.model}, killed at {run.kills}: {run.verdict}; {run.log}",
                flush=True,
            )
        elif not args.only:
            for path in folder.glob(f"{run.path.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if done >= args.kills:
            break
    print(table(runs))
    return min(sum(run.verdict != GOOD for run in runs), 1)


def tried(run: Run, straight: Run, rng: random.Random) -> Run:
    """Killed once to three times, ended and compared."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if run.verdict == GOOD:
            kill(run, straight, rng)
    if run.verdict == GOOD:
        finish(run)
    if run.verdict == GOOD:
        compare(run, straight)
    return run


def finish(run: Run) -> None:
    """To its last step."""
    begun = time.monotonic()
    codes = forked.finish(*run.start(), seconds=PATIENCE_SECONDS)
    run.seconds = time.monotonic() - begun
    if codes != [0] * run.world:
        run.verdict = f"does not go on: exit codes {codes}"


if __name__ == "__main__":
    sys.exit(main())
