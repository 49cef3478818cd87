"""Retrieval of captions by images and of images by captions, among a number of pairs."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_DRAWS = 5  # shuffles of the pairs, each cut into disjoint groups of candidates
_SEED = 0  # of the shuffles, the same in every run


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
