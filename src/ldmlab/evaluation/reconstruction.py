"""Score a first stage: real pictures there and back, compared pixel by pixel and as sets of features."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldmlab.data.shard_data import ShardData
from ldmlab.evaluation.album import save_picture
from ldmlab.evaluation.paper_table import Measured, place
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.report import write_report
from ldmlab.evaluation.score import EvaluationPass, Score
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.metrics.reconstruction import ReconstructionMeasures
from ldmlab.nn.pixels import to_bytes, to_float
from ldmlab.provenance import provenance

_SPREADS = {"psnr": "psnr_std"}


@dataclass
class ReconstructionEvaluation:
    """PSNR, SSIM, LPIPS where its weights are there, and feature distances; KL models by the posterior's mean."""

    first_stage: nn.Module
    info: Mapping[str, Any]  # path, weights, step, fingerprint
    data: ShardData
    protocol: Protocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    lpips: nn.Module | None
    out: Path
    batch_size: int = 32
    curves: Mapping[str, Path] = field(default_factory=dict)
    track: Callable[[Iterable[Any], int, str], Iterable[Any]] = lambda items, count, title: items

    @torch.inference_mode()
    def run(self) -> dict[str, Any]:
        """The content of metrics.json, which is written with the report."""
        began = time.monotonic()
        measures = ReconstructionMeasures(self.data.object_background, self.lpips)
        seen = EvaluationPass(self.extractor, self.metrics)
        album: dict[str, list[dict[str, str]]] = {"samples": [], "real": []}
        limit = self.protocol.reference_limit
        loader = self.data.eval_loader(self.protocol.reference, self.batch_size, limit=limit, kind="images")
        total = self.data.manifest(self.protocol.reference, "images").total
        for batch in self.track(loader, -(-min(total, limit or total) // self.batch_size), "there and back"):
            rebuilt = self._there_and_back(batch["image"])
            measures.update(batch["image"], rebuilt)
            seen.add(batch["image"], True, batch["position"])
            seen.add(rebuilt, False, batch["position"])
            self._keep(album, batch, rebuilt)
        result = self._result(measures.compute(), seen, album)
        result["seconds"] = round(time.monotonic() - began, 1)
        result["provenance"] = provenance()
        (self.out / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        write_report(self.out)
        return result

    def _there_and_back(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) => the same of the reconstruction, on the CPU."""
        device = next((p.device for p in self.first_stage.parameters()), images.device)
        mean = self.first_stage.encode(to_float(images.to(device))).mean  # type: ignore[operator]
        return to_bytes(self.first_stage.decode(mean).float()).cpu()  # type: ignore[operator]

    def _keep(self, album: dict[str, list[dict[str, str]]], batch: Mapping[str, Any], rebuilt: Tensor) -> None:
        for number, picture in enumerate(rebuilt):
            place_in_album = len(album["real"])
            if place_in_album >= self.protocol.shown:
                return
            caption = str(batch.get("caption", batch["key"])[number])
            for kind, name, shown in (("samples", "rebuilt", picture), ("real", "real", batch["image"][number])):
                album[kind].append({"file": save_picture(self.out, name, place_in_album, shown), "caption": caption})

    def _result(self, found: Mapping[str, float], seen: EvaluationPass, album: Mapping[str, Any]) -> dict[str, Any]:
        scores = {
            name: Score(value, found.get(_SPREADS.get(name, "")))
            for name, value in found.items()
            if name not in _SPREADS.values()
        } | seen.compute()
        manifest = self.data.manifest(self.protocol.reference, "images")
        pictures = seen.counts[True]
        return {
            "format_version": 1,
            "protocol": self.protocol.as_plain(),
            "model": dict(self.info),
            "sampling": {"pictures": pictures, "size": self.data.image_size, "conditions": "reference"},
            "reference": {
                "folder": str(self.data.folder(self.protocol.reference, "images")),
                "split": self.protocol.reference,
                "pictures": pictures,
                "manifest_hash": manifest.hash,
                "transform": manifest.transform,
                "image_size": self.data.image_size,
                "source": manifest.source,
            },
            "features": {
                "name": self.extractor.name,
                "weights_hash": self.extractor.weights_hash,
                "width": self.extractor.width,
            },
            "scores": {name: asdict(score) for name, score in scores.items()},
            "paper": self._paper(scores, pictures, manifest.transform.get("rule")),
            "pictures": {**album, "extras": []},
        }

    def _paper(self, scores: Mapping[str, Score], pictures: int, rule: str | None) -> dict[str, Any] | None:
        if self.protocol.paper_table is None:
            return None
        measured = Measured(
            method=Path(str(self.info["path"])).name,
            values={name: score.value for name, score in scores.items()},
            dataset=self.protocol.dataset,
            picture_size=self.data.image_size,
            samples=pictures,
            features=self.extractor.name,
            reference_split=self.protocol.reference,
            reference_pictures=pictures,
            reference_rule=rule,
        )
        table = place(self.protocol.paper_table, measured)
        return asdict(table) | {"comparable": table.comparable}
