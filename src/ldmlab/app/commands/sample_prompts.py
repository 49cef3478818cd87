"""Prompts of `ldmlab sample`: text, files and an input image, to a model's inputs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.cli import at_least
from ldmlab.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ldmlab.inference.model import LoadedModel

Inputs = dict[str, Any]
TASKS = {  # the input whose files the words of the command line name
    "super_resolution": "low_resolution",
    "inpainting": "image",
    "semantic": "segmentation",
    "layout": "boxes",
    "variations": "reference",
}
ALPHA = "alpha"  # as a mask: the transparent parts of the image itself
MOST = 10_000_000  # images of one call
_FILES = frozenset({"low_resolution", "segmentation", "boxes", "reference"})
_PAIR = frozenset({"image", "mask"})
_OF_ANY = frozenset({"init_image", "image", "mask"})  # inputs that any model takes
_FILE = "file with a prompt a line, or .jsonl with an object of inputs a line (images and masks as files)"
_FROM = "start from this image (--size resizes it), or with --mask keep its rest"
_TASK = """the words are files: super_resolution: small images; inpainting: images with holes (any model);
semantic: label maps; layout: JSON lists of boxes; variations: images to vary (conditioner=image)"""


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("words", metavar="prompts", nargs="*", help="captions; class numbers; or files, as the model or --task takes")
    add("--prompts", dest="file", type=Path, help=_FILE)
    add("--negative-prompt", help="a caption to be led away from, by a guidance scale above 1")
    add("--task", choices=TASKS, help=_TASK)
    add("--from", dest="source", type=Path, metavar="IMAGE", help=_FROM)
    add("--mask", help="FILE, white where the image is to be generated; or alpha: where it is transparent")
    add("--count", type=int, default=1, help="images per prompt (1)")


def check_prompts(args: argparse.Namespace) -> None:
    """Refuse options that do nothing without another one; --strength starts from an image."""
    inpainting = args.task == "inpainting"
    at_least(args, count=1)
    if args.strength is not None and args.source is None:
        raise InputError(f"--strength {args.strength} needs an image to start from; add --from IMAGE.")
    if args.mask is not None and args.source is None and not inpainting:
        raise InputError(f"--mask {args.mask} needs an image; add --from IMAGE, or --task inpainting IMAGE.")
    if args.source is not None and inpainting:
        raise InputError("--task inpainting names the images itself; leave out --task or --from.")
    if args.task is not None and not args.words and args.file is None:
        raise InputError(f"--task {args.task} needs files to work on; name them after the model.")


def prompt_lines(args: argparse.Namespace) -> list[str | Inputs]:
    """Prompts from the command line, then from the file; empty lines are skipped."""
    file: Path | None = args.file
    if file is None:
        return list(args.words)
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a file")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {file} cannot be read as UTF-8 text ({error}); give another file.") from error
    found: list[Any]
    if file.suffix == ".jsonl":
        from ldmlab.data.listings import json_rows

        found = json_rows(text, f"--prompts {file}")
    else:
        found = [line.strip() for line in text.split("\n") if line.strip()]  # a prompt may hold other separators
    if not found:
        raise InputError(f"--prompts {file} holds no prompt; write one a line.")
    return [*args.words, *found]


def model_inputs(
    args: argparse.Namespace, model: "LoadedModel", lines: list[str | Inputs], size: tuple[int, int] | None
) -> list[Inputs]:
    """Every prompt `count` times as inputs of the model; prints a note on what it cannot read."""
    from ldmlab.inference.input_images import TransparentParts
    from ldmlab.inference.inputs import checked_text, known_fields

    if len(lines) * args.count > MOST:
        raise InputError(f"--count {args.count} makes more than {MOST:,} images in one call; choose fewer.")
    if args.negative_prompt is not None and "caption" not in model.reads:
        raise InputError(f"--negative-prompt is a caption, and this model takes {_names(model.reads)}; leave it out.")
    shared = _shared(args, size)
    every = [{**shared, **own} for own in _each(args, model.reads, lines, shared)]
    known = known_fields(model.reads)
    unknown = {name for one in every for name in one} - known  # a misspelt name is refused, other ones are listed
    for name in sorted(unknown):
        if hint := did_you_mean(name, known):
            raise InputError(f"--prompts {args.file}: {name} is no input of this model; {hint}")
    if unknown:
        print(f"{args.file}: not read by this model: {_names(unknown)}")
    for one in every:
        if one.get("mask") == ALPHA and "image" in one:
            one["mask"] = TransparentParts(one["image"])
        if missing := model.reads - one.keys():
            way = "--from IMAGE --mask FILE, or a .jsonl file" if missing <= _PAIR else "a .jsonl file"
            raise InputError(f"{label(one)}: this model also reads {_names(missing)}; use {way}.")
        for name in ("caption", "negative_prompt"):
            if name in one:
                checked_text(name, one[name])
        for lost in model.lost(one):
            print(f'"{label(one)}" is too long for this model, which does not see: "{lost}"')
    kept = [{name: one[name] for name in sorted(known & one.keys())} for one in every]
    return [one for one in kept for _ in range(args.count)]


def _shared(args: argparse.Namespace, size: tuple[int, int] | None) -> Inputs:
    """Inputs of every prompt; an image that is only a start is brought to the size."""
    from ldmlab.inference.input_images import Fitted

    shared: Inputs = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    if args.source is not None:
        file = str(args.source)
        if args.mask is None or args.strength is not None:
            shared["init_image"] = Fitted(file, size) if size is not None and args.mask is None else file
        if args.mask is not None:
            shared |= {"image": file, "mask": args.mask}
    return shared


def _each(args: argparse.Namespace, reads: frozenset[str], lines: list[str | Inputs], shared: Inputs) -> list[Inputs]:
    """One dict a prompt; without a prompt a single one where the input image is enough."""
    if lines:
        given = all(isinstance(line, dict) and line.keys() & _OF_ANY for line in lines)
        if not reads and args.task is None and not given:
            raise InputError("this model takes no prompts; leave them out and give the number of images with --count.")
        return [line if isinstance(line, dict) else _fields(args, line, reads) for line in lines]
    if reads <= _PAIR or (reads - _PAIR == {"caption"} and shared.keys() - {"negative_prompt"}):
        return [{"caption": ""} if "caption" in reads else {}]
    if reads == {"reference"} and args.source is not None:
        return [{"reference": str(args.source)}]
    raise InputError(f"this model takes {_names(reads)} as input; give at least one prompt or --prompts FILE.")


def _fields(args: argparse.Namespace, line: str, reads: frozenset[str]) -> Inputs:
    """A prompt as --task's file, a caption, a file or a class number."""
    field, empty = TASKS.get(args.task), {"caption": ""} if "caption" in reads else {}
    if args.task == "inpainting":
        return {"image": line, "mask": args.mask or ALPHA, **empty}
    if field is not None and field not in reads:
        way = "give one trained for it"
        if args.task == "variations":
            way = "give one trained with conditioner=image, or use --from IMAGE --strength 0.3 with any"
        raise InputError(f"--task {args.task}: this model takes {_names(reads)} as input, not {field}; {way}.")
    if field is not None:
        return {field: line, **(empty if args.task == "variations" else {})}
    if "caption" in reads:
        return {"caption": line}
    if len(reads) == 1 and reads <= _FILES:
        return {next(iter(reads)): line}
    if "class_id" not in reads:
        raise InputError(f"{line}: this model reads {_names(reads)}; give them in a .jsonl file.")
    try:
        return {"class_id": int(line)}
    except ValueError as error:
        raise InputError(f"{line}: this model takes class numbers; give an integer.") from error


def label(inputs: Inputs) -> str:
    return ", ".join(text for name, value in inputs.items() if (text := _shown(name, value)))


def _shown(name: str, value: Any) -> str:
    if name in ("mask", "crop"):
        return ""
    if name == "boxes" and not isinstance(value, str):
        return f"{len(value)} objects" if hasattr(value, "__len__") else str(value)
    if name in ("image", "init_image", "low_resolution", "reference", "segmentation", "boxes"):
        file = Path(str(getattr(value, "image", value))).name
        return f"from {file}" if name == "init_image" else file
    return f"not {value}" if name == "negative_prompt" else str(value)


def _names(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
