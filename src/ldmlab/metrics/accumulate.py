"""Features of real and generated images, accumulated over batches and processes.

Shapes: B batch, N images in all, D feature width, K logits.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ldmlab.errors import InputError


def check_features(features: Tensor, what: str) -> Tensor:
    """Features (B, D) as float32 on their device; an InputError when they have another shape or are not finite."""
    if features.ndim != 2:
        raise InputError(f"{what} has the shape {tuple(features.shape)} where (images, width) is needed.")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(dim=1).sum())
        raise InputError(
            f"{what}: {bad} of {len(features)} rows are not finite, so no score can be computed; inspect the images "
            "and the weights they came from."
        )
    return features.detach().float()


class FeatureSets(Metric):
    """Base of the metrics that need every feature: both sets in the order of the images' index.

    Metrics of this kind in one `MetricCollection` share one copy of the features.
    """

    full_state_update = False
    real_features: list[Tensor]
    fake_features: list[Tensor]
    real_index: list[Tensor]
    fake_index: list[Tensor]

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)
        for name in ("real_features", "fake_features", "real_index", "fake_index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool, index: Tensor | None = None) -> None:
        """Features (B, D); `index` (B,) orders them whatever process they came from (default: as they come)."""
        store, indices = (self.real_features, self.real_index) if real else (self.fake_features, self.fake_index)
        store.append(check_features(features, "real features" if real else "generated features").cpu())
        indices.append(next_index(indices, len(features)) if index is None else index.cpu())

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few `name` images, real or generated; any number will do here."""

    def sets(self) -> tuple[Tensor, Tensor]:
        """Real (N, D) and generated (N, D) features, as many of each as the metric needs."""
        real = in_order(self.real_features, self.real_index, "real")
        fake = in_order(self.fake_features, self.fake_index, "generated")
        if real.shape[1] != fake.shape[1]:
            raise InputError(
                f"real features are {real.shape[1]} wide and generated ones {fake.shape[1]}: "
                "use one feature extractor for both."
            )
        self.check_count(len(real), "real")
        self.check_count(len(fake), "generated")
        return real, fake

    def centred_sets(self) -> tuple[Tensor, Tensor]:
        """The same on the metric's device, around the mean of the real ones: differences of small squares are exact
        enough in float32."""
        real, fake = self.sets()
        centre = real.mean(dim=0)
        return real.sub_(centre).to(self.device), fake.sub_(centre).to(self.device)  # both are our own copies


def next_index(indices: list[Tensor], count: int) -> Tensor:
    """The `count` positions after the last one."""
    last = next((seen for seen in reversed(indices) if len(seen)), None)
    start = 0 if last is None else int(last[-1]) + 1
    return torch.arange(start, start + count)


def in_order(values: list[Tensor] | Tensor, index: list[Tensor] | Tensor, what: str) -> Tensor:
    """A fresh copy of the rows (N, ...), by index; equal rows of one index (a loader's padding) count once."""
    if len(values) == 0:
        raise InputError(f"no {what} images were given, so there is nothing to score.")
    rows, order = torch.cat([*values]) if isinstance(values, list) else values, dim_zero_cat(index)
    sorted_order, permutation = torch.sort(order, stable=True)
    if rows is values or not torch.equal(sorted_order, order):
        rows = rows[permutation]
    repeated = torch.nonzero(sorted_order[1:] == sorted_order[:-1])[:, 0] + 1
    twins = repeated[(rows[repeated] == rows[repeated - 1]).flatten(1).all(dim=1)]
    if len(twins) == 0:
        return rows
    keep = torch.ones(len(rows), dtype=torch.bool)
    keep[twins] = False
    return rows[keep]
