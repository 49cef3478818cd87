"""The task's own part of an evaluation: classifiers measure the samples, simple baselines get the same scores."""

import colorsys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.evaluation.breakdowns import PairedPass
from ldmlab.evaluation.evaluators import Accuracy, Baseline, Batches, Evaluator, Evidence
from ldmlab.evaluation.record import all_items, image_file, save_image
from ldmlab.evaluation.run import Setup
from ldmlab.evaluation.scoring import EvaluationPass, Numbered
from ldmlab.evaluation.sources import Samples

_GREY = 128  # of a hole
_GROUND = (244, 244, 244)
_BATCH = 64  # real images, or answers of a baseline, at a time


@dataclass
class TaskPart:
    """To be made after the real images are processed and before the first sample."""

    setup: Setup
    evaluators: Mapping[str, Evaluator]
    baselines: Mapping[str, Baseline]
    samples: Samples
    known: Callable[[str], Any]  # split => the fields of its images, as PairedPass takes them
    seen: EvaluationPass  # with the real images
    shown: Sequence[int]  # numbers of samples that the report shows
    _kept: list[tuple[int, Tensor]] = field(default_factory=list)  # samples of this process with their numbers

    def __post_init__(self) -> None:
        self.conditions = self.samples.requests
        inputs = set(self.conditions[0]) if len(self.conditions) else set()
        for kind, parts in (("evaluators", self.evaluators), ("baselines", self.baselines)):
            for name, part in parts.items():
                if missing := sorted(part.needs - inputs):
                    raise InputError(
                        f"protocol.{kind}.{name} works with {missing[0]}, which is no input of this model (its inputs: "
                        f"{', '.join(sorted(inputs)) or 'none'}); choose the protocol of its own task."
                    )
        self._passes = {name: self.seen.for_other_samples() for name in self.baselines}
        finders = {name: find for name, part in self.evaluators.items() if (find := getattr(part, "requests", None))}
        split, seed = self.setup.protocol.reference, self.setup.protocol.seed
        self._further = {name: find(self.known, split, seed) for name, find in finders.items()}

    @property
    def further_images(self) -> int:
        """Samples for the evaluators' own conditions, of all processes."""
        return sum(len(conditions) for kinds in self._further.values() for conditions in kinds.values())

    def watch(self, stream: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same samples, kept for the classifiers."""
        for index, images in stream:
            if self.evaluators:
                self._kept += zip(index.tolist(), images, strict=True)
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

    def _evaluated(self) -> dict[str, Any]:
        """On the first process only, after all have generated the further samples: training takes a minute or two."""
        samples = torch.stack([image for _, image in sorted(all_items(self._kept), key=lambda item: item[0])])
        protocol, first, found = self.setup.protocol, self.samples.count, {}  # first: the next free number of noise
        for name, evaluator in self.evaluators.items():
            scale = getattr(evaluator, "guidance_scale", None)
            settings, more = protocol.settings(**({} if scale is None else {"guidance_scale": scale})), {}
            for kind, conditions in self._further.get(name, {}).items():
                title, how = f"samples for {kind} conditions", (self.setup.batch_size, self.setup.track, first)
                more[kind] = conditions, self.samples.all(conditions, settings, title, *how)
                first += len(conditions)
            if distributed.rank() == 0:
                found[name] = plain(evaluator(self._evidence(evaluator, samples, more)))
                if more:
                    found[name]["guidance_scale"] = self.samples.settings.guidance_scale if scale is None else scale
        return distributed.from_first(found)

    def _evidence(self, evaluator: Evaluator, samples: Tensor, more: Mapping[str, Any]) -> Evidence:
        return Evidence(
            real=self._real,
            reference=self.setup.protocol.reference,
            conditions=[{name: one[name] for name in sorted(evaluator.needs)} for one in self.conditions],
            samples=samples,
            seed=self.setup.protocol.seed,
            class_names=self.setup.data.manifest("train", "images").classes or (),
            track=self.setup.track,
            more=more,
            save=partial(save_image, self.setup.out),
        )

    def _real(self, split: str, fields: tuple[str, ...]) -> Batches:
        """All images of a split, prepared by the task as for validation."""
        data, protocol = self.setup.data, self.setup.protocol
        data = replace(data, fields=tuple(dict.fromkeys((*data.fields, *fields)))) if fields else data
        limit = protocol.reference_limit if split == protocol.reference else None
        return data.eval_loader(split, _BATCH, limit=limit, kind="images")

    def _answer(self, name: str, baseline: Baseline) -> dict[str, Any]:
        """A baseline's scores for the same conditions, against the same images."""
        baseline.learn(self._real("train", ()))
        seen, protocol, lpips = self._passes[name], self.setup.protocol, self.setup.lpips
        answers = self._answers(f"baseline_{name}", baseline)
        pairs = PairedPass(protocol, self.known(protocol.reference), seen.extractor, lpips) if protocol.pairs else None
        seen.add_all(pairs.watch(answers) if pairs else answers, real=False)
        scores = seen.compute() | (pairs.scores() if pairs else {})
        return {
            "title": baseline.title,
            "scores": {score: asdict(value) for score, value in scores.items()},
            "images": [image_file(f"baseline_{name}", number) for number in self.shown],
        }

    def _answers(self, kind: str, baseline: Baseline) -> Iterator[Numbered]:
        mine, shown = range(distributed.rank(), len(self.conditions), distributed.world_size()), set(self.shown)
        starts = range(0, len(mine), _BATCH)
        for start in self.setup.track(starts, len(starts), baseline.title):
            chunk = list(mine[start : start + _BATCH])
            images = baseline([self.conditions[number] for number in chunk])
            for number, image in zip(chunk, images, strict=True):
                if number in shown:
                    save_image(self.setup.out, kind, number, image)
            yield torch.tensor(chunk), images

    def _given(self) -> list[str]:
        """The model's input as images, for the samples that are shown; none for text and numbers."""
        files = []
        for number in self.shown:
            image = request_image(self.conditions[number], self.setup.data.image_size)
            if image is None:
                return []
            files.append(save_image(self.setup.out, "given", number, image) if distributed.rank() == 0 else "")
        return files


def plain(found: Accuracy) -> dict[str, Any]:
    """For metrics.json."""
    training = None if found.training_captions is None else plain(found.training_captions)
    return asdict(found) | {"of_real": found.of_real, "times_chance": found.times_chance, "training_captions": training}


def request_image(request: Mapping[str, Any], size: int) -> Tensor | None:
    """The conditions as an image uint8 (3, H, W): boxes, a map, a low-resolution or masked image; None for text."""
    if "mask" in request and "image" in request:
        shown = np.where(np.asarray(request["mask"])[..., None] > 0, _GREY, np.asarray(request["image"]))
    elif "low_resolution" in request:
        small = Image.fromarray(np.asarray(request["low_resolution"]))
        shown = np.asarray(small.resize((size, size), Image.Resampling.NEAREST))
    elif "reference" in request:
        shown = np.asarray(ImageOps.fit(Image.fromarray(np.asarray(request["reference"])), (size, size)))
    elif "boxes" in request:
        shown = np.asarray(_boxes(request["boxes"], size))
    elif "segmentation" in request:
        labels = np.asarray(request["segmentation"])
        shown = np.array([_GROUND, *(colour(number) for number in range(int(labels.max(initial=0))))])[labels]
    else:
        return None
    return torch.from_numpy(np.ascontiguousarray(shown.astype(np.uint8).transpose(2, 0, 1)))


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
