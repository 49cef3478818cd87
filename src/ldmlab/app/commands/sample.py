"""`ldmlab sample MODEL "a prompt" ...`: images with their settings inside, a grid, strips, sweeps."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.commands.sample_guiders import add_guider_options, check_guider_options, guiders_of
from ldmlab.app.commands.sample_job import Job
from ldmlab.app.commands.sample_requests import add_request_options, check_request_options, read_lines, requests_of
from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.inference.sample_settings import SampleSettings

SWEEPS = {
    **{"steps": int, "guidance_scale": float, "eta": float, "seed": int, "sampler": str, "spacing": str},
    **{"strength": float, "repeats": int},
}

EPILOG = """examples:
  ldmlab sample runs/emoji-1a2b "a red apple" "a clock" --guidance-scale 3
  ldmlab sample runs/emoji-1a2b --prompts prompts.txt --count 4 --size 64x96
  ldmlab sample runs/emoji-1a2b "a red apple" --trajectory
  ldmlab sample runs/emoji-1a2b "a red apple" --sweep steps=1,2,5,10,25,50
  ldmlab sample runs/emoji-1a2b "a red apple" --negative-prompt "a face" --guidance-scale 3
  ldmlab sample runs/emoji-1a2b "a red apple" --from sketch.png --strength 0.6
  ldmlab sample runs/emoji-1a2b --from photo.png --strength 0.3 --count 8        variations
  ldmlab sample runs/emoji-1a2b "a table" --from photo.png --mask hole.png       the rest stays as it is
  ldmlab sample runs/inpainting-1a2b --task inpainting photo.png --mask hole.png
  ldmlab sample runs/upscaler-1a2b --task super_resolution small.png
  ldmlab sample runs/landscapes-1a2b map.png --tile 512                          as large as the map
  ldmlab sample runs/imagenet-1a2b 207 980 --classifier runs/classifier-3c4d --classifier-scale 10
  torchrun --nproc-per-node 2 -m ldmlab sample runs/emoji-1a2b --prompts prompts.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported."""
    add = parser.add_argument
    parser.epilog = EPILOG
    add("model", type=Path, help="model folder, run folder or checkpoint")
    add_request_options(parser)
    add("--count", type=int, default=1, help="images per prompt (1)")
    add("--steps", type=int, help="sampling steps (the sampler's own: 50 for ddim, all levels for ddpm)")
    add("--guidance-scale", type=float, help="1 is off (3 if the model was trained for it, else 1)")
    add_guider_options(parser)
    add("--eta", type=float, help="fresh noise per step: 0 none, 1 as DDPM (0; sampler euler_ancestral: 1)")
    add("--seed", type=int, default=0, help="with an image's number it decides the noise (0)")
    add("--first-index", type=int, default=0, help="number of the first image, to make one of many again (0)")
    add("--size", help="HEIGHTxWIDTH or one side, px (as trained)")
    add("--tile", type=int, help="decode in parts of this side, px; 0: at once (512 above 1024x1024)")
    add("--tile-norms", default="shared", help="shared: as decoded whole | separate: faster, tones may differ (shared)")
    add("--window", type=int, help="denoise in windows of this side, px; 0: at once (docs/large_images.md)")
    add("--sampler", default="ddim", help=f"{' | '.join(_samplers())} (ddim)")
    add("--spacing", help="steps of the schedule: official | linspace | trailing | karras | log_snr (its own)")
    add("--sweep", help=f"one image per setting, such as steps=1,2,5,10,25,50; of {', '.join(SWEEPS)}")
    add("--trajectory", action="store_true", help="also the way from noise to image, as a row and as an animation")
    add("--out", type=Path, help="new or empty folder (outputs/MODEL-N)")
    add("--batch-size", type=int, default=16, help="images at once; changes the speed only (16)")
    add("--weights", default="averaged", help="averaged | raw, for runs (averaged)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")
    add("--precision", default="float32", help="float32 | bfloat16 | float16 (float32)")


def _samplers() -> list[str]:
    """The files of ldmlab/samplers, which this command does not import for its help."""
    return sorted(path.stem for path in (Path(__file__).parents[2] / "samplers").glob("[!_]*.py"))


def run(args: argparse.Namespace) -> int:
    """Check everything, load, sample, draw the sheets."""
    lines = read_lines(args)
    size, sweep = _size(args.size), _sweep(args.sweep)
    if args.count < 1 or args.batch_size < 1 or args.first_index < 0:
        raise InputError("--count and --batch-size start at 1 and --first-index at 0; choose larger values.")
    if args.trajectory and sweep:
        raise InputError("--trajectory and --sweep draw different sheets; use one at a time.")
    _check_folder(args.out)
    check_guider_options(args)
    check_request_options(args)

    from ldmlab import distributed
    from ldmlab.build import load
    from ldmlab.inference.inputs import check_size

    rank, world = distributed.join()
    try:
        model = load(args.model, weights=args.weights, device=args.device).in_precision(args.precision)
        model.with_guiders(*guiders_of(args, model))
        requests = requests_of(model, lines, args, size)
        model.check(requests)
        settings = _settings(args, size)
        variants = [(None, settings)] if sweep is None else _variants(settings, *sweep)
        resolved = [(name, model.resolved(variant, requests)) for name, variant in variants]
        for _, variant in resolved:
            assert isinstance(variant.size, tuple)
            for request in requests[:: args.count]:
                check_size(request, variant.size, model.enlargement)
        folder = distributed.shared(lambda: _new_folder(args.out, args.model))
        job = Job(model, requests, resolved, folder, args, rank, world)
        job.sample()
        distributed.barrier()
        if rank == 0:
            job.draw_sheet(sweep[0] if sweep else None)
            print(f"{len(requests) * len(resolved)} images in {folder}")
    finally:
        distributed.leave()
    return 0


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
    from ldmlab.inference.sample_settings import SampleSettings

    names = (
        "steps",
        "guidance_scale",
        "eta",
        "seed",
        "sampler",
        "spacing",
        "strength",
        "repeats",
        "tile",
        "tile_norms",
        "window",
    )
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
