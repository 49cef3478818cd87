"""CLIP score (Hessel et al., EMNLP 2021): how well an image shows its caption.

    100 max(cos(image, caption), 0), averaged over the generated images

The factor is 100, as papers on text-to-image print it and torchmetrics computes it; Hessel et al. wrote 2.5.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import check_features


class ClipScore(Metric):
    """CLIP score of the generated images with the standard error of the mean; sums only."""

    full_state_update = False
    higher_is_better = True
    score_sum: Tensor
    square_sum: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)
        for name in ("score_sum", "square_sum"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, clip: Tensor, real: bool = False, text: Tensor | None = None) -> None:
        """Embeddings (B, D) of images and of their captions; real images are not looked at."""
        if real:
            return
        if text is None:
            raise InputError("metric.clip_score needs the caption of every generated image; leave that score out.")
        if clip.shape != text.shape:
            raise InputError(
                f"metric.clip_score: {tuple(clip.shape)} images and {tuple(text.shape)} captions do not fit."
            )
        pairs = (F.normalize(check_features(part, "CLIP embeddings").double(), dim=1) for part in (clip, text))
        scores = 100 * torch.stack([*pairs]).prod(dim=0).sum(dim=1).clamp_min(0).to(self.score_sum.device)
        self.score_sum += scores.sum()
        self.square_sum += scores.square().sum()
        self.images += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """`clip_score` and `clip_score_std`."""
        if not self.images:
            raise InputError("no generated images were given, so there is nothing to score.")
        mean = self.score_sum / self.images
        variance = (self.square_sum / self.images - mean.square()).clamp_min(0)
        return {"clip_score": mean, "clip_score_std": (variance / self.images).sqrt()}
