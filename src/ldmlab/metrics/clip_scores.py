"""Scores of CLIP embeddings: how well an image shows its caption, how far two sets of images are apart, retrieval.

CLIP score (Hessel et al., EMNLP 2021): 100 max(cos(image, caption), 0), averaged over the generated images. The factor
is 100, as papers on text-to-image print it and torchmetrics computes it; Hessel et al. wrote 2.5.

CMMD (Jayasumana et al., CVPR 2024): the kernel distance of CLIP embeddings of unit length, times 1000.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10

The means include a point with itself, as in the authors' program. All kernel values are near 1, so they are summed as
k - 1 in float64, where the ones cancel exactly. The published scale belongs to ViT-L-14-336 of openai.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets, check_features
from ldmlab.metrics.precision_recall import squared_distances

_DRAWS = 5  # shuffles of the pairs, each cut into disjoint groups of candidates
_SEED = 0  # of the shuffles, the same in every run
_TILE = 1024  # rows and columns of one block of distances
_FACTOR = 1000.0  # of the published values of CMMD


class ClipScore(Metric):
    """CLIP score of the generated images with the standard error of the mean; sums only."""

    full_state_update = False
    higher_is_better = True
    title = "CLIP score"
    meaning = "100 x cosine of generated images and their captions; spread: of the mean"
    score_sum: Tensor
    square_sum: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)
        for name in ("score_sum", "square_sum"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, clip: Tensor, real: bool = False, text: Tensor | None = None) -> None:
        """Embeddings (B, D) of images and of their captions; real images are ignored."""
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


class ClipDistance(FeatureSets):
    """CMMD of generated to real images; the memory beyond the features is one tile."""

    higher_is_better = False
    title = "CMMD"
    meaning = "kernel distance of CLIP embeddings, times 1000"

    def __init__(self, sigma: float = 10.0) -> None:
        super().__init__()
        if sigma <= 0:
            raise InputError(f"metric.cmmd.sigma={sigma} is no width of a kernel; choose a number above 0.")
        self.sigma = sigma

    def update(self, clip: Tensor, real: bool, index: Tensor | None = None) -> None:
        """CLIP embeddings (B, D) of any length."""
        super().update(clip, real, index)

    def compute(self) -> dict[str, Tensor]:
        """`cmmd`, float64, 0 for equal sets."""
        real, fake = (F.normalize(part, dim=1).to(self.device) for part in self.sets())
        centre = real.mean(dim=0)
        real, fake = real - centre, fake - centre
        gamma = 1 / (2 * self.sigma**2)
        xx, yy, xy = (_mean_kernel_below_1(a, b, gamma) for a, b in ((real, real), (fake, fake), (real, fake)))
        return {"cmmd": _FACTOR * (xx + yy - 2 * xy)}


def _mean_kernel_below_1(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """Mean of k(a_i, b_j) - 1 over all pairs, float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in a.split(_TILE):
        for columns in b.split(_TILE):
            total += torch.expm1(squared_distances(rows, columns).mul_(-gamma)).sum(dtype=torch.float64)
    return total / (len(a) * len(b))


# ---- captions found by images and images by captions, among a number of pairs


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str], candidates: int = 50) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, among `candidates` pairs and among all, with the values of chance.

    images, texts: (N, D) of unit length, row i of both belonging to captions[i]. An image with the same caption
    counts as found too. Also the mean similarity of matched and of mismatched pairs.
    """
    names = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    kinds = torch.tensor([names[caption] for caption in captions])
    similarity = images.double().cpu() @ texts.double().cpu().T  # (N, N) image by caption
    same = kinds[:, None] == kinds[None, :]
    result = {"similarity_matched": similarity[same].mean().item()}
    if not same.all():
        result["similarity_mismatched"] = similarity[~same].mean().item()
    groups = list(_groups(len(captions), candidates))
    for label, chosen in ((str(candidates), groups), ("all", [torch.arange(len(captions))])):
        for k in (1, 5):
            scores = [_recall(similarity[g][:, g], same[g][:, g], k) for g in chosen]
            to_text, to_image, chance = (sum(column) / len(scores) for column in zip(*scores, strict=True))
            result[f"recall_{k}_of_{label}"] = (to_text + to_image) / 2
            result[f"image_to_text_recall_{k}_of_{label}"] = to_text
            result[f"text_to_image_recall_{k}_of_{label}"] = to_image
            result[f"chance_recall_{k}_of_{label}"] = chance
    return result


def _groups(count: int, candidates: int) -> Iterator[Tensor]:
    """Fixed disjoint groups of indices, repeated for several shuffles; one group of all when there are too few."""
    if count <= candidates:
        yield torch.arange(count)
        return
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(_DRAWS):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % candidates].split(candidates)


def _recall(similarity: Tensor, same: Tensor, k: int) -> tuple[float, float, float]:
    """Image to caption, caption to image, and chance."""
    n = len(same)
    k = min(k, n)
    to_text = same.gather(1, similarity.topk(k, dim=1).indices).any(1).double().mean().item()
    to_image = same.T.gather(1, similarity.T.topk(k, dim=1).indices).any(1).double().mean().item()
    chance = [1 - math.comb(n - c, k) / math.comb(n, k) for c in same.sum(1).tolist()]
    return to_text, to_image, sum(chance) / n
