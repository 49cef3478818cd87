"""Evaluators: how well samples show their conditions, by networks trained on real images.

An evaluator is trained on real training images only, scored on validation images, and then on the samples. The
same samples with exchanged conditions give the score of chance. `ClassAccuracy` is the evaluator of classes.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.classifier import ByClass, ImageClassifier, Learned, Show, train_classifier

Fields = Mapping[str, Any]
Batches = Iterable[Fields]
Labelled = tuple[Tensor, list[str]]  # uint8 (N, 3, H, W), class of each
Known = Callable[[str], Sequence[Fields]]  # split => fields of its images


@dataclass(frozen=True)
class Evidence:
    """Images are uint8 (3, H, W) each, with their maps and boxes; conditions are fields of the model's inputs."""

    real: Callable[[str, tuple[str, ...]], Batches]  # split, more fields of KEY.json => its images, at sample size
    reference: str  # split that samples are compared with: train | val
    conditions: Sequence[Fields]  # of each sample, the fields that the evaluator needs
    samples: Tensor  # uint8 (N, 3, H, W)
    seed: int = 0
    class_names: Sequence[str] = ()  # by class_id, where the data have them
    track: Callable[[range, int, str], Iterable[int]] = lambda steps, count, title: steps
    more: Mapping[str, tuple[Sequence[Fields], Tensor]] = field(default_factory=dict)  # further samples, see Evaluator
    save: Callable[[str, int, Tensor], str] = lambda name, number, image: ""  # name, number, image => its file

    def shown(self, title: str) -> Show:
        """The updates of a training, for a note in reports."""
        return lambda updates: self.track(updates, len(updates), title)


def others(conditions: Sequence[Fields], seed: int) -> list[Fields]:
    """For each sample the conditions of another one, at random among those that differ."""
    order = list(range(len(conditions)))
    random.Random(seed).shuffle(order)
    partner = dict(zip(order, order[1:] + order[:1], strict=True))

    def other(place: int) -> Fields:
        own, found = conditions[place], partner[place]
        while found != place and all(np.array_equal(value, conditions[found][name]) for name, value in own.items()):
            found = partner[found]
        return conditions[found]

    return [other(place) for place in range(len(order))]


@dataclass(frozen=True)
class ClassResult:
    """One class: the score on real images and on samples, None where there is no image; with the numbers of images."""

    name: str
    real: float | None
    real_count: int
    samples: float | None
    samples_count: int


@dataclass(frozen=True)
class Accuracy:
    """Result of an evaluator; all values are fractions in 0 .. 1, higher is better."""

    measures: str  # in a few words
    how: str  # in a sentence or two, for the report
    samples: float
    real: float  # of validation images: the evaluator's own limit
    shuffled: float  # the same samples with conditions exchanged between them
    chance: float | None = None  # of guessing; None: `shuffled` is the only measure of it
    classes: Sequence[ClassResult] = field(default_factory=list)
    learned: Learned | None = None  # None: an evaluator that is not trained
    images: Sequence[Mapping[str, Any]] = ()  # of further samples: file, class, caption, whether it is right
    training_captions: "Accuracy | None" = None  # the same for conditions of training images

    @classmethod
    def of(cls, found: Sequence[ByClass], names: Sequence[str], **rest: Any) -> "Accuracy":
        """From the scores by class of validation images, of samples, and of samples with exchanged conditions."""
        real, samples, exchanged = found
        rows = zip(names, real.scores, real.counts, samples.scores, samples.counts, strict=True)
        classes = [ClassResult(*row) for row in rows]
        return cls(samples=samples.mean, real=real.mean, shuffled=exchanged.mean, classes=classes, **rest)

    @property
    def of_real(self) -> float | None:
        """Samples over real images."""
        return self.samples / self.real if self.real else None

    @property
    def times_chance(self) -> float | None:
        """Samples over guessing, or over exchanged conditions where that is not known."""
        base = self.shuffled if self.chance is None else self.chance
        return self.samples / base if base else None


class Evaluator(Protocol):
    """Gets real images and samples once. `requests` and `reads` are optional."""

    needs: ClassVar[frozenset[str]]  # fields of a sample's conditions that it compares with
    # reads: frozenset[str]            fields of KEY.json of the reference images beyond the model's inputs
    # requests(known, seed) => {name: conditions of further samples}, which `Evidence.more` then holds
    # guidance_scale: float | None     of those samples; None: the protocol's

    def __call__(self, evidence: Evidence) -> Accuracy: ...


class Baseline(Protocol):
    """Results for the same conditions without a model."""

    needs: ClassVar[frozenset[str]]  # fields of the conditions that it starts from
    title: ClassVar[str]

    def learn(self, real: Batches) -> None:
        """Training images, for baselines that copy from them."""

    def __call__(self, conditions: Sequence[Fields]) -> Tensor:
        """uint8 (B, 3, H, W)."""
        ...


# ---- classes


@dataclass(frozen=True)
class ClassAccuracy:
    """Fraction of samples classified as the class of their condition, balanced over classes.

    captions: 0 measures the protocol's own samples. Above 0, so many conditions of each class are newly sampled, of
    validation images, whose words training may never have seen, and of training images.
    """

    idle_without = "guidance_scale: captions"
    field: str = "class_id"  # of KEY.json: the class
    captions: int = 0  # of each class
    guidance_scale: float | None = None  # of the further samples; None: the protocol's
    steps: int = 700  # updates of the classifier
    batch_size: int = 64
    side: int = 32  # px that it sees

    @property
    def needs(self) -> frozenset[str]:
        """The class, unless it comes with further samples."""
        return frozenset() if self.captions else frozenset({self.field})

    @property
    def reads(self) -> frozenset[str]:
        """The class of the reference images."""
        return frozenset({self.field}) if self.captions else frozenset()

    def requests(self, known: Known, reference: str, seed: int) -> dict[str, Sequence[Fields]]:
        """Conditions of further samples, of validation and of training images."""
        splits = {"validation": reference, "training": "train"} if self.captions else {}
        return {name: self._by_class(known(split), seed) for name, split in splits.items()}

    def _by_class(self, known: Sequence[Fields], seed: int) -> list[Fields]:
        """Conditions of each class with different captions, in the order of the classes' names."""
        by_class: dict[str, dict[str, Fields]] = defaultdict(dict)
        for fields in known:
            by_class[str(fields[self.field])].setdefault(str(fields.get("caption")), fields)
        chosen: list[Fields] = []
        for name in sorted(by_class):
            different = list(by_class[name].values())
            random.Random(f"{seed}/{name}").shuffle(different)
            chosen += different[: self.captions]
        return chosen

    def __call__(self, evidence: Evidence) -> Accuracy:
        """Train on the training split, then classify validation images and samples."""
        classifier = trained(
            evidence, self._labelled(evidence, "train"), self.steps, self.batch_size, "classes", self.side
        )
        real = self._labelled(evidence, evidence.reference)
        if not self.captions:
            return self._accuracy(classifier, evidence, real, evidence.conditions, evidence.samples)
        of_training = self._accuracy(classifier, evidence, real, *evidence.more["training"], "seen")
        further = self._accuracy(classifier, evidence, real, *evidence.more["validation"], "category")
        return replace(further, training_captions=of_training)

    def _accuracy(
        self,
        classifier: ImageClassifier,
        evidence: Evidence,
        real: Labelled,
        conditions: Sequence[Fields],
        samples: Tensor,
        name: str = "",  # before the numbers of saved images; "": none are saved
    ) -> Accuracy:
        classes = [{self.field: str(one[self.field])} for one in conditions]
        labels, exchanged = ([one[self.field] for one in part] for part in (classes, others(classes, evidence.seed)))
        right = classifier.predict(samples) == class_numbers(labels, classifier.classes)
        images = [
            {
                "file": evidence.save(name, number, image),
                "class": class_name(label, evidence.class_names),
                "caption": str(one.get("caption", "")),
                "right": bool(right[number]),
            }
            for number, (one, label, image) in enumerate(zip(conditions, labels, samples, strict=True))
            if name
        ]
        return classified(
            classifier,
            evidence,
            real,
            (samples, labels),
            (samples, exchanged),
            measures="samples classified as the class of their condition",
            how=(
                f"A classifier of {len(classifier.classes)} classes, trained on real training images alone, classifies "
                "every sample; fractions are balanced over classes."
            ),
            images=images,
        )

    def _labelled(self, evidence: Evidence, split: str) -> Labelled:
        images, labels = [], list[str]()
        for batch in evidence.real(split, (self.field,)):
            if len(batch["key"]):
                images.append(batch["image"])
                values = batch[self.field]
                labels += map(str, values.tolist() if isinstance(values, Tensor) else values)
        if not images:
            raise InputError(f"no image of {split} could be read to learn {self.field} from.")
        return torch.cat(images), labels


def trained(
    evidence: Evidence, examples: Labelled, steps: int, batch_size: int, what: str, side: int = 32
) -> ImageClassifier:
    """A classifier of the examples' classes, numbers by value, names by letter."""
    images, labels = examples
    classes = sorted(set(labels), key=lambda label: (int(label), "") if label.isdigit() else (0, label))
    show = evidence.shown(f"training the classifier of {what}")
    numbers = class_numbers(labels, classes)
    sizes = {"steps": steps, "batch_size": batch_size, "side": side}
    return train_classifier(images, numbers, classes, seed=evidence.seed, show=show, **sizes)


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Places of labels among the classes, (N,)."""
    place = {name: number for number, name in enumerate(classes)}
    if unknown := sorted({label for label in labels if label not in place}):
        raise InputError(f"class {unknown[0]} is in no training image; pack the data with another split.")
    return torch.tensor([place[label] for label in labels], dtype=torch.int64)


def classified(
    classifier: ImageClassifier, evidence: Evidence, real: Labelled, samples: Labelled, exchanged: Labelled, **rest: Any
) -> Accuracy:
    """Accuracy on validation images, on samples, and on samples with exchanged conditions."""
    classes = classifier.classes
    found = [classifier.agreement(part, class_numbers(labels, classes)) for part, labels in (real, samples, exchanged)]
    named = [class_name(label, evidence.class_names) for label in classes]
    return Accuracy.of(found, named, chance=1 / len(classes), learned=classifier.learned, **rest)


def class_name(label: str, names: Sequence[str]) -> str:
    """A class by its name, where it is a number and the data have names."""
    if not label.isdigit():
        return label
    return names[int(label)] if int(label) < len(names) else f"class {label}"
