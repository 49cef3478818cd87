"""`ldmlab demo`: every step of the flow, with the commands a user would type, on the images of the repository."""

import argparse
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from ldmlab.app.compose import quoted
from ldmlab.errors import InputError

ROOT = Path(__file__).parents[4]  # the checkout: train.py, evaluate.py and data/emoji-256 lie there
_STEPS = Path(__file__).with_suffix(".yaml")
_MARK = ".demo"  # in the folder of a demo


class Step(NamedTuple):
    title: str
    command: list[str]
    makes: Path  # exists once the step is finished
    minutes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default: runs/demo)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo made there, and begin again")


def run(args: argparse.Namespace) -> None:
    """Run the steps that are not done yet, each as its own process."""
    from ldmlab.build import pick_device

    if not (ROOT / "train.py").exists() or not (ROOT / "data/emoji-256").exists():
        raise InputError("ldmlab demo needs a checkout of the repository: clone it, then run `make demo` there.")
    gpu = args.device != "cpu" and pick_device(args.device).type == "cuda"
    steps = flow(args.out.resolve(), "gpu" if gpu else "cpu")
    _prepare(args.out, steps, args.fresh)
    total, machine = sum(step.minutes for step in steps), "a GPU" if gpu else "two CPU cores"
    print(f"The whole flow in {len(steps)} steps, about {total:.0f} minutes on {machine}.", flush=True)
    began = time.monotonic()
    for number, step in enumerate(steps, 1):
        _run_step(number, len(steps), step)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kilobytes on Linux
    print(f"\nFinished in {_duration(time.monotonic() - began)}; the largest step held {memory:.1f} GiB.")
    print(f"Images:  {args.out / 'samples' / 'grid.png'}")
    print(f"Report:    {args.out / 'evaluation' / 'report.html'}")
    model = shlex.quote(str(args.out / "text_to_image"))
    print(f'Try:       .venv/bin/ldmlab sample {model} "sleepy owl" --guidance-scale 3')


def _prepare(out: Path, steps: list[Step], fresh: bool) -> None:
    """The demo's folder; with `fresh` without what the steps made in it."""
    made = {out.resolve() / step.makes.relative_to(out.resolve()).parts[0] for step in steps}
    mark, found = out / _MARK, sorted(path.name for path in made if path.exists())
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a folder.")
    if fresh and found and not mark.exists():
        raise InputError(
            f"--fresh: {out} holds {', '.join(found)}, and nothing shows that a demo made them; delete them, or "
            "choose another --out."
        )
    for path in made if fresh else ():
        shutil.rmtree(path, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def flow(out: Path, recipe: str) -> list[Step]:
    """The demo's commands in order; `recipe` is cpu or gpu."""

    def path(match: re.Match[str]) -> str:
        text = f"{out}{match[1]}"
        return text if re.fullmatch(r"[\w./@:-]+", text) else quoted(text)

    steps = []
    for node in yaml.safe_load(_STEPS.read_text(encoding="utf-8")):
        words = [word.replace("{recipe}", recipe) for word in shlex.split(node["command"])]
        words = [  # options in Hydra's grammar; paths alone as they are
            re.sub(r"\{out\}([\w./]*)", path, word) if "=" in word else word.replace("{out}", str(out))
            for word in words
        ]
        steps.append(Step(node["title"], [sys.executable, *words], out / node["makes"], node["minutes"][recipe]))
    return steps


def _run_step(number: int, count: int, step: Step) -> None:
    print(f"\n[{number}/{count}] {step.title}: about {_duration(step.minutes * 60)}.", flush=True)
    if step.makes.exists():
        print("      done before; kept.", flush=True)
        return
    words = ["python", *(word.replace(f"{Path.cwd()}/", "") for word in step.command[1:])]
    print(f"      $ {shlex.join(words)}", flush=True)
    began = time.monotonic()
    code = subprocess.run(step.command, cwd=ROOT, check=False).returncode
    if code:
        print(f"ldmlab: the demo stopped in step {number}; run it again to continue from there.", file=sys.stderr)
        sys.exit(code)
    print(f"      took {_duration(time.monotonic() - began)}.", flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"
