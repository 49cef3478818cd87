"""The task's own part of an evaluation: judges look at the samples, and simple answers are scored beside them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.paired import PairedPass
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.record import all_items, gathered
from ldmlab.evaluation.score import EvaluationPass, Numbered
from ldmlab.evaluation.task_evidence import Baseline, Batches, Evidence, Judge
from ldmlab.evaluation.task_images import request_image
from ldmlab.inference.image_files import save_image

if TYPE_CHECKING:
    from ldmlab.evaluation.evaluate import Evaluation

_SHARED = ("judges", "baselines", "protocol", "data", "lpips", "out", "rank", "world", "track")  # with Evaluation
_BATCH = 64  # real images, or answers of a baseline, at a time


@dataclass
class TaskPart:
    """Made once the real images are seen and before the first sample."""

    judges: Mapping[str, Judge]
    baselines: Mapping[str, Baseline]
    protocol: Protocol
    asked: Sequence[Mapping[str, Any]]
    known: Any  # as PairedPass takes it
    data: ShardData
    seen: EvaluationPass  # knows the real images
    lpips: nn.Module | None
    out: Path
    shown: Sequence[int]  # numbers of samples that the report shows
    rank: int = 0
    world: int = 1
    track: Callable[[Iterable[Any], int, str], Iterable[Any]] = lambda items, count, title: items
    _drawn: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        told = set(self.asked[0]) if len(self.asked) else set()
        for kind, parts in (("judges", self.judges), ("baselines", self.baselines)):
            for name, part in parts.items():
                if missing := sorted(part.needs - told):
                    raise InputError(
                        f"protocol.{kind}.{name} works with {missing[0]}, which this model is not told (it is told "
                        f"{', '.join(sorted(told)) or 'nothing'}); choose the protocol of its own task."
                    )
        self._passes = {name: self.seen.for_other_samples() for name in self.baselines}

    def watch(self, stream: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same samples, kept for the judges."""
        for index, images in stream:
            if self.judges:
                self._drawn += zip(index.tolist(), images, strict=True)
            yield index, images

    def run(self) -> dict[str, Any]:
        """`judges`, `baselines` and the files of `given` images for metrics.json, on every process."""
        if not self.judges and not self.baselines:
            return {}
        judged = self._judge() if self.judges else {}
        return {
            "judges": judged,
            "baselines": {name: self._answer(name, one) for name, one in self.baselines.items()},
            "given": self._given(),
        }

    # ---- judges

    def _judge(self) -> dict[str, Any]:
        """By the first process alone: a judge learns for a minute or two."""
        samples = [image for _, image in sorted(all_items(self._drawn), key=lambda item: item[0])]
        found = {name: self._verdict(one, torch.stack(samples)) for name, one in self._mine()}
        return gathered(found)[0]

    def _mine(self) -> Iterable[tuple[str, Judge]]:
        return self.judges.items() if self.rank == 0 else ()

    def _verdict(self, judge: Judge, samples: Tensor) -> dict[str, Any]:
        asked = [{name: one[name] for name in sorted(judge.needs)} for one in self.asked]
        verdict = judge(
            Evidence(
                real=self._real,
                reference=self.protocol.reference,
                asked=asked,
                samples=samples,
                seed=self.protocol.seed,
                class_names=self.data.manifest("train", "images").classes or (),
                track=self.track,
            )
        )
        return asdict(verdict) | {"of_real": verdict.of_real, "times_chance": verdict.times_chance}

    def _real(self, split: str, fields: tuple[str, ...]) -> Batches:
        """All images of a split as the task serves held-out ones."""
        data = replace(self.data, fields=tuple(dict.fromkeys((*self.data.fields, *fields)))) if fields else self.data
        limit = self.protocol.reference_limit if split == self.protocol.reference else None
        return data.eval_loader(split, _BATCH, limit=limit, kind="images")

    # ---- baselines

    def _answer(self, name: str, baseline: Baseline) -> dict[str, Any]:
        """Scores of its answers to the same requests, against the same images."""
        baseline.learn(self._real("train", ()))
        seen, protocol = self._passes[name], self.protocol
        pairs = PairedPass(protocol, self.known, seen.extractor, self.lpips) if protocol.pairs else None
        answers = self._answers(name, baseline)
        seen.add_all(pairs.watch(answers) if pairs else answers, real=False)
        counts = (sum(gathered(seen.counts[True])), sum(gathered(seen.counts[False])))
        scores = seen.compute(counts) | (pairs.scores() if pairs else {})
        return {
            "title": baseline.title,
            "scores": {score: asdict(value) for score, value in scores.items()},
            "images": [_file(f"baseline_{name}", number) for number in self.shown],
        }

    def _answers(self, name: str, baseline: Baseline) -> Iterator[Numbered]:
        mine, shown = range(self.rank, len(self.asked), self.world), set(self.shown)
        starts = range(0, len(mine), _BATCH)
        for start in self.track(starts, len(starts), baseline.title):
            chunk = list(mine[start : start + _BATCH])
            images = baseline([self.asked[number] for number in chunk])
            for number, image in zip(chunk, images, strict=True):
                if number in shown:
                    save_image(self.out, f"baseline_{name}", number, image)
            yield torch.tensor(chunk), images

    def _given(self) -> list[str]:
        """What the model was told, as images, for the samples that are shown; none for words and numbers."""
        files = []
        for number in self.shown:
            image = request_image(self.asked[number], self.data.image_size)
            if image is None:
                return []
            files.append(save_image(self.out, "given", number, image) if self.rank == 0 else "")
        return files


def _file(kind: str, number: int) -> str:
    return f"images/{kind}_{number:05d}.png"


def task_part(
    evaluation: "Evaluation", known: Any, asked: Sequence[Mapping[str, Any]], seen: EvaluationPass, shown: Sequence[int]
) -> TaskPart:
    """The part of an evaluation whose real images have been seen."""
    parts = {name: getattr(evaluation, name) for name in _SHARED}
    return TaskPart(known=known, asked=asked, seen=seen, shown=shown, **parts)
