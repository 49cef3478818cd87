"""CLIP score (Hessel et al., EMNLP 2021): how well a picture shows its caption.

    100 max(cos(picture, caption), 0), averaged over the generated pictures

The factor is 100, as papers on text-to-image print it and torchmetrics computes it; Hessel et al. wrote 2.5.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import check_features


class ClipScore(Metric):
    """CLIP score of the generated pictures with the standard error of the mean; sums only."""

    full_state_update = False
    higher_is_better = True
    score_sum: Tensor
    square_sum: Tensor
    pictures: Tensor

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)
        for name in ("score_sum", "square_sum"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pictures", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, clip: Tensor, real: bool = False, text: Tensor | None = None) -> None:
        """Embeddings (B, D) of pictures and of their captions; real pictures are not looked at."""
        if real:
            return
        if text is None:
            raise InputError("metric.clip_score needs the caption of every generated picture; leave that score out.")
        if clip.shape != text.shape:
            raise InputError(
                f"metric.clip_score: {tuple(clip.shape)} pictures and {tuple(text.shape)} captions do not fit."
            )
        pairs = (F.normalize(check_features(part, "CLIP embeddings").double(), dim=1) for part in (clip, text))
        scores = 100 * torch.stack([*pairs]).prod(dim=0).sum(dim=1).clamp_min(0).to(self.score_sum.device)
        self.score_sum += scores.sum()
        self.square_sum += scores.square().sum()
        self.pictures += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """`clip_score` and `clip_score_std`."""
        if not self.pictures:
            raise InputError("no generated pictures were given, so there is nothing to score.")
        mean = self.score_sum / self.pictures
        variance = (self.square_sum / self.pictures - mean.square()).clamp_min(0)
        return {"clip_score": mean, "clip_score_std": (variance / self.pictures).sqrt()}
