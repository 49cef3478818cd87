"""Prompts and images blocked by concepts, with the text and image towers of one CLIP model (docs/filters.md).

    score(x, c) = (cos(x, c) - mean_n cos(x, n)) / std_n cos(x, n)

over a list of neutral texts n: how many standard deviations nearer x is to the concept c than to neutral texts. The gap
between images and texts is common to all texts and drops out, so prompts and images have one scale. A cosine similarity
alone has another range for every model and for every input.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from ldmlab import distributed
from ldmlab.build import load_clip, pick_device
from ldmlab.errors import InputError, first_line, shown
from ldmlab.files import read_text, write_json
from ldmlab.metrics.features import OpenClipFeatures, clip_of_run, published_clip

KINDS = ("prompts", "images")
_BATCH = 64


@dataclass(frozen=True)
class Blocked:
    """Why a prompt or an image was blocked: the concept that exceeds its threshold most."""

    concept: str
    score: float
    threshold: float


class ConceptFilter:
    """Concepts with a threshold for prompts and one for images each (None: not checked)."""

    def __init__(
        self, features: OpenClipFeatures, neutral: Sequence[str], concepts: Mapping[str, Mapping[str, float | None]]
    ) -> None:
        self.features, self.concepts = features, {name: dict(limits) for name, limits in concepts.items()}
        self._neutral, self._concepts = self._texts(neutral), self._texts(list(concepts))  # (N, D), (C, D)

    def record(self) -> dict[str, Any]:
        """What decides whether something is blocked, for settings; neutral texts apart."""
        return {"clip": self.features.name, "weights": self.features.weights_hash, "concepts": self.concepts}

    def prompt_scores(self, prompts: Sequence[str]) -> Tensor:
        """Scores (B, C)."""
        return self._scores(self._texts(prompts))

    def image_scores(self, images: Tensor) -> Tensor:
        """Images uint8 (B, H, W, 3) => scores (B, C)."""
        parts = [self.features(part.permute(0, 3, 1, 2))["features"] for part in images.split(_BATCH)]
        return self._scores(F.normalize(torch.cat(parts).float(), dim=1).cpu())

    def blocked_prompts(self, prompts: Sequence[str]) -> list[Blocked | None]:
        """For each prompt why it is blocked, or None."""
        return list(self._decide(self.prompt_scores(prompts), "prompts")) if len(prompts) else []

    def blocked_images(self, images: Tensor) -> list[Blocked | None]:
        """For each image, uint8 (B, H, W, 3), why it is blocked, or None."""
        return list(self._decide(self.image_scores(images), "images")) if len(images) else []

    def _decide(self, scores: Tensor, kind: str) -> Iterator[Blocked | None]:
        if not scores.isfinite().all():  # no comparison with them holds, so nothing would be blocked
            raise InputError(f"the filter's {self.features.name} gives scores that are no numbers; use another CLIP.")
        limits = {name: limit for name, own in self.concepts.items() if (limit := own[kind]) is not None}
        for row in scores.tolist():
            found = dict(zip(self.concepts, row, strict=True))
            over = [Blocked(name, found[name], limit) for name, limit in limits.items() if found[name] > limit]
            yield max(over, key=lambda one: one.score - one.threshold, default=None)

    def _scores(self, embedded: Tensor) -> Tensor:
        neutral = embedded @ self._neutral.T  # (B, N)
        spread = neutral.std(dim=1, keepdim=True).clamp_min(1e-6)
        return (embedded @ self._concepts.T - neutral.mean(dim=1, keepdim=True)) / spread

    def _texts(self, texts: Sequence[str]) -> Tensor:
        """(B, D) of unit length, on the CPU."""
        parts = [self.features.texts(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
        return F.normalize(torch.cat(parts).float(), dim=1).cpu()


FILE = "filter.json"  # in the folder of the samples
_FEWEST_NEUTRAL = 8  # texts that a standard deviation is taken over
_LARGEST = 1e9  # threshold, far above any score; .nan would block nothing


def read_filter(path: Path, device: str = "auto") -> ConceptFilter:
    """The filter of a yaml file with `clip`, `neutral` and `concepts`, ready to use."""
    try:
        found = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--filter {path} cannot be read as yaml ({first_line(error)}).") from error
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
