"""Denoising trajectory: the noisy latents of a sampling run as decoded images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmlab.inference.grids import save_animation, table
from ldmlab.inference.inputs import Inputs
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.nn.pixels import as_images

FRAMES = 48  # of an animation, at most
COLUMNS = 10  # of a row


class Trajectory:
    """An `after_step` that keeps decoded images of one batch at a time."""

    def __init__(self, model: LoadedModel, settings: SampleSettings) -> None:
        """settings: resolved ones."""
        self.model, self.settings = model, settings
        last = len(model.grid(settings)) - 2
        kept = min(FRAMES, last + 1)
        self.kept = sorted({*(round(k * last / max(kept - 1, 1)) for k in range(kept)), last})
        self._frames: list[Tensor] = []

    def __call__(self, step: int, x: Tensor, clean: Tensor) -> Tensor:
        """Keep the noisy latent's image; x is returned unchanged."""
        if step in self.kept:
            self._frames.append(as_images(self.model.diffusion.decode(x)))
        return x

    @torch.inference_mode()
    def take(self, inputs: Sequence[Inputs], numbers: list[int]) -> list[list[np.ndarray]]:
        """Frames per image of the last batch, from its start on; they are removed here."""
        assert isinstance(self.settings.size, tuple)
        height, width = self.settings.size
        start = as_images(self.model.diffusion.decode(self.model.begin(inputs, self.settings, numbers)))
        frames, self._frames = [frame[:, :height, :width].numpy() for frame in (start, *self._frames)], []
        return [[frame[i] for frame in frames] for i in range(len(numbers))]

    def save(self, folder: Path, inputs: Sequence[Inputs], numbers: list[int], labels: Sequence[str]) -> None:
        """NUMBER_trajectory.png, a row, and .webp, an animation, of each image of the batch just finished."""
        for number, text, frames in zip(numbers, labels, self.take(inputs, numbers), strict=True):
            self.page([frames], [text]).save(folder / f"{number:06d}_trajectory.png")
            save_animation(folder / f"{number:06d}_trajectory.webp", frames)

    def page(self, rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str]) -> Image.Image:
        """A row of some frames for each image, under their titles."""
        titles, columns = self.titles(), self.columns()
        return table([[row[c] for c in columns] for row in rows], [titles[c] for c in columns], labels)

    def titles(self) -> list[str]:
        """Titles of the frames: the number of steps taken."""
        return ["noise" if self.settings.strength is None else "start", *(f"step {step + 1}" for step in self.kept)]

    def columns(self) -> list[int]:
        """Which frames make the row: evenly spaced, both ends."""
        shown = min(COLUMNS, len(self.kept) + 1)
        return [round(k * len(self.kept) / (shown - 1)) for k in range(shown)]
