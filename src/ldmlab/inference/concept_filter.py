"""Prompts and images blocked by concepts, with the text and image towers of one CLIP model.

    score(x, c) = (cos(x, c) - mean_n cos(x, n)) / std_n cos(x, n)

over a list of neutral texts n: how many standard deviations nearer x is to the concept c than to neutral texts. The gap
between images and texts is common to all texts and drops out, so prompts and images have one scale. A cosine similarity
alone has another range for every model and for every input.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.errors import InputError
from ldmlab.metrics.features import OpenClipFeatures

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
