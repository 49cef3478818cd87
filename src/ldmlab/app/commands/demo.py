"""`ldmlab demo`: every step of the flow, with the commands a user would type, on the images of the repository."""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ldmlab.errors import InputError

ROOT = Path(__file__).parents[4]  # the checkout: train.py, evaluate.py and data/emoji-256 lie there
CAPTIONS = (
    "red apple",
    "smiling face with sunglasses",
    "thumbs up, medium skin tone",
    "clock face three oclock",
    "flag of a country, red and white",
    "cat face",
    "woman with red hair",
    "blue heart",
)
SAMPLING = ("--guidance-scale", "3", "--seed", "7")
SCORING = ("protocol=demo_emoji", "features=clip_run")
RECONSTRUCTIONS = ("protocol=reconstruction", "features=clip_run")
SWEEP = "steps=1,2,5,10,25,50"


class Step(NamedTuple):
    """One command of the flow, its result and its duration."""

    title: str
    command: list[str]
    makes: Path  # exists once the step is finished
    minutes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default: runs/demo)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--fresh", action="store_true", help="delete the folder's earlier demo and begin again")


def run(args: argparse.Namespace) -> int:
    """Run the steps that are not done yet, each as its own process."""
    if not (ROOT / "train.py").exists() or not (ROOT / "data/emoji-256").exists():
        raise InputError("ldmlab demo needs a checkout of the repository: clone it, then run `make demo` there.")
    if args.fresh and args.out.exists():
        shutil.rmtree(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = "gpu" if _has_gpu(args.device) else "cpu"
    steps = flow(args.out.resolve(), recipe)
    total = sum(step.minutes for step in steps)
    print(f"The whole flow in {len(steps)} steps, about {total:.0f} minutes on {_machine(recipe)}.", flush=True)
    began = time.monotonic()
    for number, step in enumerate(steps, 1):
        _run_step(number, len(steps), step)
    _closing(args.out, time.monotonic() - began)
    return 0


def flow(out: Path, recipe: str) -> list[Step]:
    """The demo's commands in order; `recipe` is cpu or gpu."""
    return [*_to_latents(out, recipe), *_model(out, recipe), *_images(out, recipe)]


def _to_latents(out: Path, recipe: str) -> list[Step]:
    """First stage and CLIP, then the latents."""
    first_stage, clip, latents, minutes = out / "first_stage", out / "clip", out / "latents", MINUTES[recipe]
    return [
        Step(
            "Train the first stage: images to latents and back",
            [*_TRAIN, f"experiment=demo/{recipe}_first_stage", f"run.dir={first_stage}"],
            first_stage / "finished.json",
            minutes["first_stage"],
        ),
        Step(
            "Train a small CLIP: captions and images in one space",
            [*_TRAIN, f"experiment=demo/{recipe}_clip", f"run.dir={clip}"],
            clip / "finished.json",
            minutes["clip"],
        ),
        Step(
            "Score the first stage: reconstructions of validation images",
            [*_EVALUATE, f"model={first_stage}", f"features.run={clip}", *RECONSTRUCTIONS],
            first_stage / "evaluation" / "reconstruction" / "report.html",
            minutes["latents"],
        ),
        Step(
            "Encode: every image to the moments of its latent, once",
            [*_LDMLAB, "encode", "data=emoji", f"from_run={first_stage}", f"out={latents}"],
            latents / "train" / "manifest.json",
            minutes["latents"],
        ),
    ]


def _model(out: Path, recipe: str) -> list[Step]:
    """The denoiser."""
    options = [f"data.latents={out / 'latents'}", f"conditioner.text.from_run={out / 'clip'}"]
    return [
        Step(
            "Train the denoiser on the latents, conditioned on the caption",
            [*_TRAIN, f"experiment=demo/{recipe}_text_to_image", *options, f"run.dir={out / 'text_to_image'}"],
            out / "text_to_image" / "finished.json",
            MINUTES[recipe]["text_to_image"],
        )
    ]


def _images(out: Path, recipe: str) -> list[Step]:
    """Samples of the model, and its scores."""
    model, scores, minutes = out / "text_to_image", out / "evaluation", MINUTES[recipe]
    return [
        Step(
            "Sample: images from noise, and the denoising trajectory",
            [*_LDMLAB, "sample", str(model), *CAPTIONS, *SAMPLING, "--trajectory", "--out", str(out / "samples")],
            out / "samples" / "grid.png",
            minutes["samples"],
        ),
        Step(
            "Sample again with fewer and more steps",
            [*_LDMLAB, "sample", str(model), *CAPTIONS[:4], *SAMPLING, "--sweep", SWEEP, "--out", str(out / "sweep")],
            out / "sweep" / "sweep_steps.png",
            minutes["samples"],
        ),
        Step(
            "Score the model and write the report",
            [*_EVALUATE, f"model={model}", f"features.run={out / 'clip'}", *SCORING, f"out={scores}", _grids(out)],
            scores / "report.html",
            minutes["evaluation"],
        ),
    ]


def _grids(out: Path) -> str:
    """Images made by the sampling steps, for the report."""
    trajectory, sweep = out / "samples" / "000000_trajectory.png", out / "sweep" / "sweep_steps.png"
    return f"images=[['From noise to image','{trajectory}'],['Fewer and more steps','{sweep}']]"


_TRAIN, _EVALUATE, _LDMLAB = ([sys.executable, *words] for words in (["train.py"], ["evaluate.py"], ["-m", "ldmlab"]))
_STEPS = ("first_stage", "clip", "latents", "text_to_image", "samples", "evaluation")
MINUTES = {
    recipe: dict(zip(_STEPS, minutes, strict=True))
    for recipe, minutes in (("cpu", (3.2, 1.5, 0.3, 8.5, 0.4, 1.8)), ("gpu", (0.7, 0.4, 0.2, 1.0, 0.2, 0.4)))
}


def _run_step(number: int, count: int, step: Step) -> None:
    print(f"\n[{number}/{count}] {step.title}: about {_duration(step.minutes * 60)}.", flush=True)
    if step.makes.exists():
        print("      done before; kept.", flush=True)
        return
    print("      $ " + " ".join(_shown(word) for word in step.command), flush=True)
    began = time.monotonic()
    code = subprocess.run(step.command, cwd=ROOT, check=False).returncode
    if code:
        print(f"ldmlab: the demo stopped in step {number}; run it again to continue from there.", file=sys.stderr)
        sys.exit(code)
    print(f"      took {_duration(time.monotonic() - began)}.", flush=True)


def _shown(word: str) -> str:
    """An argument, quoted for a shell."""
    word = "python" if word == sys.executable else word.replace(f"{Path.cwd()}/", "")
    return f'"{word}"' if " " in word else word


def _closing(out: Path, seconds: float) -> None:
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kilobytes on Linux
    print(f"\nFinished in {_duration(seconds)}; the largest step held {memory:.1f} GiB.")
    print(f"Images:  {out / 'samples' / 'grid.png'}")
    print(f"Report:    {out / 'evaluation' / 'report.html'}")
    print(f'Try:       .venv/bin/ldmlab sample {out / "text_to_image"} "sleepy owl" --guidance-scale 3')


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _has_gpu(device: str) -> bool:
    if device == "cpu":
        return False
    import torch

    if torch.cuda.is_available():
        return True
    if device == "cuda":
        raise InputError("--device=cuda: torch finds no GPU here; leave the option out to use the CPU.")
    return False


def _machine(recipe: str) -> str:
    return "a GPU" if recipe == "gpu" else "two CPU cores"
