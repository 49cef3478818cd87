"""Plant faults into the flow and count what comes of them.

    python benchmarks/campaign.py --seed 7 --jobs 4            1,000 faults: 25 minutes of one processor, half on two
    python benchmarks/campaign.py --seed 7 --faults 40         a slice
    python benchmarks/campaign.py --seed 7 --only "disk full" --fault 3 --keep     one again; its folder stays
    python benchmarks/campaign.py --seed 7 --out FOLDER        goes on where it stopped: what FOLDER notes as good stays

A fault follows from the seed, its kind and its number, so that a bad one can be repeated. Rows: survived: no traceback,
no hang, no silent loss, nothing ran; named clearly: refused in one sentence, or said (skipped, counted); silent loss:
another result than without the fault, and not a word. Every fault is a line of FOLDER/faults.jsonl.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults import command_faults, data_faults, disk_faults, job_faults, model_faults, option_faults, rank_faults
from faults.base import Base, build
from faults.cases import GOOD, Case, Outcome
from faults.commands import preload

KINDS: dict[str, Callable[[Case], None]] = {
    **job_faults.KINDS,
    **rank_faults.KINDS,
    **disk_faults.KINDS,
    **disk_faults.MOUNTED,
    **option_faults.KINDS,
    **command_faults.KINDS,
    **data_faults.KINDS,
    **model_faults.KINDS,
}
SHARES = {  # of the faults, in proportion; 1 where nothing is said
    "kill and resume, bit for bit": 2.0,
    "data: tars of others": 2.0,
    "models: model.yaml": 2.0,
    "options: wrong types": 2.0,
    "jobs: two commands": 0.5,
    "disk: no place": 0.5,
    "jobs: environments": 0.5,
    "data: latents' first stage": 0.5,
}
COLUMNS = ("kind", "faults", "survived", "named clearly", "silent losses", "tracebacks", "hangs", "ran / wrote outside")


def main() -> int:
    """Build the flow, plant faults, classify the outcomes, print."""
    args = _arguments()
    folder = Path(args.out or tempfile.mkdtemp(prefix="campaign-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    preload()
    if not disk_faults.can_mount():
        print(f"left out, for this machine lets nobody mount: {', '.join(disk_faults.MOUNTED)}")
        for kind in disk_faults.MOUNTED:
            del KINDS[kind]
    base = build(folder / "base")
    print(f"{folder}: the flow without faults took {time.monotonic() - started:.0f} s", flush=True)
    done = _done(folder / "faults.jsonl", args.seed)
    plan = list(_plan(args))
    outcomes = [done[fault] for fault in plan if fault in done]
    _run_all([fault for fault in plan if fault not in done], outcomes, base, folder, args)
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if outcome.how not in GOOD]
    for outcome in bad:
        print(f"{outcome.how}: --only {outcome.kind!r} --fault {outcome.number}: {outcome.planted} -> {outcome.detail}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.monotonic() - started
    print(f"{len(outcomes)} faults in {seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of them on a processor")
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="another seed plants other faults (0)")
    parser.add_argument("--faults", type=int, default=1000, help="how many at least, over all kinds (1000)")
    parser.add_argument("--only", choices=sorted(KINDS), metavar="KIND", help=f"one kind: {', '.join(KINDS)}")
    parser.add_argument("--fault", type=int, help="with --only: this number alone")
    parser.add_argument("--keep", action="store_true", help="keep the folders of faults that went badly")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (2)")
    parser.add_argument("--out", help="folder for the flow, the faults and faults.jsonl; default: a new temporary one")
    return parser.parse_args()


def _plan(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Kind and number of every fault, kinds in turn so that an early end has seen all."""
    if args.only and args.fault is not None:
        yield args.only, args.fault
        return
    kinds = [args.only] if args.only else list(KINDS)
    weights = {kind: SHARES.get(kind, 1.0) for kind in kinds}
    total = sum(weights.values())
    counts = {kind: math.ceil(args.faults * weight / total) for kind, weight in weights.items()}  # at least
    planned = [(number / counts[kind], kind, number) for kind in kinds for number in range(counts[kind])]
    yield from ((kind, number) for _, kind, number in sorted(planned))


def _done(log: Path, seed: int) -> dict[tuple[str, int], Outcome]:
    """What an earlier call in this folder noted with this seed and as good; the bad ones are planted again."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    records = [record for record in map(json.loads, lines) if record.pop("seed") == seed]
    return {(record["kind"], record["number"]): Outcome(**record) for record in records if record["how"] in GOOD}


def _run_all(
    plan: list[tuple[str, int]], outcomes: list[Outcome], base: Base, folder: Path, args: argparse.Namespace
) -> None:
    """Each fault in a process of its own, `--jobs` at a time; what came of them is added to `outcomes`."""
    running: dict[int, tuple[str, int, Path]] = {}
    waiting, total = plan[::-1], len(outcomes) + len(plan)
    with open(folder / "faults.jsonl", "a", encoding="utf-8") as log:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                kind, number = waiting.pop()
                place = folder / f"{sorted(KINDS).index(kind):02d}-{number:04d}"
                shutil.rmtree(place, ignore_errors=True)  # of an earlier call
                running[_fork(kind, number, place, base, args)] = kind, number, place
            pid, _ = os.wait()
            if pid not in running:
                continue
            outcome = _read(*running.pop(pid))
            outcomes.append(outcome)
            log.write(json.dumps({"seed": args.seed, **outcome.record()}) + "\n")
            log.flush()
            if outcome.how not in GOOD:
                where = f"{len(outcomes)}/{total} {outcome.kind} {outcome.number}"
                print(f"{where}: {outcome.how}: {outcome.planted} -> {outcome.detail[:200]}", flush=True)


def _fork(kind: str, number: int, place: Path, base: Base, args: argparse.Namespace) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        case = Case(base, place, random.Random(f"{args.seed}:{kind}:{number}"), kind, number)
        try:
            KINDS[kind](case)
        except BaseException:
            case.set("traceback", f"the campaign itself failed: {traceback.format_exc()[-500:]}")
        outcome = case.close(args.keep)
        place.with_suffix(".json").write_text(json.dumps(outcome.record()))
    finally:
        os._exit(0)


def _read(kind: str, number: int, place: Path) -> Outcome:
    note = place.with_suffix(".json")
    if not note.is_file():
        return Outcome(kind, number, "?", "traceback", "the campaign's own process died")
    outcome = Outcome(**json.loads(note.read_text()))
    note.unlink()
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """A row a kind, as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    kinds = [kind for kind in KINDS if any(outcome.kind == kind for outcome in outcomes)]
    for kind in [*kinds, "all"]:
        hows = [outcome.how for outcome in outcomes if kind in (outcome.kind, "all")]
        good = sum(how in GOOD for how in hows)
        named = hows.count("named") + hows.count("said")
        numbers = (len(hows), good, named, hows.count("silent"), hows.count("traceback"), hows.count("hang"))
        ran = hows.count("ran") + hows.count("outside")
        lines.append(f"| {kind} | {' | '.join(map(str, (*numbers, ran)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
