"""Sampling that starts from an image or keeps a part of one, for models without such training.

Image to image (Meng et al. 2022, "SDEdit"): sampling begins at a middle level with alpha clean + sigma noise.
Known parts (Lugmayr et al. 2022, "RePaint"): after every step known parts are put back at the level reached (eq. 8),
alpha' known + sigma' noise, always with the noise that sampling began with; and each step is made several times, from
its end noised back to its start (algorithm 1), so that what is generated fits what is known.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.contracts import AfterStep, Denoise, Level, Noise, Sampler
from ldmlab.diffusion.parameterization import begun


@dataclass(frozen=True)
class GivenImage:
    """Final latents (B, C, h, w) that sampling starts from or keeps; at least one of `source` and `known`."""

    source: Tensor | None = None  # where sampling begins; None: in noise
    known: Tensor | None = None  # kept outside the hole
    hole: Tensor | None = None  # (B, 1, h, w) bool; with `known`: what is generated
    repeats: int = 1  # with `known`: how often each step is made

    def begin(self, noise: Tensor, level: Level) -> Tensor:
        """x at the first level of the grid."""
        x = begun(noise, level) if self.source is None else _noised(self.source, noise, level)
        return self.kept(x, noise, level)

    def around(self, sampler: Sampler, fresh: Noise) -> Sampler:
        """A sampler that starts from or keeps these latents; `fresh`: noise by number, for going back."""

        def sample(
            denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
        ) -> Tensor:
            start, x = x, self.begin(x, grid[0])
            if self.known is None or self.repeats == 1:
                return sampler(denoise, x, grid, noise=noise, after_step=self._keeping(start, grid, after_step))
            for step, (here, there) in enumerate(pairwise(grid)):
                turns = 1 if there.time is None else self.repeats  # the end is clean: nothing to go back from
                for turn in range(turns):
                    number = step * self.repeats + turn
                    keep = self._keeping(start, [here, there], after_step if turn + 1 == turns else None, first=step)
                    x = sampler(denoise, x, [here, there], noise=lambda _, n=number: noise(n), after_step=keep)  # type: ignore
                    if turn + 1 < turns:
                        x = _noised_again(x, there, here, fresh(number))
            return x

        return sample

    def kept(self, x: Tensor, noise: Tensor, level: Level) -> Tensor:
        """x at a level, with what is known put back."""
        if self.known is None or self.hole is None:
            return x
        return torch.where(self.hole, x, _noised(self.known, noise, level))

    def _keeping(self, start: Tensor, grid: list[Level], after_step: AfterStep | None, first: int = 0) -> AfterStep:
        """`after_step`, counted from `first`, after what is known has been put back."""

        def keep(step: int, x: Tensor, clean: Tensor) -> Tensor:
            x = self.kept(x, start, grid[step + 1])
            return x if after_step is None else after_step(first + step, x, clean)

        return keep


def _noised_again(x: Tensor, here: Level, back: Level, fresh: Tensor) -> Tensor:
    """x at `here` => at the noisier level `back`: alpha' / alpha x and the variance that is missing."""
    ratio = back.alpha / here.alpha
    return ratio * x + math.sqrt(max(back.sigma**2 - ratio**2 * here.sigma**2, 0.0)) * fresh


def _noised(clean: Tensor, noise: Tensor, level: Level) -> Tensor:
    """alpha clean + sigma noise; the end of a grid counts as clean, as the decoder takes it."""
    return clean if level.time is None else level.alpha * clean + level.sigma * noise


def hole_of_latents(mask: Tensor, downsampling: int) -> Tensor:
    """Mask (B, 1, H, W), not zero in the hole => (B, 1, h, w) bool: latents of which any pixel is in the hole."""
    return F.max_pool2d((mask != 0).float(), downsampling) > 0


def painted_over(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) with their holes filled smoothly from around, coarse to fine ("push-pull").

    What is to go would otherwise leave traces in neighbouring latents, since an encoder's receptive field is large.
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
