"""Does a sample show the class that was asked for? The judge of categories looks at whole images, or at crops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldmlab.evaluation.category_classifier import CategoryClassifier, train_classifier
from ldmlab.evaluation.judge import labelled, numbers, verdicts
from ldmlab.evaluation.task_evidence import ClassVerdict, Evidence, Verdict

Labelled = tuple[Tensor, list[str]]  # uint8 (N, 3, H, W), class of each


@dataclass(frozen=True)
class ClassJudge:
    """Balanced over classes: the mean of each class's share of samples that are taken for it."""

    steps: int = 700  # updates of the classifier
    batch_size: int = 64
    needs: ClassVar[frozenset[str]] = frozenset({"class_id"})

    def __call__(self, evidence: Evidence) -> Verdict:
        """Learn from the training split, then look at held-out images and at samples."""
        examples = _labelled(evidence, "train")
        judge = learned_classifier(evidence, examples, self.steps, self.batch_size, "the judge of classes learns")
        asked, others = ([str(one["class_id"]) for one in part] for part in (evidence.asked, evidence.others()))
        return class_verdicts(
            judge,
            _labelled(evidence, evidence.reference),
            (evidence.samples, asked),
            (evidence.samples, others),
            measures="samples taken for the class asked for",
            how=(
                f"A classifier of {len(judge.categories)} classes that has seen only real training images looks at "
                "every sample; shares are balanced over classes."
            ),
            names=evidence.class_names,
        )


def _labelled(evidence: Evidence, split: str) -> Labelled:
    batches = evidence.real(split, ("class_id",))
    return labelled(
        ({**batch, "class_id": torch.as_tensor(batch["class_id"]).tolist()} for batch in batches), "class_id"
    )


def learned_classifier(
    evidence: Evidence,
    examples: Labelled,  # classes are numbers, as text
    steps: int,
    batch_size: int,
    title: str,  # while it learns
) -> CategoryClassifier:
    """A judge of the classes that the examples have."""
    images, labels = examples
    classes = sorted(set(labels), key=int)
    return train_classifier(
        images,
        numbers(labels, classes),
        classes,
        steps=steps,
        batch_size=batch_size,
        seed=evidence.seed,
        show=evidence.shown(title),
    )


def class_verdicts(
    judge: CategoryClassifier,
    real: Labelled,
    samples: Labelled,
    exchanged: Labelled,
    *,
    measures: str,
    how: str,
    names: Sequence[str] = (),  # by number, where the data say
) -> Verdict:
    """What the trained judge says of held-out images, of samples, and of samples with exchanged requests.

    Its categories are class numbers, as text.
    """
    found, _ = verdicts(judge, real, samples)
    shuffled, _ = verdicts(judge, real, exchanged)
    return Verdict(
        measures=measures,
        how=how,
        samples=found["samples"],
        held_out_real=found["held_out_real"],
        shuffled=shuffled["samples"],
        chance=found["chance"],
        classes=[_row(row, names) for row in found["by_category"]],
        learned=judge.learned,
    )


def _row(row: Mapping[str, Any], names: Sequence[str]) -> ClassVerdict:
    shares = [row[f"{kind}_right"] / row[kind] if row[kind] else None for kind in ("real", "samples")]
    return ClassVerdict(class_name(int(row["category"]), names), shares[0], row["real"], shares[1], row["samples"])


def class_name(number: int, names: Sequence[str]) -> str:
    """Of a class_id."""
    return names[number] if number < len(names) else f"class {number}"
