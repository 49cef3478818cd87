"""`ldmlab sample MODEL "a prompt" ...`: pictures with their settings inside, a grid, strips, sweeps."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.commands.sample_guides import add_guide_options, asked_guides, check_guide_options
from ldmlab.app.commands.sample_job import Job, label
from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.evaluation.model import LoadedModel
    from ldmlab.evaluation.settings import SampleSettings

SWEEPS = {"steps": int, "guidance": float, "eta": float, "seed": int, "sampler": str, "spacing": str}

EPILOG = """examples:
  ldmlab sample runs/emoji-1a2b "a red apple" "a clock" --guidance 3
  ldmlab sample runs/emoji-1a2b --prompts prompts.txt --count 4 --size 64x96
  ldmlab sample runs/emoji-1a2b "a red apple" --strip
  ldmlab sample runs/emoji-1a2b "a red apple" --sweep steps=1,2,5,10,25,50
  ldmlab sample runs/imagenet-1a2b 207 980 --classifier runs/classifier-3c4d --classifier-scale 10
  torchrun --nproc-per-node 2 -m ldmlab sample runs/emoji-1a2b --prompts prompts.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported."""
    add = parser.add_argument
    parser.epilog = EPILOG
    add("model", type=Path, help="model folder, run folder or checkpoint")
    add("prompts", nargs="*", help="captions; class numbers; files of low-resolution pictures or label maps: as told")
    add(
        "--prompts",
        dest="file",
        type=Path,
        help="file with a prompt a line, or .jsonl with an object of fields a line (pictures and masks as files)",
    )
    add("--count", type=int, default=1, help="pictures per prompt (1)")
    add("--steps", type=int, help="sampling steps (the sampler's own: 50 for ddim, all levels for ddpm)")
    add("--guidance", type=float, help="1 is off (3 if the model was trained for it, else 1)")
    add_guide_options(parser)
    add("--eta", type=float, help="fresh noise per step: 0 none, 1 as DDPM (0; sampler euler_ancestral: 1)")
    add("--seed", type=int, default=0, help="with a picture's number it decides the noise (0)")
    add("--first-index", type=int, default=0, help="number of the first picture, to make one of many again (0)")
    add("--size", help="HEIGHTxWIDTH or one side, px (as trained)")
    add("--sampler", default="ddim", help=f"{' | '.join(_samplers())} (ddim)")
    add("--spacing", help="steps of the schedule: official | linspace | trailing | karras | log_snr (its own)")
    add("--sweep", help=f"one picture per setting, such as steps=1,2,5,10,25,50; of {', '.join(SWEEPS)}")
    add("--strip", action="store_true", help="also the way from noise to picture, as a row and as an animation")
    add("--out", type=Path, help="new or empty folder (outputs/MODEL-N)")
    add("--batch-size", type=int, default=16, help="pictures at once; changes the speed only (16)")
    add("--weights", default="averaged", help="averaged | raw, for runs (averaged)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")
    add("--precision", default="float32", help="float32 | bfloat16 | float16 (float32)")


def _samplers() -> list[str]:
    """The files of ldmlab/samplers, which this command does not import for its help."""
    return sorted(path.stem for path in (Path(__file__).parents[2] / "samplers").glob("[!_]*.py"))


def run(args: argparse.Namespace) -> int:
    """Check everything, load, sample, draw the sheets."""
    lines = _prompts(args)
    size, sweep = _size(args.size), _sweep(args.sweep)
    if args.count < 1 or args.batch_size < 1 or args.first_index < 0:
        raise InputError("--count and --batch-size start at 1 and --first-index at 0; choose larger values.")
    if args.strip and sweep:
        raise InputError("--strip and --sweep draw different sheets; use one at a time.")
    _check_folder(args.out)
    check_guide_options(args)

    from ldmlab.build import load
    from ldmlab.evaluation import processes
    from ldmlab.evaluation.request_fields import check_size

    rank, world = processes.join()
    try:
        model = load(args.model, weights=args.weights, device=args.device).in_precision(args.precision)
        model.with_guides(*asked_guides(args, model))
        requests = _requests(model, lines, args.count)
        settings = _settings(args, size)
        variants = [(None, settings)] if sweep is None else _variants(settings, *sweep)
        resolved = [(name, model.resolved(variant, requests)) for name, variant in variants]
        for _, variant in resolved:
            assert isinstance(variant.size, tuple)
            for request in requests[:: args.count]:
                check_size(request, variant.size, model.enlargement)
        folder = processes.from_first(lambda: _new_folder(args.out, args.model))
        job = Job(model, requests, resolved, folder, args, rank, world)
        job.sample()
        processes.barrier()
        if rank == 0:
            job.draw_sheet(sweep[0] if sweep else None)
            print(f"{len(requests) * len(resolved)} pictures in {folder}")
    finally:
        processes.leave()
    return 0


def _prompts(args: argparse.Namespace) -> list[str | dict[str, Any]]:
    """From the command line, then from the file; empty lines are skipped."""
    lines: list[str | dict[str, Any]] = list(args.prompts)
    if args.file is None:
        return lines
    try:
        text = args.file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {args.file} cannot be read as UTF-8 text ({error}); give another file.") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"--prompts {args.file} holds no prompt; write one a line.")
    return lines + ([_fields(line, args.file) for line in found] if args.file.suffix == ".jsonl" else found)


def _fields(line: str, file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"--prompts {file}: {line[:60]!r} is no JSON object ({error}); mend the line.") from error
    if not isinstance(fields, dict):
        raise InputError(f'--prompts {file}: {line[:60]!r} is no JSON object; write {{"caption": ...}}.')
    return fields


def _requests(model: "LoadedModel", lines: list[str | dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Every prompt `count` times as the fields that the model reads; warns of ends that it cannot read."""
    from ldmlab.evaluation.request_fields import OPTIONAL

    reads = model.reads
    if not reads:
        if lines:
            raise InputError("this model takes no prompts; leave them out and say how many pictures with --count.")
        return [{} for _ in range(count)]
    if not lines:
        raise InputError(f"this model is told {', '.join(sorted(reads))}; give at least one prompt or --prompts FILE.")
    told = [line if isinstance(line, dict) else _told(line, reads) for line in lines]
    for fields in told:
        if missing := reads - fields.keys():
            names = ", ".join(sorted(missing))
            raise InputError(f"{label(fields)}: this model also reads {names}; use a .jsonl file.")
        for lost in model.lost(fields):
            print(f'"{label(fields)}" is too long for this model, which does not see: "{lost}"')
    kept = sorted(reads | {OPTIONAL[name] for name in reads & OPTIONAL.keys()})
    return [{name: fields[name] for name in kept if name in fields} for fields in told for _ in range(count)]


def _told(line: str, reads: frozenset[str]) -> dict[str, Any]:
    """A plain prompt as a caption, the file of a picture or a class number."""
    if "caption" in reads:
        return {"caption": line}
    if reads in ({"low_resolution"}, {"segmentation"}):
        return {next(iter(reads)): line}  # a file
    if "class_id" not in reads:
        raise InputError(f"{line}: this model reads {', '.join(sorted(reads))}; give them in a .jsonl file.")
    try:
        return {"class_id": int(line)}
    except ValueError as error:
        raise InputError(f"{line}: this model takes class numbers; give an integer.") from error


def _size(text: str | None) -> tuple[int, int] | None:
    """64x96 is 64 high and 96 wide; 64 is square."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"--size {text} is no size; write HEIGHTxWIDTH, for instance 64x96.")
    return int(sides[0]), int(sides[-1])


def _sweep(text: str | None) -> tuple[str, list[Any]] | None:
    """steps=1,2,5 => ("steps", [1, 2, 5])."""
    if text is None:
        return None
    name, _, values = text.partition("=")
    try:
        return name, [SWEEPS[name](value) for value in values.split(",")]
    except (KeyError, ValueError) as error:
        known = ", ".join(SWEEPS)
        raise InputError(f"--sweep {text} is no sweep; write one of {known} with values: steps=1,2,5.") from error


def _settings(args: argparse.Namespace, size: tuple[int, int] | None) -> "SampleSettings":
    from ldmlab.evaluation.settings import SampleSettings

    names = ("steps", "guidance", "eta", "seed", "sampler", "spacing")
    return SampleSettings(size=size, **{name: getattr(args, name) for name in names})


def _variants(settings: "SampleSettings", name: str, values: list[Any]) -> "list[tuple[str | None, SampleSettings]]":
    from dataclasses import replace

    changes: list[dict[str, Any]] = [{name: value} for value in values]
    return [(f"{name}-{value}", replace(settings, **change)) for value, change in zip(values, changes, strict=True)]


def _check_folder(out: Path | None) -> None:
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is in use; give a new or empty folder.")


def _new_folder(out: Path | None, model: Path) -> Path:
    """The asked folder, or the first free outputs/MODEL-N."""
    if out is not None:
        _check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
    number = 1
    while True:
        folder = Path("outputs") / f"{model.resolve().stem}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder
