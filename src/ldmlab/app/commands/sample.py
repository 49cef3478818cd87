"""`ldmlab sample MODEL "a prompt" ...`: images with their settings inside, a grid, trajectories, sweeps.

examples:
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
  ldmlab sample runs/emoji-1a2b --prompts prompts.txt --filter concepts.yaml     blocked ones are counted
  torchrun --nproc-per-node 2 -m ldmlab sample runs/emoji-1a2b --prompts prompts.txt
  srun -n8 ldmlab sample runs/emoji-1a2b --prompts prompts.txt
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.cli import at_least
from ldmlab.app.commands.sample_prompts import add_prompt_options, check_prompts, model_inputs, prompt_lines
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import SampleSettings, parsed, variants

if TYPE_CHECKING:
    from ldmlab.app.commands.sample_prompts import Inputs
    from ldmlab.inference.model import LoadedModel
    from ldmlab.inference.sample_settings import ResolvedSettings

_OTHERS = ("sweep", "precision", "weights", "device", "guider", "guider_image", "classifier")  # options in errors
_SAME_IMAGES = ("batch_size", "device", "compile")  # options that change how images are made, not which
_GUIDER = """squared | lpips: guide the decoded estimate to low_resolution, or to --guider-image;
or package.Class"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="model folder, run folder or checkpoint")
    add_prompt_options(parser)
    for setting in fields(SampleSettings):  # as text, so that errors show what was typed; a flag without a value
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if setting.type == (bool | None) else {}
        add(f"--{setting.name.replace('_', '-')}", metavar=setting.name.upper(), help=setting.metadata["help"], **flag)
    add("--classifier", type=Path, help="guide by this stage=classifier run to the classes given as prompts")
    add("--classifier-scale", type=float, help="how strongly (10, the paper's)")
    add("--guider", help=_GUIDER)
    add("--guider-weight", type=float, help="how strongly (1)")
    add("--guider-image", type=Path, help="an image to guide all samples to, no larger than they are")
    add("--first-index", type=int, default=0, help="number of the first image, to make one of many again (0)")
    add("--sweep", help="one image per value of a setting, such as steps=1,2,5,10,25,50")
    add("--trajectory", action="store_true", help="also the denoising trajectory, as a row and as an animation")
    add("--filter", type=Path, metavar="FILE", help="block prompts and images by the concepts of this yaml file (none)")
    add("--mark", help="watermark, credentials or both with a comma: mark files as generated (none)")
    add("--certificate", type=Path, help="with --mark credentials: PEM chain to sign with (a test certificate)")
    add("--key", type=Path, help="and its private key")
    add("--out", type=Path, help="new or empty folder (outputs/MODEL-N)")
    add("--batch-size", type=int, default=16, help="images at once; changes the speed only (16)")
    add("--weights", default="averaged", help="averaged | raw | length of an average, for runs (averaged)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")
    add("--precision", default="float32", help="float32 | bfloat16 | float16 (float32)")
    add(
        "--compile",
        default="false",
        help="compile the networks, for many images: true | false | auto, on a GPU (false)",
    )


@contextmanager
def options_as_typed() -> Iterator[None]:
    """Settings are `steps=9` in Python; an error of the command names `--steps 9`."""
    try:
        yield
    except InputError as error:
        names = "|".join([*(one.name for one in fields(SampleSettings)), *_OTHERS])
        option = rf"(?<![\w.-])(?:(?:sampler\.)?({names})=|sampler\.({names})\b)"
        typed = lambda m: f"--{(m[1] or m[2]).replace('_', '-')}{' ' * bool(m[1])}"  # noqa: E731
        raise InputError(re.sub(option, typed, str(error))) from error


@options_as_typed()
def run(args: argparse.Namespace) -> None:
    typed = {one.name: getattr(args, one.name) for one in fields(SampleSettings)}
    settings = SampleSettings(**{name: parsed(name, text) for name, text in typed.items() if text is not None})
    swept, by_name = variants(settings, args.sweep)
    _trust_classes("sampler", {one.sampler for one in by_name.values()})
    _trust_classes("guiders.guider", {args.guider or ""})
    _check_options(args)
    check_prompts(args)
    lines = prompt_lines(args)

    from ldmlab import distributed
    from ldmlab.app import sample_files
    from ldmlab.app.filters import Guard, read_filter
    from ldmlab.disks import own_folder
    from ldmlab.files import read_text

    guard = None if args.filter is None else Guard(read_filter(args.filter, args.device))
    rules = guard and read_text(args.filter)  # others block others: images of before must not stay beside
    options = sorted((key, str(value)) for key, value in vars(args).items() if key not in _SAME_IMAGES)
    command = repr([options, lines, *([rules] if guard else [])])
    if args.out is not None:
        sample_files.check_folder(args.out, command)
    marks = sample_files.marks_of(args.mark, args.certificate, args.key)
    rank, _ = distributed.join(timeout_minutes=120)  # only short messages pass, some after a long wait
    try:
        model = _loaded(args)
        inputs = model_inputs(args, model, lines, settings.size if isinstance(settings.size, tuple) else None)
        model.check(inputs)
        resolved = {name: model.resolved(variant, inputs) for name, variant in by_name.items()}
        check_variants(resolved.values(), inputs[:: args.count], model.enlargement, marks.check_size, args.trajectory)
        find = partial(sample_files.output_folder, args.out, args.model, command)
        with own_folder(find, sample_files.LOCK, sample_files.BUSY) as folder, sample_files.sampling(folder, command):
            job = sample_files.Job(model, inputs, resolved, folder, args.first_index, marks, guard=guard)
            shown = distributed.gather(job.sample(args.batch_size, trajectory=args.trajectory))
            lost, blocked = guard.finish(folder, len(resolved)) if guard else (0, "")
            if rank == 0:
                job.save_grid({place: image for part in shown for place, image in part.items()}, swept, args.count)
                print(f"{len(inputs) * len(resolved) - lost} images in {folder}{blocked}")
    finally:
        distributed.leave()


def _loaded(args: argparse.Namespace) -> "LoadedModel":
    """The model with its precision, compiled and guided as chosen."""
    from ldmlab.app.guiders import guiders_by_option
    from ldmlab.build import load

    model = load(args.model, weights=args.weights, device=args.device).in_precision(args.precision)
    model.compiled({"true": True, "false": False}.get(args.compile, "auto"))
    return model.with_guiders(*guiders_by_option(vars(args), model)) if args.classifier or args.guider else model


def check_variants(
    variants: Iterable["ResolvedSettings"],
    inputs: list["Inputs"],
    enlargement: int,
    check_mark: Callable[[int, int], None],
    trajectory: bool,
) -> None:
    """Refuse --trajectory of a sampler without steps, and sizes that the inputs or a mark do not fit."""
    from ldmlab.inference.inputs import check_size

    for variant in variants:
        if trajectory and not getattr(variant.build_sampler(), "shows_steps", True):
            raise InputError(f"sampler={variant.sampler} has no steps for --trajectory; use heun, for instance.")
        assert isinstance(variant.size, tuple)
        check_mark(*variant.size)
        for one in inputs:
            check_size(one, variant.size, enlargement)


def _trust_classes(where: str, names: Set[str]) -> None:
    """A class of a package outside that is named on the command line is trusted, as one in a yaml of the user's is."""
    from ldmlab.instantiate import trust_typed

    for name in names:
        if "." in name:
            trust_typed({"_target_": name}, where)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options without effect, alone or in combination."""
    at_least(args, batch_size=1)
    if args.compile not in ("auto", "true", "false"):
        raise InputError(f"--compile {args.compile} is unknown; choose auto, true or false.")
    if not 0 <= args.first_index < 2**62:
        raise InputError(f"--first-index {args.first_index} is outside 0 .. 2^62; choose a smaller number.")
    if args.trajectory and args.sweep:
        raise InputError("--trajectory and --sweep make different grids; use one at a time.")
    if args.trajectory and args.mark:
        raise InputError(f"--mark {args.mark} cannot mark the animations of --trajectory; leave one of them out.")
    if args.trajectory and args.filter:
        raise InputError("--filter cannot check the noisy images of --trajectory; leave one of them out.")
    for option, needs in (("classifier_scale", "classifier"), ("guider_weight", "guider"), ("guider_image", "guider")):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            typed = f"--{option.replace('_', '-')} {getattr(args, option)}"
            raise InputError(f"{typed} does nothing without --{needs}; add it.")
