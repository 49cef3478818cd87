"""What judges the recipes of `recipes.py`: two encoders, the real images that samples are compared with, and scores."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ldmlab.build import load_clip
from ldmlab.data.shard_data import ShardData
from ldmlab.evaluation.classifier import ImageClassifier, Learned, prepared, train_classifier
from ldmlab.metrics.features import OpenClipFeatures
from ldmlab.metrics.frechet import distance_from
from ldmlab.metrics.precision_recall import precision_recall

ENCODERS = ("clip", "classifier")
SETS = ("pairs", "concepts")  # held-out pairs of concept and style, held-out concepts
_REFERENCE = 2000  # training images that samples are compared with, the first in stored order, which is by hash
_STEPS, _BATCH, _SIDE = 1000, 64, 32  # of the classifier's training, and px that it sees
Seen = Mapping[str, Tensor]  # an encoder's name => features (N, D); "class": (N,)


@dataclass(frozen=True)
class Images:
    """Real images uint8 (N, 3, H, W) with their captions and classes "STYLE | CATEGORY"."""

    pixels: Tensor
    captions: list[str]
    classes: list[str]

    @classmethod
    def read(cls, folder: str, limit: int | None = None) -> "Images":
        """Image shards in stored order."""
        data = ShardData(folder, folder, 64, fields=("caption", "style", "category"), workers=0)
        pixels, captions, classes = [], list[str](), list[str]()
        for batch in data.eval_loader("val", 256, limit=limit):
            pixels.append(batch["image"])
            captions += batch["caption"]
            classes += [f"{s} | {c}" for s, c in zip(batch["style"], batch["category"], strict=True)]
        return cls(torch.cat(pixels), captions, classes)


class Judges:
    """The CLIP that reads the captions, and a classifier of styles and categories that knows no caption.

    The classifier is trained on real training images alone; it and the features of real images are kept in `folder`.
    """

    def __init__(self, folder: Path, train: str, held_out: Mapping[str, str], clip: str, count: int) -> None:
        """held_out: folders of `SETS`; count: captions of each, for which samples are made."""
        self.clip = OpenClipFeatures(load_clip(clip), clip)
        self.real = {name: Images.read(held_out[name], count) for name in SETS}
        self.captions = [caption for name in SETS for caption in self.real[name].captions]
        self.asked = [label for name in SETS for label in self.real[name].classes]
        self.classifier = self._classifier(folder, train)
        self.training = self._kept(folder / "training_features.safetensors", train)
        self._gaussians = {name: distance_from(*gaussian(self.training[name])) for name in ENCODERS}

    def _classifier(self, folder: Path, train: str) -> ImageClassifier:
        """Trained once."""
        weights, about = folder / "classifier.safetensors", folder / "classifier.json"
        if not weights.exists():
            images = Images.read(train)
            classes = sorted(set(images.classes))
            labels = torch.tensor([classes.index(label) for label in images.classes])
            made = train_classifier(images.pixels, labels, classes, steps=_STEPS, batch_size=_BATCH, side=_SIDE)
            folder.mkdir(parents=True, exist_ok=True)
            about.write_text(json.dumps({"classes": classes, "examples": len(labels)}))
            safetensors.torch.save_file({k: v.contiguous() for k, v in made.state_dict().items()}, weights)
        known = json.loads(about.read_text())
        made = ImageClassifier(known["classes"], side=_SIDE)
        made.load_state_dict(safetensors.torch.load_file(weights))
        made.eval().learned = Learned(known["examples"], _STEPS, _BATCH)
        return made

    def _kept(self, path: Path, train: str) -> Seen:
        """Features of training images."""
        if not path.exists():
            safetensors.torch.save_file(dict(self.see(Images.read(train, _REFERENCE).pixels)), path)
        return safetensors.torch.load_file(path)

    @torch.inference_mode()
    def see(self, images: Tensor, batch_size: int = 128) -> Seen:
        """uint8 (N, 3, H, W) => features of both encoders and the classifier's class."""
        rows: dict[str, list[Tensor]] = {"clip": [], "classifier": [], "class": []}
        *before, last = self.classifier.network
        for part in images.split(batch_size):
            ready = prepared(part, self.classifier.side).to(memory_format=torch.channels_last)
            hidden = torch.nn.Sequential(*before)(ready)
            rows["clip"].append(self.clip(part)["features"].float())
            rows["classifier"].append(hidden)
            rows["class"].append(last(hidden).argmax(dim=1))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def scores(self, images: Tensor) -> dict[str, float]:
        """Of one image for each caption, pairs first: distances to training images, precision, recall, accuracies."""
        seen = self.see(images)
        found: dict[str, float] = {}
        for name in ENCODERS:
            found[f"distance_{name}"] = float(self._gaussians[name](*gaussian(seen[name])))
            real, centre = self.training[name], self.training[name].mean(dim=0)
            both = precision_recall(real - centre, seen[name] - centre, 3)
            found |= {f"{what}_{name}": float(value) for what, value in zip(("precision", "recall"), both, strict=True)}
        found["distance"] = (found["distance_clip"] * found["distance_classifier"]) ** 0.5
        return found | self._accuracies(seen["class"])

    def _accuracies(self, classes: Tensor) -> dict[str, float]:
        """Shares of images whose style, and whose category, is that of their caption, by set."""
        named = [self.classifier.classes[number].split(" | ") for number in classes.tolist()]
        asked, found, first = [label.split(" | ") for label in self.asked], dict[str, float](), 0
        for name in SETS:
            rows = range(first, first := first + len(self.real[name].captions))
            for place, what in enumerate(("style", "category")):
                right = sum(named[row][place] == asked[row][place] for row in rows)
                found[f"{what}_{name}"] = right / len(rows)
        return found

    def floor(self) -> dict[str, float]:
        """The same scores of the held-out images themselves."""
        return self.scores(torch.cat([self.real[name].pixels for name in SETS]))


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64."""
    rows = features.double()
    return rows.mean(dim=0), torch.cov(rows.T)


def samples_of(model: Any, captions: Sequence[str], settings: Mapping[str, Any]) -> Tensor:
    """uint8 (N, 3, H, W), one for each caption."""
    images: Tensor = model.sample(caption=list(captions), batch_size=128, **settings)
    return images.permute(0, 3, 1, 2)
