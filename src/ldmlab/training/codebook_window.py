"""How much of a codebook training uses."""

import logging
from typing import Any

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.metrics.reconstruction import codebook_use

_log = logging.getLogger(__name__)


class CodebookWindow:
    """Counts codes over all processes; the metrics are those of the last full window and are stored in checkpoints."""

    def __init__(self, codebook_size: int, images: int, alert: float, remedy: str = "") -> None:
        self.images, self.alert = images, alert  # length of a window; share below which it warns
        self.remedy = remedy or "fewer codes or a lower learning rate keep more of it alive"
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.counted = 0  # images of the window that is open
        self.numbers: dict[str, float] = {}  # codebook_use, codebook_perplexity, codebook_entropy
        self._step = torch.zeros_like(self.counts)  # this process's codes since the last step ended

    def add(self, codes: Tensor) -> None:
        """The codes of a micro-batch, (B, h, w)."""
        codes = codes.flatten()
        self.counts, self._step = self.counts.to(codes.device), self._step.to(codes.device)  # once
        self._step.scatter_add_(0, codes, torch.ones_like(codes))

    def end_step(self, step: int, images: int) -> None:
        """A step on so many images of all processes has ended; a full window is read and a new one begins."""
        self.counts += distributed.sum_(self._step)
        self._step = torch.zeros_like(self._step)
        self.counted += images
        if self.counted < self.images:
            return
        self.numbers = codebook_use(self.counts.cpu())
        if self.numbers["codebook_use"] < self.alert and distributed.rank() == 0:
            _log.warning(
                "step %d: only %.1f %% of the codebook was used over the last %d images; %s",
                step,
                100 * self.numbers["codebook_use"],
                self.counted,
                self.remedy,
            )
        self.counts.zero_()
        self.counted = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint, between two steps."""
        return {"counts": self.counts.clone().cpu(), "counted": self.counted, "numbers": dict(self.numbers)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.counts.copy_(state["counts"])
        self.counted, self.numbers = state["counted"], dict(state["numbers"])
