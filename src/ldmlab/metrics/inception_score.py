"""Inception Score (Salimans et al., NeurIPS 2016), exp of the mean KL(p(y|x) || p(y)) over contiguous splits.

As torch-fidelity computes it: logits without bias, softmax in float64, one permutation with a fixed seed, then `splits`
contiguous parts; mean and population standard deviation over them. `seed=None` keeps the order, as ADM's script does.
`splits=None`: 10, or half as many as there are images.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import check_features, in_order, next_index


class InceptionScore(Metric):
    """Inception Score of the generated images; the same whatever the batches and processes."""

    full_state_update = False
    higher_is_better = True
    title = "Inception Score"
    meaning = "confidence and variety of the network's labels"
    logits: list[Tensor]
    logits_index: list[Tensor]

    def __init__(self, splits: int | None = None, seed: int | None = 2020) -> None:
        super().__init__(compute_with_cache=False)
        self.splits, self.seed = splits, seed
        self.resolved: dict[str, int] = {}  # options as they were used, after `compute`
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("logits_index", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, real: bool = False, index: Tensor | None = None) -> None:
        """Logits (B, K); those of real images are ignored."""
        if real:
            return
        self.logits.append(check_features(logits, "logits").cpu())
        self.logits_index.append(next_index(self.logits_index, len(logits)) if index is None else index.cpu())

    def compute(self) -> dict[str, Tensor]:
        """`is` and `is_std`."""
        logits = in_order(self.logits, self.logits_index, "generated").double()
        count = len(logits)
        self.check_count(count, "generated")
        if self.seed is not None:
            order = np.random.RandomState(self.seed).permutation(count)  # torch-fidelity's generator
            logits = logits[torch.from_numpy(order)]
        splits = min(10, max(count // 2, 1)) if self.splits is None else self.splits
        self.resolved = {"splits": splits}
        bounds = [part * count // splits for part in range(splits + 1)]
        scores = torch.stack([_score(logits[start:end]) for start, end in pairwise(bounds)])
        return {"is": scores.mean(), "is_std": scores.std(correction=0)}

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few generated images; real ones enter nothing."""
        if name == "generated" and count < (self.splits or 1):
            raise InputError(
                f"{count} {name} images cannot be cut into metric.is.splits={self.splits} parts; choose fewer."
            )


def _score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=1)  # (n, K)
    log_q = torch.logsumexp(log_p, dim=0) - np.log(len(log_p))  # (K,) log of the mean probability
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean().exp()
