"""Prompts of `ldmlab sample`: text, files and an input image, to a model's inputs."""

import argparse
import difflib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.errors import InputError

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


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported."""
    add = parser.add_argument
    add("words", metavar="prompts", nargs="*", help="captions; class numbers; or files, as the model or --task takes")
    add(
        "--prompts",
        dest="file",
        type=Path,
        help="file with a prompt a line, or .jsonl with an object of inputs a line (images and masks as files)",
    )
    add("--negative-prompt", help="a caption to be led away from, by a guidance scale above 1")
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
    add("--mask", help="FILE, white where the image is to be generated; or alpha: where it is transparent")
    add("--count", type=int, default=1, help="images per prompt (1)")


@dataclass(frozen=True)
class Prompts:
    """What the command line gives as inputs; the names are those of its options."""

    words: list[str]
    file: Path | None
    negative_prompt: str | None
    task: str | None
    source: Path | None
    mask: str | None
    count: int
    strength: str | None  # as typed; with a mask it means that sampling starts from the image

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Prompts":
        """Of the parsed options; those that do nothing without another are refused."""
        made = cls(**{one.name: getattr(args, one.name) for one in fields(cls)})
        inpainting = made.task == "inpainting"
        if made.count < 1:
            raise InputError(f"--count {made.count} makes no image; choose 1 or more.")
        if made.strength is not None and made.source is None:
            raise InputError(f"--strength {made.strength} needs an image to start from; add --from IMAGE.")
        if made.mask is not None and made.source is None and not inpainting:
            raise InputError(f"--mask {made.mask} needs an image; add --from IMAGE, or --task inpainting IMAGE.")
        if made.source is not None and inpainting:
            raise InputError("--task inpainting names the images itself; leave out --task or --from.")
        if made.task is not None and not made.words and made.file is None:
            raise InputError(f"--task {made.task} needs files to work on; name them after the model.")
        return made

    def lines(self) -> list[str | Inputs]:
        """Prompts from the command line, then from the file; empty lines are skipped."""
        if self.file is None:
            return list(self.words)
        try:
            if self.file.exists() and not self.file.is_file():
                raise OSError("it is not a file")
            text = self.file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError(
                f"--prompts {self.file} cannot be read as UTF-8 text ({error}); give another file."
            ) from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise InputError(f"--prompts {self.file} holds no prompt; write one a line.")
        objects = [self._object(line) for line in found] if self.file.suffix == ".jsonl" else found
        return [*self.words, *objects]

    def _object(self, line: str) -> Inputs:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"--prompts {self.file}: {line[:60]!r} is not a JSON object ({error}); fix the line."
            ) from error
        if not isinstance(found, dict):
            raise InputError(f'--prompts {self.file}: {line[:60]!r} is not a JSON object; write {{"caption": ...}}.')
        return found

    def inputs(self, model: "LoadedModel", lines: list[str | Inputs], size: tuple[int, int] | None) -> list[Inputs]:
        """Every prompt `count` times as inputs of the model; prints a note on what it cannot read."""
        from ldmlab.inference.inputs import TransparentParts, checked_text, known_fields

        if len(lines) * self.count > MOST:
            raise InputError(f"--count {self.count} makes more than {MOST:,} images in one call; choose fewer.")
        if self.negative_prompt is not None and "caption" not in model.reads:
            raise InputError(
                f"--negative-prompt is a caption, and this model takes {_names(model.reads)}; leave it out."
            )
        shared = self._shared(size)
        every = [{**shared, **own} for own in self._each(model.reads, lines, shared)]
        known = known_fields(model.reads)
        self._note_unknown({name for one in every for name in one} - known, known)
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
        return [one for one in kept for _ in range(self.count)]

    def _note_unknown(self, unknown: set[str], known: frozenset[str]) -> None:
        """A misspelt name is refused; other fields of a .jsonl file are listed and ignored."""
        for name in sorted(unknown):
            if near := difflib.get_close_matches(name, known, n=1):
                raise InputError(f"--prompts {self.file}: {name} is no input of this model; did you mean {near[0]}?")
        if unknown:
            print(f"{self.file}: not read by this model: {_names(unknown)}")

    def _shared(self, size: tuple[int, int] | None) -> Inputs:
        """Inputs of every prompt; an image that is only a start is brought to the size."""
        from ldmlab.inference.inputs import Fitted

        shared: Inputs = {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        if self.source is not None and (self.mask is None or self.strength is not None):
            file = str(self.source)
            shared["init_image"] = Fitted(file, size) if size is not None and self.mask is None else file
        if self.source is not None and self.mask is not None:
            shared |= {"image": str(self.source), "mask": self.mask}
        return shared

    def _each(self, reads: frozenset[str], lines: list[str | Inputs], shared: Inputs) -> list[Inputs]:
        """One dict a prompt; without a prompt a single one where the input image is enough."""
        if self.task is not None:
            return [line if isinstance(line, dict) else self._file(line, reads) for line in lines]
        if not lines and (reads <= _PAIR or (reads - _PAIR == {"caption"} and shared.keys() - {"negative_prompt"})):
            return [{"caption": ""} if "caption" in reads else {}]
        if not lines and reads == {"reference"} and self.source is not None:
            return [{"reference": str(self.source)}]
        if not lines:
            raise InputError(f"this model takes {_names(reads)} as input; give at least one prompt or --prompts FILE.")
        if not reads and not all(isinstance(line, dict) and line.keys() & _OF_ANY for line in lines):
            raise InputError("this model takes no prompts; leave them out and give the number of images with --count.")
        return [line if isinstance(line, dict) else _prompt(line, reads) for line in lines]

    def _file(self, line: str, reads: frozenset[str]) -> Inputs:
        """A prompt as a file path, as --task defines."""
        field, empty = TASKS[str(self.task)], {"caption": ""} if "caption" in reads else {}
        if self.task == "inpainting":
            return {"image": line, "mask": self.mask or ALPHA, **empty}
        if field not in reads:
            way = "give one trained for it"
            if self.task == "variations":
                way = "give one trained with conditioner=image, or use --from IMAGE --strength 0.3 with any"
            raise InputError(f"--task {self.task}: this model takes {_names(reads)} as input, not {field}; {way}.")
        return {field: line, **(empty if self.task == "variations" else {})}


def _prompt(line: str, reads: frozenset[str]) -> Inputs:
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


def label(inputs: Inputs) -> str:
    """A short description of an image's inputs."""
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
