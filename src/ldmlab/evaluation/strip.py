"""The way from noise to picture, decoded while it is walked."""

import numpy as np
import torch
from torch import Tensor

from ldmlab.evaluation.model import LoadedModel, as_pictures
from ldmlab.evaluation.settings import SampleSettings

FRAMES = 48  # of an animation, at most
COLUMNS = 10  # of a row


class Strip:
    """An `after_step` that keeps decoded pictures of one batch at a time."""

    def __init__(self, model: LoadedModel, settings: SampleSettings) -> None:
        self.model = model
        self.settings = model.resolved(settings)
        assert self.settings.steps is not None
        steps = self.settings.steps
        self.kept = sorted({round(k * (steps - 1) / max(min(FRAMES, steps) - 1, 1)) for k in range(min(FRAMES, steps))})
        self.kept = sorted({*self.kept, steps - 1})
        self._frames: list[Tensor] = []

    def __call__(self, step: int, x: Tensor, clean: Tensor) -> Tensor:
        """Keep the noisy latent's picture; x goes on unchanged."""
        if step in self.kept:
            self._frames.append(as_pictures(self.model.diffusion.decode(x)))
        return x

    @torch.inference_mode()
    def take(self, numbers: list[int]) -> list[list[np.ndarray]]:
        """Frames per picture of the batch just finished, the starting noise first; forgets them."""
        assert isinstance(self.settings.size, tuple)
        index = torch.tensor(numbers, dtype=torch.int64, device=self.model.device)
        start = self.model.diffusion.start(index, self.settings.size, self.settings.seed)
        frames = [as_pictures(self.model.diffusion.decode(start)), *self._frames]
        self._frames = []
        return [[frame[i].numpy() for frame in frames] for i in range(len(numbers))]

    def titles(self) -> list[str]:
        """Of the frames: how many steps have been taken."""
        return ["noise", *(f"step {step + 1}" for step in self.kept)]

    def columns(self) -> list[int]:
        """Which frames make the row: evenly spaced, both ends."""
        count = len(self.kept) + 1
        wanted = min(COLUMNS, count)
        return [round(k * (count - 1) / (wanted - 1)) for k in range(wanted)]
