"""The real images of an evaluation: what they say of themselves, and their features where those are not kept yet."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmlab.data.dataset import BatchSpec, ShardDataset
from ldmlab.data.shard_data import ShardData
from ldmlab.evaluation.by_class import class_of
from ldmlab.evaluation.conditions import conditions
from ldmlab.evaluation.drawing import Track
from ldmlab.evaluation.reference_statistics import ReferenceKey, against_other_split, see_reference
from ldmlab.evaluation.score import EvaluationPass, numbered
from ldmlab.inference.image_files import readable, save_image
from ldmlab.metrics.features import FeatureExtractor


@dataclass(frozen=True)
class RealImages:
    """Both splits, shared between processes."""

    data: ShardData
    extractor: FeatureExtractor
    folder: Path | None  # of kept reference statistics; None: none are kept
    batch_size: int
    rank: int
    world: int
    track: Track

    def known(self, split: str, fields: Iterable[str], limit: int | None = None) -> Sequence[Mapping[str, Any]]:
        """Some fields of every image of a split."""
        return conditions(self.data, split, sorted(set(fields)), limit)

    def labels(self, split: str, field: str, limit: int | None) -> dict[int, str]:
        """The field's value by the image's number, of those that can be read."""
        dataset = ShardDataset(
            self.data.folder(split, "images"), BatchSpec(self.data.image_size, images=False, fields=(field,))
        )
        found = {}
        for number in range(min(len(dataset), limit or len(dataset))):
            sample = dataset[number]
            if "key" in sample:
                why = f"image {sample['key']} of {split} has no such field; choose one that every KEY.json holds"
                found[number] = class_of(sample, field, f"{why}, or null.")
        return found

    def loader(self, split: str, limit: int | None = None) -> Iterable[dict[str, Any]]:
        """This process's share of a split's images."""
        total = self.data.manifest(split, "images").total
        batches = -(-min(total, limit or total) // (self.batch_size * self.world))
        loader = self.data.eval_loader(split, self.batch_size, self.world, self.rank, limit, kind="images")
        return self.track(loader, batches, f"real images ({split})")

    def features(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) of this process's share of a split, with their images' numbers (B,)."""
        for index, images in numbered(self.loader(split)):
            yield self.extractor(images)["features"].float().cpu(), index

    def show_to(self, seen: EvaluationPass, split: str, limit: int | None) -> bool:
        """To the scores, by kept features where they suffice: True if they did."""
        key = ReferenceKey.of(self.data, split, limit, self.extractor)
        images = lambda: numbered(self.loader(split, limit))  # noqa: E731
        return see_reference(seen, key, self.folder, images, self.rank, self.world)

    def beside(self, seen: EvaluationPass, split: str) -> EvaluationPass:
        """A second distance of the same samples, to another split."""
        key = ReferenceKey.of(self.data, split, None, self.extractor)
        return against_other_split(seen, key, self.folder, lambda: numbered(self.loader(split)), self.rank, self.world)

    def save(self, out: Path, split: str, album: Sequence[Mapping[str, Any]]) -> None:
        """Those of the report, by the first process."""
        if self.rank == 0:
            dataset = self.data.val_dataset("images", split)
            for item in album:
                save_image(out, "real", item["number"], readable(dataset, len(dataset), item["number"]))

    def image(self, split: str, number: int) -> Mapping[str, Any]:
        """One image with its fields."""
        sample = self.data.val_dataset("images", split)[number]
        return {**sample, "image": torch.as_tensor(sample["image"])}
