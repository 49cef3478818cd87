"""Does the model draw what it is asked for? A judge trained on real images looks at samples, by category.

Two lists of captions are drawn: of held-out images, whose words may never have been seen in training, and of
training images. The first says how far the model generalises, the second whether it has learned to obey.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ldmlab.evaluation.category_classifier import CategoryClassifier, train_classifier
from ldmlab.evaluation.judge import captions_by_category, labelled, numbers, verdicts
from ldmlab.evaluation.judge_training import Show
from ldmlab.evaluation.protocol import Protocol

Sample = Mapping[str, Any]
Draw = Callable[[Sequence[Sample], int], Tensor]  # requests, number of the first one => uint8 (N, 3, H, W)
Save = Callable[[str, int, Tensor], str]  # name, number, image => file
Batches = Callable[[str], Iterable[Sample]]  # split => batches with images and categories


@dataclass(frozen=True)
class CategoryScore:
    """The category part of an evaluation."""

    protocol: Protocol
    draw: Draw
    save: Save
    batches: Batches
    show: Show  # the updates of the judge

    def run(self, held_out: Sequence[Sample], training: Sequence[Sample]) -> dict[str, Any]:
        """The numbers for held-out captions, and under `training_captions` those for captions seen in training."""
        judge = self._learn()
        real = self._labelled(self.protocol.reference)
        first = self.protocol.samples or len(held_out)  # numbers of noise that the protocol's samples have not taken
        found = self._ask(judge, real, held_out, "category", first)
        first += len(found["images"])
        seen = self._ask(judge, real, training, "seen", first)
        kept = ("samples", "ratio", "by_category", "images")
        return found | {
            "learned": asdict(judge.learned),
            "guidance_scale": self.protocol.category_guidance_scale,
            "training_captions": {name: seen[name] for name in kept},
        }

    def _learn(self) -> CategoryClassifier:
        images, labels = self._labelled("train")
        categories = sorted(set(labels))
        return train_classifier(
            images,
            numbers(labels, categories),
            categories,
            steps=self.protocol.classifier_steps,
            seed=self.protocol.seed,
            show=self.show,
        )

    def _labelled(self, split: str) -> tuple[Tensor, list[str]]:
        return labelled(self.batches(split), str(self.protocol.category_field))

    def _ask(
        self,
        judge: CategoryClassifier,
        real: tuple[Tensor, list[str]],
        known: Sequence[Sample],
        name: str,
        first: int,
    ) -> dict[str, Any]:
        field = str(self.protocol.category_field)
        asked = captions_by_category(known, field, self.protocol.captions_per_category, self.protocol.seed)
        drawn = self.draw(asked, first)
        found, right = verdicts(judge, real, (drawn, [str(sample[field]) for sample in asked]))
        found["images"] = [
            {
                "file": self.save(name, number, image),
                "category": str(sample[field]),
                "caption": str(sample.get("caption", "")),
                "right": bool(right[number]),
            }
            for number, (sample, image) in enumerate(zip(asked, drawn, strict=True))
        ]
        return found
