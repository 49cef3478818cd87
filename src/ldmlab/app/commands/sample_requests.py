"""What `ldmlab sample` is asked to show: words, files and a given image to the fields that a model takes."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.commands.sample_job import label
from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.inference.model import LoadedModel

Fields = dict[str, Any]
TASKS = {  # what the words of the command line are files of
    "super_resolution": "low_resolution",
    "inpainting": "image",
    "semantic": "segmentation",
    "layout": "boxes",
    "variations": "reference",
}
ALPHA = "alpha"  # as a mask: the transparent parts of the image itself
_FILES = frozenset({"low_resolution", "segmentation", "boxes", "reference"})
_PAIR = frozenset({"image", "mask"})
_OF_ANY = frozenset({"init_image", "image", "mask"})  # fields that any model takes


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported."""
    add = parser.add_argument
    add("prompts", nargs="*", help="captions; class numbers; or files, as the model or --task takes them")
    add(
        "--prompts",
        dest="file",
        type=Path,
        help="file with a prompt a line, or .jsonl with an object of fields a line (images and masks as files)",
    )
    add("--negative-prompt", help="a caption to be led away from, by guidance above 1")
    add(
        "--task",
        choices=TASKS,
        help="the words are files: super_resolution: small images; inpainting: images with holes (any model);\n"
        "semantic: label maps; layout: JSON lists of boxes; variations: images to vary (conditioner=image)",
    )
    add(
        "--from",
        dest="source",
        type=Path,
        metavar="IMAGE",
        help="start from this image (--size resizes it), or with --mask keep its rest",
    )
    add("--mask", help="FILE, white where the image is to be made anew; or alpha: where it is transparent")
    add("--strength", type=float, help="with --from: 0 leaves the image, 1 forgets it (0.6; with --mask 1)")
    add("--repeats", type=int, help="of each step where a model fills holes without having learned it; 1: fastest (5)")


def check_request_options(args: argparse.Namespace) -> None:
    """Options that do nothing without another are mistakes."""
    inpainting = args.task == "inpainting"
    if args.strength is not None and args.source is None:
        raise InputError(f"--strength {args.strength} needs an image to start from; add --from IMAGE.")
    if args.mask is not None and args.source is None and not inpainting:
        raise InputError(f"--mask {args.mask} needs an image; add --from IMAGE, or --task inpainting IMAGE.")
    if args.source is not None and inpainting:
        raise InputError("--task inpainting names the images itself; leave out --task or --from.")
    if args.task is not None and not args.prompts and args.file is None:
        raise InputError(f"--task {args.task} needs files to work on; name them after the model.")


def read_lines(args: argparse.Namespace) -> list[str | Fields]:
    """Prompts from the command line, then from the file; empty lines are skipped."""
    lines: list[str | Fields] = list(args.prompts)
    if args.file is None:
        return lines
    try:
        text = args.file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {args.file} cannot be read as UTF-8 text ({error}); give another file.") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"--prompts {args.file} holds no prompt; write one a line.")
    return lines + ([_object(line, args.file) for line in found] if args.file.suffix == ".jsonl" else found)


def _object(line: str, file: Path) -> Fields:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"--prompts {file}: {line[:60]!r} is no JSON object ({error}); mend the line.") from error
    if not isinstance(fields, dict):
        raise InputError(f'--prompts {file}: {line[:60]!r} is no JSON object; write {{"caption": ...}}.')
    return fields


def requests_of(
    model: "LoadedModel", lines: list[str | Fields], args: argparse.Namespace, size: tuple[int, int] | None
) -> list[Fields]:
    """Every prompt `count` times as the fields that the model reads; warns of ends that it cannot read."""
    from ldmlab.inference.inputs import TransparentParts, known_fields

    given = _given(args, size)
    if args.negative_prompt is not None and "caption" not in model.reads:
        raise InputError(f"--negative-prompt is a caption, and this model is told {_names(model.reads)}; leave it out.")
    told = [{**given, **fields} for fields in _told_fields(model.reads, lines, args, given)]
    for fields in told:
        if fields.get("mask") == ALPHA and "image" in fields:
            fields["mask"] = TransparentParts(fields["image"])
        if missing := model.reads - fields.keys():
            way = "--from IMAGE --mask FILE, or a .jsonl file" if missing <= _PAIR else "a .jsonl file"
            raise InputError(f"{label(fields)}: this model also reads {_names(missing)}; use {way}.")
        for lost in model.lost(fields):
            print(f'"{label(fields)}" is too long for this model, which does not see: "{lost}"')
    known = known_fields(model.reads)
    kept = [{name: fields[name] for name in sorted(known & fields.keys())} for fields in told]
    return [fields for fields in kept for _ in range(args.count)]


def _given(args: argparse.Namespace, size: tuple[int, int] | None) -> Fields:
    """What the options say about every prompt; an image that is only a start is brought to the size asked for."""
    from ldmlab.inference.inputs import Fitted

    given: Fields = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    if args.source is not None and (args.mask is None or args.strength is not None):
        file = str(args.source)
        given["init_image"] = Fitted(file, size) if size is not None and args.mask is None else file
    if args.source is not None and args.mask is not None:
        given |= {"image": str(args.source), "mask": args.mask}
    return given


def _told_fields(
    reads: frozenset[str], lines: list[str | Fields], args: argparse.Namespace, given: Fields
) -> list[Fields]:
    """One dict a prompt; without a prompt a single one where the given image says enough."""
    if args.task is not None:
        return [line if isinstance(line, dict) else _file_of(args, line, reads) for line in lines]
    if not lines and (reads <= _PAIR or (reads - _PAIR == {"caption"} and given.keys() - {"negative_prompt"})):
        return [{"caption": ""} if "caption" in reads else {}]
    if not lines and reads == {"reference"} and args.source is not None:
        return [{"reference": str(args.source)}]
    if not lines:
        raise InputError(f"this model is told {_names(reads)}; give at least one prompt or --prompts FILE.")
    if not reads and not all(isinstance(line, dict) and line.keys() & _OF_ANY for line in lines):
        raise InputError("this model takes no prompts; leave them out and say how many images with --count.")
    return [line if isinstance(line, dict) else _told(line, reads) for line in lines]


def _file_of(args: argparse.Namespace, line: str, reads: frozenset[str]) -> Fields:
    """A word as the file that --task makes of it."""
    field, empty = TASKS[args.task], {"caption": ""} if "caption" in reads else {}
    if args.task == "inpainting":
        return {"image": line, "mask": args.mask or ALPHA, **empty}
    if field not in reads:
        ways = {"variations": "give one trained with conditioner=image, or use --from IMAGE --strength 0.3 with any"}
        raise InputError(
            f"--task {args.task}: this model is told {_names(reads)}, not {field}; "
            f"{ways.get(args.task, 'give one trained for it')}."
        )
    return {field: line, **(empty if args.task == "variations" else {})}


def _told(line: str, reads: frozenset[str]) -> Fields:
    """A plain prompt as a caption, a file or a class number."""
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


def _names(fields: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(fields)) or "nothing"
