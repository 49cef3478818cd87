"""Controls: noise, shuffled and real images scored like the samples, by which a score's range can be read.

Features of a weak network, or k-NN balls around few images, score noise well too. Random numbers belong to an image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.data.shards import has_manifest
from ldmlab.errors import InputError
from ldmlab.evaluation.real_images import RealImages, count_of
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, Score, inputs_of

_TILES = 4  # a side: shuffled images keep colours and edges, and lose what they show
_BATCH = 64
_REACHES = 0.25  # share of the real images' score above which a control casts doubt on a score in 0 .. 1
Shown = Callable[[], Iterable[Numbered]]  # real images, this process's share


def control_count(seen: EvaluationPass, samples: int, at_most: int) -> int:
    """As many images as samples; of more than `at_most` so many, or what the scores need."""
    count = min(samples, max(at_most, seen.extractor.width + 1))
    try:
        seen.check_counts(count, count)
    except InputError:
        return samples
    return count


def controls(
    seen: EvaluationPass, count: int, size: tuple[int, int], shown: Shown | None, real: str | None = None
) -> dict[str, Any]:
    """Scores of `count` images of each control for metrics.json; to be called before the first sample.

    shown: the images to shuffle; real: what they are, where they are not the reference and are a control themselves.
    """
    kinds: dict[str, tuple[str, Shown]] = {"noise": ("uniform noise", lambda: _noise(count, size))}
    if shown is not None:
        mixed = lambda: ((index, shuffled(images, index)) for index, images in shown())  # noqa: E731
        kinds["shuffled"] = ("shuffled tiles", mixed)
    if shown is not None and real is not None:
        kinds["real"] = (real, shown)
    found = {}
    for kind, (title, images) in kinds.items():
        fresh = seen.for_other_samples()
        fresh.add_all(images(), real=False)
        scores = fresh.compute()
        if kind == "real":  # these images were not made for the samples' captions
            captioned = {name for name, metric in fresh.metrics.items() if "text" in inputs_of(metric)}
            scores = {name: score for name, score in scores.items() if name not in captioned}
        values = {name: {"value": score.value, "spread": score.spread} for name, score in scores.items()}
        found[kind] = {"title": title, "images": fresh.total_counts()[1], "scores": values}
    return found


def controls_of(real: RealImages, split: str, seen: EvaluationPass, samples: int, at_most: int) -> dict[str, Any]:
    """Those of an evaluation against `split`, with the images of the other split where it has as many."""
    other, size = ("train" if split == "val" else "val"), (real.data.image_size, real.data.image_size)
    count = control_count(seen, samples, at_most)
    if has_manifest(real.data.folder(other, "images")) and count_of(real.data, other) >= count:
        title = "training images" if other == "train" else "validation images"
        return controls(seen, count, size, lambda: real.spread(other, count), title)
    return controls(seen, count, size, lambda: real.spread(split, count))


def _noise(count: int, size: tuple[int, int]) -> Iterator[Numbered]:
    mine = torch.arange(distributed.rank(), count, distributed.world_size())
    for index in mine.split(_BATCH) if len(mine) else ():
        each = [torch.randint(0, 256, (3, *size), generator=_of_image(n), dtype=torch.uint8) for n in index]
        yield index, torch.stack(each)


def shuffled(images: Tensor, index: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) => the tiles of each image in another order; what no tile covers is cut off."""
    b, c, h, w = images.shape
    h, w = h // _TILES, w // _TILES
    tiles = images[:, :, : _TILES * h, : _TILES * w].reshape(b, c, _TILES, h, _TILES, w)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, 16, C, h, w)
    mixed = [one[torch.randperm(_TILES**2, generator=_of_image(n))] for one, n in zip(tiles, index, strict=True)]
    rows = torch.stack(mixed).unflatten(1, (_TILES, _TILES)).permute(0, 3, 1, 4, 2, 5)  # (B, C, 4, h, 4, w)
    return rows.reshape(b, c, _TILES * h, _TILES * w)


def _of_image(number: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(number))


def doubted(scores: Mapping[str, Score], found: Mapping[str, Any]) -> dict[str, Score]:
    """The scores, each marked where a control does about as well."""
    return {name: replace(s, marks=(*s.marks, *_doubts(name, s, found))) for name, s in scores.items()}


def _doubts(name: str, score: Score, found: Mapping[str, Any]) -> list[str]:
    values = {kind: one["scores"][name]["value"] for kind, one in found.items() if name in one["scores"]}
    if score.higher_is_better is None:
        return []
    sign, spread = (1 if score.higher_is_better else -1), score.spread or 0.0
    best = sign * max(sign * score.value, sign * values.get("real", score.value))
    doubts = []
    for kind in values.keys() - {"real"}:
        title, value = found[kind]["title"], values[kind]
        if sign * (best - value) <= spread:
            doubts.append(f"{title} score {value:.3g}, as well as real images: this number says nothing")
        elif sign * (score.value - value) <= spread:
            doubts.append(f"no better than {title} ({value:.3g})")
        elif score.higher_is_better and value >= _REACHES * best > 0:
            doubts.append(f"{title} reach {value:.3g}: weak features or few images")
    return sorted(doubts)
