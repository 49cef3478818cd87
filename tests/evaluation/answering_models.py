"""In place of a model: answers a task's requests by a plain function, so that every score is known beforehand."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from test_reference_statistics import Means
from torch import Tensor

from ldmlab.data.shard_data import ShardData
from ldmlab.diffusion.schedule import Schedule
from ldmlab.evaluation.model_evaluation import Evaluation
from ldmlab.evaluation.protocol import Protocol
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall
from ldmlab.report.pages import write_report

sys.path.append(str(Path(__file__).parents[1]))
from scenes import write_scenes

SIZE = 32
Answer = Callable[[Sequence[Mapping[str, Any]], list[int]], Tensor]  # requests, their numbers => uint8 (B, 3, H, W)


class Answers:
    """A model that is a function."""

    info: Mapping[str, Any] = {"path": "runs/answers", "weights": "averaged"}
    image_size = (SIZE, SIZE)
    precision, diffusion = "float32", torch.nn.Identity()
    diffusion.backbone, diffusion.path = torch.nn.Identity(), Schedule()  # type: ignore[assignment]

    def __init__(self, reads: set[str], answer: Answer) -> None:
        self.reads, self.answer = frozenset(reads), answer

    def resolved(self, settings: SampleSettings, requests: Sequence[Any] = ()) -> SampleSettings:
        return replace(settings, guidance_scale=1.0, size=self.image_size)

    def sample_batch(
        self, requests: Sequence[Mapping[str, Any]], settings: Any, numbers: list[int], *rest: Any
    ) -> Tensor:
        return self.answer(requests, list(numbers)).permute(0, 2, 3, 1)


def scene_data(folder: Path, train: int, val: int, task: Any) -> ShardData:
    for split, count in (("train", train), ("val", val)):
        write_scenes(folder / split, count, size=(SIZE, SIZE), per_shard=50)
    data = ShardData(str(folder / "train"), str(folder / "val"), image_size=SIZE, fields=("caption",), workers=0)
    return data.with_task(task)


def originals(data: ShardData, split: str = "val") -> Tensor:
    """uint8 (N, 3, H, W)."""
    return torch.cat([batch["image"] for batch in data.eval_loader(split, 16, kind="images")])


def evaluate(model: Answers, data: ShardData, protocol: Protocol, out: Path, **parts: Any) -> dict[str, Any]:
    metrics = {
        "fid": FrechetDistance(6, small_sample=True),
        "kid": KernelDistance(subsets=3, subset_size=5),
        "precision_recall": PrecisionRecall(),
    }
    result = Evaluation(model, data, protocol, Means(), metrics, out, 4, **parts).run()  # type: ignore[arg-type]
    write_report(out)
    return result
