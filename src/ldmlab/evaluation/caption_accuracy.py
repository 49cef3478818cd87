"""Whether samples show what their captions say, by the captions that a CLIP finds nearest to them."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.evaluation.classifier import ByClass
from ldmlab.evaluation.evaluators import Accuracy, ClassAccuracy, Evidence, Fields, class_numbers, others
from ldmlab.nn.openclip import OpenClip
from ldmlab.nn.pixels import to_float

_BATCH = 128
Pool = Mapping[str, Sequence[str]]  # class => captions of its reference images


@dataclass(frozen=True, kw_only=True)
class CaptionAccuracy(ClassAccuracy):
    """Fraction of samples whose own caption is the nearest of several of the same class, balanced over classes.

    right: cos(image, caption) > cos(image, c) for each of `candidates` - 1 captions c of reference images.
    """

    run: str  # of stage=clip, or a CLIP's model folder
    clip: OpenClip  # read from there by the caller
    candidates: int = 50

    def __call__(self, evidence: Evidence) -> Accuracy:
        """Without any training: validation images, samples for their captions, samples for training captions."""
        images, real = list[Tensor](), list[Fields]()
        for batch in evidence.real(evidence.reference, ("caption", self.field)):
            images.append(batch["image"])
            real += [{"caption": c, self.field: v} for c, v in zip(batch["caption"], batch[self.field], strict=True)]
        pool: dict[str, set[str]] = defaultdict(set)
        for one in real:
            pool[str(one[self.field])].add(str(one["caption"]))
        captions = {label: sorted(pool[label]) for label in sorted(pool)}
        of_real = self._right(torch.cat(images), real, captions, evidence.seed)
        found = {
            name: Accuracy.of(
                [of_real, *(self._right(samples, asked, captions, evidence.seed) for asked in (conditions, exchanged))],
                list(captions),
                measures="samples whose own caption is nearest",
                how=(
                    f"Each image is compared with its caption and up to {self.candidates - 1} others of the same "
                    f"{self.field} in the space of {Path(self.run).name}; it is right if its own is nearest."
                ),
                chance=1 / self.candidates,
            )
            for name, (conditions, samples) in evidence.more.items()
            for exchanged in [
                others([{n: one[n] for n in ("caption", self.field)} for one in conditions], evidence.seed)
            ]
        }
        return replace(found["validation"], training_captions=found["training"])

    @torch.inference_mode()
    def _right(self, images: Tensor, conditions: Sequence[Fields], pool: Pool, seed: int) -> ByClass:
        """By class; images uint8 (N, 3, H, W)."""
        texts = dict.fromkeys(caption for captions in pool.values() for caption in captions)
        texts |= dict.fromkeys(str(one["caption"]) for one in conditions)
        embedded = dict(zip(texts, self._texts(list(texts)), strict=True))
        right = []
        for image, one in zip(self._images(images), conditions, strict=True):
            own = str(one["caption"])
            rest = [caption for caption in pool.get(str(one[self.field]), ()) if caption != own]
            random.Random(f"{seed}/{own}").shuffle(rest)
            cosines = torch.stack([embedded[caption] for caption in (own, *rest[: self.candidates - 1])]) @ image
            right.append(bool((cosines[0] > cosines[1:]).all()))
        labels = class_numbers([str(one[self.field]) for one in conditions], list(pool))
        total = torch.bincount(labels, minlength=len(pool))
        return ByClass.of(torch.bincount(labels[torch.tensor(right)], minlength=len(pool)), total)

    def _images(self, images: Tensor) -> Tensor:
        model: Any = self.clip.model
        parts = [model.encode_image(self.clip.pixels(to_float(part))) for part in images.split(_BATCH)]
        return F.normalize(torch.cat(parts).float(), dim=1)

    def _texts(self, captions: Sequence[str]) -> Tensor:
        model: Any = self.clip.model
        parts = [model.encode_text(part) for part in self.clip.ids(captions).split(_BATCH)]
        return F.normalize(torch.cat(parts).float(), dim=1)
