"""Score a first stage: real images there and back, compared pixel by pixel and as sets of features."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldmlab.data.shard_data import ShardData
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.record import (
    FORMAT_VERSION,
    Paper,
    all_items,
    check_reference,
    features_record,
    gathered,
    perceptual_record,
    reference_record,
)
from ldmlab.evaluation.score import EvaluationPass, Score
from ldmlab.inference.image_files import save_image
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.metrics.reconstruction import ReconstructionMeasures
from ldmlab.nn.lpips import LPIPS
from ldmlab.nn.pixels import numbers_only, to_bytes, to_float
from ldmlab.provenance import provenance

_SPREADS = {name: f"{name}_std" for name in ("psnr", "ssim", "lpips", "psim")}


@dataclass
class ReconstructionEvaluation:
    """PSNR, SSIM, with VGG's weights LPIPS and PSIM, and feature distances; KL models by the posterior's mean."""

    first_stage: nn.Module
    info: Mapping[str, Any]  # path, weights, step, fingerprint
    data: ShardData
    protocol: Protocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    lpips: LPIPS | None
    out: Path
    batch_size: int = 32
    rank: int = 0
    world: int = 1
    curves: Mapping[str, Path] = field(default_factory=dict)
    paper: Paper = lambda result: None
    track: Callable[[Iterable[Any], int, str], Iterable[Any]] = lambda items, count, title: items

    @torch.inference_mode()
    def run(self) -> dict[str, Any]:
        """The content of metrics.json (on every process), which the first process writes."""
        began = time.monotonic()
        check_reference(self.protocol, self.data)
        measures = ReconstructionMeasures(
            self.data.object_background, self.lpips, None if self.lpips is None else self.lpips.unweighted
        )
        seen = EvaluationPass(self.extractor, self.metrics)
        mine: list[tuple[int, str, str, str]] = []  # of this process: number, files of both images, caption
        limit = self.protocol.reference_limit
        loader = self.data.eval_loader(
            self.protocol.reference, self.batch_size, self.world, self.rank, limit, kind="images"
        )
        total = self.data.manifest(self.protocol.reference, "images").total
        count = min(total, limit or total)
        seen.check_counts(count, count)
        batches = -(-count // (self.batch_size * self.world))
        for batch in self.track(loader, batches, "there and back"):
            if not len(batch["key"]):
                continue
            rebuilt = self._there_and_back(batch["image"])
            measures.update(batch["image"], rebuilt)
            seen.add(batch["image"], True, batch["position"])
            seen.add(rebuilt, False, batch["position"])
            mine += self._kept(batch, rebuilt)
        result = self._result(measures.compute(), seen, sum(gathered(seen.counts[True])), _album(mine))
        result["seconds"] = round(time.monotonic() - began, 1)
        result["provenance"] = provenance()
        result["paper"] = self.paper(result)
        if self.rank == 0:
            text = json.dumps(result, indent=1, ensure_ascii=False)
            (self.out / "metrics.json").write_text(text, encoding="utf-8")
        return result

    def _there_and_back(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) => the same of the reconstruction, on the CPU."""
        device = next((p.device for p in self.first_stage.parameters()), images.device)
        mean = self.first_stage.encode(to_float(images.to(device))).mean  # type: ignore[operator]
        return to_bytes(numbers_only(self.first_stage.decode(mean).float())).cpu()  # type: ignore[operator]

    def _kept(self, batch: Mapping[str, Any], rebuilt: Tensor) -> Iterator[tuple[int, str, str, str]]:
        """The pairs that the report shows, saved: the first `shown` of the split."""
        for row, number in enumerate(torch.as_tensor(batch["position"]).tolist()):
            if number < self.protocol.shown:
                files = [
                    save_image(self.out, name, number, images[row])
                    for name, images in (("rebuilt", rebuilt), ("real", batch["image"]))
                ]
                yield number, files[0], files[1], str(batch.get("caption", batch["key"])[row])

    def _result(
        self, found: Mapping[str, float], seen: EvaluationPass, images: int, album: Mapping[str, Any]
    ) -> dict[str, Any]:
        scores = {
            name: Score(value, found.get(_SPREADS.get(name, "")))
            for name, value in found.items()
            if name not in _SPREADS.values()
        } | seen.compute((images, images))
        return {
            "format_version": FORMAT_VERSION,
            "protocol": self.protocol.as_plain(),
            "model": dict(self.info),
            "sampling": {"images": images, "size": self.data.image_size, "conditions": "reference"},
            "reference": reference_record(self.data, self.protocol.reference, images),
            "features": features_record(self.extractor),
            "perceptual": perceptual_record(self.lpips),
            "scores": {name: asdict(score) for name, score in scores.items()},
            "images": {**album, "extras": []},
        }


def _album(mine: list[tuple[int, str, str, str]]) -> dict[str, list[dict[str, str]]]:
    """The pairs of all processes in the order of the split."""
    pairs = sorted(all_items(mine))
    return {
        "samples": [{"file": rebuilt, "caption": caption} for _, rebuilt, _, caption in pairs],
        "real": [{"file": real, "caption": caption} for _, _, real, caption in pairs],
    }
