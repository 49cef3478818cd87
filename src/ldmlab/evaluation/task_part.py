"""The task's own part of an evaluation: classifiers measure the samples, simple baselines get the same scores."""

import colorsys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from ldmlab import distributed
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.evaluators import Accuracy, Baseline, Batches, Evaluator, Evidence
from ldmlab.evaluation.paired import PairedPass
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.record import all_items
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, Track, untracked
from ldmlab.evaluation.sources import Samples
from ldmlab.inference.image_files import save_image

_GREY = 128  # of a hole
_GROUND = (244, 244, 244)
_BATCH = 64  # real images, or answers of a baseline, at a time


@dataclass
class TaskPart:
    """To be made after the real images are processed and before the first sample."""

    evaluators: Mapping[str, Evaluator]
    baselines: Mapping[str, Baseline]
    protocol: Protocol
    samples: Samples
    known: Callable[[str], Any]  # split => the fields of its images, as PairedPass takes them
    data: ShardData
    seen: EvaluationPass  # with the real images
    lpips: nn.Module | None
    out: Path
    shown: Sequence[int]  # numbers of samples that the report shows
    batch_size: int = 64
    track: Track = untracked
    _samples: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        inputs = set(self.conditions[0]) if len(self.conditions) else set()
        for kind, parts in (("evaluators", self.evaluators), ("baselines", self.baselines)):
            for name, part in parts.items():
                if missing := sorted(part.needs - inputs):
                    raise InputError(
                        f"protocol.{kind}.{name} works with {missing[0]}, which is no input of this model (its inputs: "
                        f"{', '.join(sorted(inputs)) or 'none'}); choose the protocol of its own task."
                    )
        self._passes = {name: self.seen.for_other_samples() for name in self.baselines}

    @property
    def conditions(self) -> Sequence[Mapping[str, Any]]:
        """Of each sample."""
        return self.samples.requests

    def watch(self, stream: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same samples, kept for the classifiers."""
        for index, images in stream:
            if self.evaluators:
                self._samples += zip(index.tolist(), images, strict=True)
            yield index, images

    def run(self) -> dict[str, Any]:
        """`evaluators`, `baselines` and the files of `given` images for metrics.json, on every process."""
        if not self.evaluators and not self.baselines:
            return {}
        return {
            "evaluators": self._evaluated() if self.evaluators else {},
            "baselines": {name: self._answer(name, one) for name, one in self.baselines.items()},
            "given": self._given(),
        }

    # ---- classifiers

    def _evaluated(self) -> dict[str, Any]:
        """On the first process only, after all have generated the further samples: training takes a minute or two."""
        samples = [image for _, image in sorted(all_items(self._samples), key=lambda item: item[0])]
        first = self.samples.count  # noise numbers that the protocol's samples do not use
        found = {}
        for name, evaluator in self.evaluators.items():
            more, first = self._further(evaluator, first)
            if distributed.rank() == 0:
                found[name] = plain(evaluator(self._evidence(evaluator, torch.stack(samples), more)))
                if more:
                    scale = getattr(evaluator, "guidance_scale", None)
                    found[name]["guidance_scale"] = self.samples.settings.guidance_scale if scale is None else scale
        return distributed.from_first(found)

    def _further(self, evaluator: Evaluator, first: int) -> tuple[dict[str, tuple[Sequence[Any], Tensor]], int]:
        """Conditions and images of the samples that an evaluator needs, and the next free number."""
        find = getattr(evaluator, "requests", None)
        further = find(self.known, self.protocol.reference, self.protocol.seed) if find else {}
        settings, found = self.protocol.settings(getattr(evaluator, "guidance_scale", None)), {}
        for name, conditions in further.items():
            title = f"samples for {name} conditions"
            found[name] = (
                conditions,
                self.samples.all(conditions, settings, title, self.batch_size, self.track, first),
            )
            first += len(conditions)
        return found, first

    def _evidence(self, evaluator: Evaluator, samples: Tensor, more: Mapping[str, Any]) -> Evidence:
        return Evidence(
            real=self._real,
            reference=self.protocol.reference,
            conditions=[{name: one[name] for name in sorted(evaluator.needs)} for one in self.conditions],
            samples=samples,
            seed=self.protocol.seed,
            class_names=self.data.manifest("train", "images").classes or (),
            track=self.track,
            more=more,
            save=lambda name, number, image: save_image(self.out, name, number, image),
        )

    def _real(self, split: str, fields: tuple[str, ...]) -> Batches:
        """All images of a split, prepared by the task as for validation."""
        data = replace(self.data, fields=tuple(dict.fromkeys((*self.data.fields, *fields)))) if fields else self.data
        limit = self.protocol.reference_limit if split == self.protocol.reference else None
        return data.eval_loader(split, _BATCH, limit=limit, kind="images")

    # ---- baselines

    def _answer(self, name: str, baseline: Baseline) -> dict[str, Any]:
        """A baseline's scores for the same conditions, against the same images."""
        baseline.learn(self._real("train", ()))
        seen, protocol = self._passes[name], self.protocol
        pairs = (
            PairedPass(protocol, self.known(protocol.reference), seen.extractor, self.lpips) if protocol.pairs else None
        )
        answers = self._answers(name, baseline)
        seen.add_all(pairs.watch(answers) if pairs else answers, real=False)
        scores = seen.compute() | (pairs.scores() if pairs else {})
        return {
            "title": baseline.title,
            "scores": {score: asdict(value) for score, value in scores.items()},
            "images": [_file(f"baseline_{name}", number) for number in self.shown],
        }

    def _answers(self, name: str, baseline: Baseline) -> Iterator[Numbered]:
        mine, shown = range(distributed.rank(), len(self.conditions), distributed.world_size()), set(self.shown)
        starts = range(0, len(mine), _BATCH)
        for start in self.track(starts, len(starts), baseline.title):
            chunk = list(mine[start : start + _BATCH])
            images = baseline([self.conditions[number] for number in chunk])
            for number, image in zip(chunk, images, strict=True):
                if number in shown:
                    save_image(self.out, f"baseline_{name}", number, image)
            yield torch.tensor(chunk), images

    def _given(self) -> list[str]:
        """The model's input as images, for the samples that are shown; none for text and numbers."""
        files = []
        for number in self.shown:
            image = request_image(self.conditions[number], self.data.image_size)
            if image is None:
                return []
            files.append(save_image(self.out, "given", number, image) if distributed.rank() == 0 else "")
        return files


def _file(kind: str, number: int) -> str:
    return f"images/{kind}_{number:05d}.png"


def plain(found: Accuracy) -> dict[str, Any]:
    """For metrics.json."""
    training = None if found.training_captions is None else plain(found.training_captions)
    return asdict(found) | {
        "of_real": found.of_real,
        "times_chance": found.times_chance,
        "training_captions": training,
    }


def request_image(request: Mapping[str, Any], size: int) -> Tensor | None:
    """The conditions as an image uint8 (3, H, W): boxes, a map, a low-resolution or masked image; None for text."""
    if "mask" in request and "image" in request:
        known = np.where(np.asarray(request["mask"])[..., None] > 0, _GREY, np.asarray(request["image"]))
        return _tensor(known.astype(np.uint8))
    if "low_resolution" in request:
        small = Image.fromarray(np.asarray(request["low_resolution"]))
        return _tensor(np.asarray(small.resize((size, size), Image.Resampling.NEAREST)))
    if "reference" in request:
        looked_at = Image.fromarray(np.asarray(request["reference"]))
        return _tensor(np.asarray(ImageOps.fit(looked_at, (size, size))))
    if "boxes" in request:
        return _tensor(np.asarray(_boxes(request["boxes"], size)))
    if "segmentation" in request:
        labels = np.asarray(request["segmentation"])
        colours = np.array([_GROUND, *(colour(number) for number in range(int(labels.max(initial=0))))], np.uint8)
        return _tensor(colours[labels])
    return None


def colour(class_id: int) -> tuple[int, int, int]:
    """Of a class; neighbours differ most."""
    red, green, blue = colorsys.hls_to_rgb(class_id * 0.61803 % 1, 0.45 + 0.1 * (class_id % 3), 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _boxes(boxes: Any, size: int) -> Image.Image:
    """Each box with outline and translucent fill in its class's colour."""
    canvas = Image.new("RGB", (size, size), _GROUND)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for entry in boxes:
        corners = [edge * (size - 1) for edge in entry["box"]]
        ink = colour(entry["class_id"])
        draw.rectangle(corners, fill=(*ink, 70), outline=(*ink, 255))
    return canvas


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
