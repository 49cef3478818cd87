"""Sampling that starts from a picture, or keeps a part of one: for models that were trained for neither.

Image to image (Meng et al. 2022, "SDEdit"): the walk begins at a middle level with alpha clean + sigma noise.
Known parts (Lugmayr et al. 2022, "RePaint", eq. 8, without its resampling): after every step what is known is put back
at the level reached, alpha' known + sigma' noise, always with the noise that the walk began with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.contracts import AfterStep, Level


@dataclass(frozen=True)
class GivenPicture:
    """Final latents (B, C, h, w) that sampling starts from or keeps; at least one of `source` and `known`."""

    source: Tensor | None = None  # where the walk begins; None: in noise
    known: Tensor | None = None  # kept outside the hole
    hole: Tensor | None = None  # (B, 1, h, w) bool; with `known`: what is made anew

    def begin(self, noise: Tensor, level: Level) -> Tensor:
        """x at the first level of the grid."""
        x = noise if self.source is None else _noised(self.source, noise, level)
        return self._kept(x, noise, level)

    def keeping(self, noise: Tensor, grid: list[Level], after_step: AfterStep | None) -> AfterStep | None:
        """`after_step`, after what is known has been put back."""
        if self.known is None:
            return after_step

        def keep(step: int, x: Tensor, clean: Tensor) -> Tensor:
            x = self._kept(x, noise, grid[step + 1])
            return x if after_step is None else after_step(step, x, clean)

        return keep

    def _kept(self, x: Tensor, noise: Tensor, level: Level) -> Tensor:
        if self.known is None or self.hole is None:
            return x
        return torch.where(self.hole, x, _noised(self.known, noise, level))


def _noised(clean: Tensor, noise: Tensor, level: Level) -> Tensor:
    """alpha clean + sigma noise; the end of a grid counts as clean, as the decoder takes it."""
    return clean if level.time is None else level.alpha * clean + level.sigma * noise


def hole_of_latents(mask: Tensor, downsampling: int) -> Tensor:
    """Mask (B, 1, H, W), not zero in the hole => (B, 1, h, w) bool: latents of which any pixel is in the hole."""
    return F.max_pool2d((mask != 0).float(), downsampling) > 0


def painted_over(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) with their holes filled smoothly from around, coarse to fine ("push-pull").

    What is to go would otherwise leave its traces in the latents beside it, since an encoder looks far.
    """
    known = (mask == 0).float()
    levels = [(pixels * known, known)]  # sums of what is known, and how much that is
    while min(levels[-1][0].shape[2:]) > 1 and not levels[-1][1].all():
        levels.append(tuple(F.avg_pool2d(part, 2, ceil_mode=True) for part in levels[-1]))  # type: ignore[arg-type]
    colours = torch.zeros_like(levels[-1][0])
    for total, share in reversed(levels):
        beneath = F.interpolate(colours, size=total.shape[2:], mode="bilinear")
        colours = torch.where(share > 0, total / share.clamp(min=torch.finfo(share.dtype).tiny), beneath)
    return torch.where(mask == 0, pixels, colours)
