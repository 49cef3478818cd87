"""The flow at sizes of seconds, run once without faults: what every fault is planted into and compared with."""

import csv
import hashlib
import json
import math
import pickle
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from faults.commands import Limits, Result, run, run_group

SHAPES = ("ellipse", "rectangle", "triangle")
STEPS = 9  # of every training: more than one epoch of the images, so that each is seen
DATA = ["data.train=packed/train", "data.val=packed/val", "data.image_size=16", "data.workers=0"]
FIELDS = ["data.fields=[caption,class_id]"]
LOOP = [
    f"trainer.max_steps={STEPS}",
    "trainer.validate_every=9",
    "trainer.checkpoint_every=3",
    "trainer.log_every=1",
    "trainer.micro_batch=6",
    "trainer.precision=32-true",
    "logger=csv",
]
FIRST_STAGE = [
    "experiment=mine/first_stage",
    *DATA,
    *FIELDS,
    *LOOP,
    "first_stage.channels=8",
    "first_stage.norm_groups=4",
]
DENOISER = [
    *["experiment=mine/text_to_image", "conditioner=class_label", "data.latents=latents", *DATA, *FIELDS, *LOOP],
    *["backbone.model_channels=32", "backbone.channel_mult=[1]", "stage.panel_steps=2", "stage.panel_count=2"],
    *["conditioner.class_label.width=16"],
]
CLIP = [
    *["experiment=mine/clip", *DATA, *LOOP, "trainer.max_steps=3", "clip.config.vision_cfg.layers=1"],
    *["clip.config.text_cfg.layers=1", "clip.config.vision_cfg.width=32", "clip.config.text_cfg.width=32"],
]
EVALUATION = [
    *["model=first_stage", "protocol=reconstruction", "features=clip_run", "features.run=clip"],
    *["~protocol.metrics.fid", "protocol.shown=2", "keep_reference=false", "wandb=false", "out=evaluated"],
]
COMMANDS: dict[str, list[str]] = {  # in the order in which they need each other
    "pack": [
        *["pack", "images", "packed", "--size", "16", "--val", "0.2", "--workers", "1"],
        *["--class-field", "kind", "--shard-size", "20"],
    ],
    "first_stage": ["train", *FIRST_STAGE, "run.dir=first_stage"],
    "encode": ["encode", "data=shards", *DATA[:2], "from_run=first_stage", "out=latents", "data.workers=0"],
    "denoiser": ["train", *DENOISER, "run.dir=denoiser"],
    "export": ["export", "denoiser", "model", "--without-card"],
    "clip": ["train", *CLIP, "run.dir=clip"],
    "evaluate": ["evaluate", *EVALUATION],
    "sample": ["sample", "model", "4", "--steps", "4", "--out", "samples", "--seed", "1"],
}
PAIR = ["train", *DENOISER, "run.dir=denoiser", "trainer.micro_batch=3", "trainer.timeout_minutes=0.33"]  # for two
MADE = {"pack": "packed", "first_stage": "first_stage", "encode": "latents", "denoiser": "denoiser", "export": "model"}


@dataclass
class Base:
    """The folders of the flow without faults, and what each command printed and made."""

    root: Path
    results: dict[str, Result] = field(default_factory=dict)
    digests: dict[str, Any] = field(default_factory=dict)

    def copy(self, names: list[str], folder: Path) -> None:
        """Some of its folders, to be damaged."""
        for name in names:
            shutil.copytree(self.root / name, folder / name, symlinks=True)


def build(root: Path) -> Base:
    """Run the flow, or read what an earlier call noted of it; a failure here is no fault planted and ends it."""
    note = root / "flow.pickle"
    if note.is_file():
        found: Base = pickle.loads(note.read_bytes())
        return found
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    work = root / "work"
    work.mkdir()
    draw_images(work / "images")
    base = Base(work)
    for name, argv in COMMANDS.items():
        result = run(argv, work, tag=name)
        if result.code != 0:
            raise SystemExit(f"the flow without faults fails at {name}: {result.text[-2000:]}")
        base.results[name] = result
        base.digests[name] = digest(name, work)
    _indexed(base, root / "indexed")
    _of_two(base, root / "pair")
    note.write_bytes(pickle.dumps(base))
    return base


def _indexed(base: Base, work: Path) -> None:
    """The first stage on the same tars as others' tools leave them: with a manifest by `ldmlab index`."""
    work.mkdir()
    base.copy(["packed"], work)
    (work / "packed" / "train" / "manifest.json").unlink()
    for argv in (["index", "packed/train", "--workers", "1"], COMMANDS["first_stage"]):
        result = run(argv, work, tag="indexed")
        if result.code != 0:
            raise SystemExit(f"the flow without faults fails at {argv[0]} of indexed tars: {result.text[-2000:]}")
        base.results[argv[0]] = result
    base.digests["indexed"] = digest("first_stage", work)


def _of_two(base: Base, work: Path) -> None:
    """The denoiser trained by two processes."""
    from faults.rank_faults import environments

    work.mkdir()
    base.copy(["packed", "latents"], work)
    results = run_group(PAIR, work, [Limits(environment=each) for each in environments()], "pair")
    if any(result.code != 0 for result in results):
        raise SystemExit(f"the flow without faults fails with two processes: {results[0].text[-2000:]}")
    base.results["pair"] = results[0]
    base.digests["pair"] = digest("denoiser", work)


def draw_images(folder: Path, count: int = 54) -> None:
    """Coloured shapes with captions and classes in metadata.jsonl."""
    choose, rows = random.Random(0), []
    folder.mkdir(parents=True)
    for number in range(count):
        kind = SHAPES[number % 3]
        image = Image.new("RGB", (24, 24), tuple(choose.randrange(256) for _ in range(3)))
        corners = [
            (choose.randrange(2, 8), choose.randrange(2, 8)),
            (choose.randrange(14, 22), choose.randrange(14, 22)),
        ]
        colour = tuple(choose.randrange(256) for _ in range(3))
        if kind == "triangle":
            ImageDraw.Draw(image).polygon([*corners, (4, 20)], fill=colour)
        else:
            getattr(ImageDraw.Draw(image), kind)(corners, fill=colour)
        image.save(folder / f"{number:03d}.png")
        rows.append({"file_name": f"{number:03d}.png", "caption": f"a {kind}, number {number}", "kind": kind})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def digest(name: str, work: Path) -> Any:
    """What a command made, so that two runs can be compared; None where it made nothing."""
    if name == "evaluate":
        return scores(work / "evaluated" / "metrics.json")
    if name == "clip":
        return newest_state(work / name)
    if name in ("first_stage", "denoiser"):
        return [newest_state(work / MADE[name]), validation(work / MADE[name])]
    if name in ("pack", "encode"):
        return shard_content(work / MADE[name])
    if name == "sample":
        return sorted(pixel_hash(path) for path in (work / "samples").rglob("*.png")) or None
    return sorted((path.name, file_hash(path)) for path in (work / MADE[name]).glob("*.safetensors")) or None


def newest_state(run_folder: Path) -> str | None:
    """A hash of everything in the newest checkpoint that a resumed run must have bit for bit."""
    files = sorted((run_folder / "checkpoints").glob("step_*.ckpt"))
    if not files:
        return None
    content = torch.load(files[-1], map_location="cpu", weights_only=True)
    kept = {key: content[key] for key in ("step", "modules", "averaged", "optimizers", "rng") if key in content}
    return hashlib.sha256(_bytes(kept)).hexdigest()[:16]


def scores(path: Path) -> Any:
    """The numbers of an evaluation's record; times and places are left out."""
    content = json.loads(path.read_text())
    return {
        key: content[key] for key in sorted(content) if key in ("metrics", "scores", "images", "samples", "reference")
    }


def validation(run_folder: Path) -> list[dict[str, str]]:
    """What validation measured, from metrics.csv."""
    with open(run_folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [{key: row[key] for key in row if key.startswith("val/")} for row in csv.DictReader(file)]
    return [row for row in rows if any(row.values())]


def _bytes(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return b"{" + b",".join(str(key).encode() + b":" + _bytes(value[key]) for key in sorted(value, key=str)) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_bytes, value)) + b"]"
    return repr(value).encode()


def shard_content(folder: Path) -> Any:
    """The bytes of all shards and the samples that the manifests count."""
    found = {}
    for manifest in sorted(folder.glob("*/manifest.json")):
        content = json.loads(manifest.read_text())
        tars = [file_hash(manifest.parent / shard["name"]) for shard in content["shards"]]
        found[manifest.parent.name] = [sum(shard["samples"] for shard in content["shards"]), *tars]
    return found or None


def pixel_hash(path: Path) -> str:
    """Of an image's pixels, whatever its notes are."""
    with Image.open(path) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def tree_hash(folder: Path) -> dict[str, str]:
    """Every file of a folder and its hash; locks are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): file_hash(path) for path in files}


_WORDS = re.compile(
    r"skip|bad |damaged|cannot|not an? |left out|missing|unreadable|checksum|crc|differ|warn|ignored|\bnan\b|refus|"
    r"\blost\b|no longer|passed over|instead of|another|\d+ of \d+|changed|applied|overrid|unused|starts anew|restored",
    re.IGNORECASE,
)


def said(result: Result, without_fault: Result) -> list[str]:
    """Lines that the same command does not print without the fault and that tell of something unusual."""

    def plain(text: str) -> set[str]:
        return {re.sub(r"[\d.]+", "#", line).strip() for line in re.split(r"[\r\n]+", text)}

    usual = plain(without_fault.text)
    lines = {line.strip() for line in re.split(r"[\r\n]+", result.text)}
    return sorted(line for line in lines if re.sub(r"[\d.]+", "#", line) not in usual and _WORDS.search(line))


def close(a: float, b: float) -> bool:
    """Two scores that print the same."""
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
