"""Concept filters from files, and what they block in one sampling; see docs/filters.md for the file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldmlab import distributed
from ldmlab.build import load_clip, pick_device
from ldmlab.errors import InputError, shown
from ldmlab.files import read_text, write_json
from ldmlab.inference.concept_filter import KINDS, ConceptFilter
from ldmlab.metrics.features import OpenClipFeatures, clip_of_run, published_clip

FILE = "filter.json"  # in the folder of the samples
_FEWEST_NEUTRAL = 8  # texts that a standard deviation is taken over
_LARGEST = 1e9  # threshold, far above any score; .nan would block nothing


def read_filter(path: Path, device: str = "auto") -> ConceptFilter:
    """The filter of a yaml file with `clip`, `neutral` and `concepts`, ready to use."""
    try:
        found = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--filter {path} cannot be read as yaml ({str(error).splitlines()[0]}).") from error
    if not isinstance(found, dict) or found.keys() != {"clip", "neutral", "concepts"}:
        raise InputError(
            f"--filter {path} must hold clip, neutral and concepts, and nothing else; see docs/filters.md."
        )
    neutral, concepts = found["neutral"], found["concepts"]
    if not isinstance(neutral, list) or not isinstance(concepts, dict) or not concepts:
        raise InputError(
            f"--filter {path}: neutral must list texts, and concepts map at least one text to its threshold, "
            "such as gun: 3."
        )
    for text in (*neutral, *concepts):
        if not isinstance(text, str) or not text.strip() or text.encode(errors="ignore").decode() != text:
            raise InputError(f"--filter {path}: {shown(text)} is no text; put it in quotes if it is meant to be one.")
    if len(set(neutral)) < _FEWEST_NEUTRAL:
        raise InputError(f"--filter {path}: neutral must list at least {_FEWEST_NEUTRAL} different texts.")
    limits = {name: _limits(path, name, value) for name, value in concepts.items()}
    features = _clip(path, found["clip"]).to(pick_device(device))
    return ConceptFilter(features, neutral, limits)


def _limits(path: Path, name: str, value: Any) -> dict[str, float | None]:
    """Thresholds for prompts and images: one number for both, or each by name, where a missing one is not checked."""
    own = value if isinstance(value, dict) else dict.fromkeys(KINDS, value)
    if not own or not own.keys() <= set(KINDS) or not all(map(_finite, own.values())):
        raise InputError(
            f"--filter {path}: the threshold of {shown(name)} is {shown(value)}; give a number, or "
            "{prompts: 3, images: 2.5}."
        )
    return {kind: float(own[kind]) if kind in own else None for kind in KINDS}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _clip(path: Path, node: Any) -> OpenClipFeatures:
    if isinstance(node, dict) and node.keys() == {"run"}:
        return clip_of_run(str(node["run"]), load_clip(str(node["run"])))
    if isinstance(node, dict) and node.keys() == {"name", "pretrained"}:
        return published_clip(str(node["name"]), str(node["pretrained"]))
    raise InputError(
        f"--filter {path}: clip is {shown(node)}; give {{run: RUN}}, or {{name: ViT-B-32, pretrained: openai}}."
    )


@dataclass
class Guard:
    """A filter over the images of one call, of this process."""

    filter: ConceptFilter
    blocked: list[dict[str, Any]] = field(default_factory=list)
    checked: int = 0  # images

    def blocked_prompts(self, inputs: Sequence[Mapping[str, Any]], first: int) -> frozenset[int]:
        """Entries whose caption is blocked, the same on every process; the first one counts them."""
        captions = {number: str(one["caption"]) for number, one in enumerate(inputs) if one.get("caption")}
        different = sorted(set(captions.values()))
        why = {text: one for text, one in zip(different, self.filter.blocked_prompts(different), strict=True) if one}
        found = {number: why[text] for number, text in captions.items() if text in why}
        if distributed.rank() == 0:
            self.blocked += [
                {"index": first + number, "what": "prompt", "prompt": captions[number], **asdict(one)}
                for number, one in found.items()
            ]
        return frozenset(found)

    def allowed(self, names: Sequence[str], images: Tensor) -> list[bool]:
        """Whether each image, uint8 (B, H, W, 3), may be written as the file NAME."""
        found = self.filter.blocked_images(images)
        self.checked += len(found)
        self.blocked += [
            {"what": "image", "file": name, **asdict(one)} for name, one in zip(names, found, strict=True) if one
        ]
        return [one is None for one in found]

    def finish(self, folder: Path, variants: int) -> tuple[int, str]:
        """Write what all processes blocked, on the first; the files that are missing, and a sentence on it."""
        parts = distributed.gather((self.blocked, self.checked))
        blocked = [one for own, _ in parts for one in own]
        prompts, images = (sum(one["what"] == what for one in blocked) for what in ("prompt", "image"))
        checked = sum(count for _, count in parts)
        if distributed.rank() == 0:
            write_json(folder / FILE, {**self.filter.record(), "images_checked": checked, "blocked": blocked})
        lost = prompts * variants
        return lost + images, f"; blocked: {lost} by their prompts, {images} of {checked} images ({FILE})"
