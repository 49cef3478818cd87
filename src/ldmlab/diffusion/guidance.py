"""Guidance by the difference of two outputs: classifier-free guidance and autoguidance, where and how much.

    guided = weak + scale (output - weak)
The weak output is that without the conditions (Ho & Salimans 2022, eq. 6, with scale = 1 + w) or for a negative prompt;
or that of a weaker model with the same conditions (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of
Itself", eq. 3).
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmlab.contracts import Conditioning, Level, Path
from ldmlab.errors import InputError

_ROUNDING = 1e-6  # relative; a level that is a bound but for rounding is inside


@dataclass(frozen=True)
class Guidance:
    """The scale of guidance, the levels and channels where it acts, and how its deviation is put right."""

    scale: float = 1.0  # 1: off
    interval: tuple[float, float] | None = None  # guided between these levels, both included; None: everywhere
    unit: str = "position"  # of the interval: 0 (clean) .. 1 (noise) of the path | sigma, which is sigma / alpha
    rescale: float = 0.0  # fraction of the correction of the deviation (Lin et al. 2024, "phi")
    channels: int | None = None  # guided ones, the first of the latent; None: all
    weak: Any = None  # LatentDiffusion of autoguidance; None: the model itself without its conditions

    def __post_init__(self) -> None:
        if self.interval is not None:
            self._check_interval(*self.interval)
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale={self.rescale} is outside 0 .. 1; choose 0 (off) or for instance 0.7.")
        if self.channels is not None and self.channels < 1:
            raise InputError(f"guided_channels={self.channels} guides nothing; choose 1 or more, or leave it out.")

    def _check_interval(self, low: float, high: float) -> None:
        most = {"position": 1.0, "sigma": math.inf}.get(self.unit, -1.0)
        if not 0 <= low <= high <= most:
            raise InputError(
                f"guidance_interval={low:g}..{high:g} is no interval of {self.unit}; give two positions that rise from "
                "0 (clean) to 1 (noise), such as 0.1..0.8, or with guidance_interval_unit=sigma 0.28..2.9."
            )

    def acts(self, level: Level, path: Path) -> bool:
        """Whether a level is guided; a second evaluation of a step is guided where the step's first one is.

        Levels beyond an end of the path count as that end.
        """
        if self.interval is None:
            return True
        time = level.time if level.start is None else level.start
        assert time is not None  # None at the clean end only, which no network sees
        if self.unit == "position":
            here = float(path.position(torch.tensor([time], dtype=torch.float64)).clamp(0, 1))
        else:
            here = _ratio(level if level.start is None else path.level(time))
        low, high = self.interval
        return low - _ROUNDING * abs(low) <= here <= high + _ROUNDING * abs(high)

    @property
    def corrects(self) -> bool:
        """Whether `corrected` changes anything."""
        return self.rescale > 0 or self.channels is not None

    def corrected(self, guided: Tensor, output: Tensor) -> Tensor:
        """A guided output (B, C, h, w), rescaled; channels that are not guided are those of the model's own output.

        With phi = rescale, std over the guided values of an image (Lin et al. 2024, eq. 15 and 16):
            guided (phi std(output) / std(guided) + 1 - phi)
        """
        count = output.shape[1] if self.channels is None else self.channels
        guided, strong = guided[:, :count], output[:, :count]
        if self.rescale:
            over = tuple(range(1, guided.ndim))
            ratio = strong.std(dim=over, keepdim=True) / guided.std(dim=over, keepdim=True)
            guided = guided * (self.rescale * ratio + 1 - self.rescale)
        return torch.cat([guided, output[:, count:]], dim=1)


def _ratio(level: Level) -> float:
    return level.sigma / level.alpha if level.alpha else math.inf


def stacked(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings as one batch of twice the size."""
    pairs = {slot: (value, getattr(second, slot)) for slot, value in vars(first).items()}
    return Conditioning(**{slot: None if pair[0] is None else torch.cat(pair) for slot, pair in pairs.items()})


def check_guidance(scale: float, trained: bool | None, conditioned: bool, weak: bool = False) -> None:
    """InputError for a scale that is no number or that the model was not trained for; a warning if that is unknown."""
    if not math.isfinite(scale):
        raise InputError(f"guidance_scale={scale} is no number; choose 1 (off) or for instance 3.")
    if scale == 1 or weak:
        return
    if not conditioned:
        raise InputError(
            f"guidance_scale={scale} needs conditions and this model has none; use guidance_scale=1, or a weak_model."
        )
    if trained is False:
        raise InputError(
            f"guidance_scale={scale} needs a model trained with dropped conditions, unlike this one; use "
            "guidance_scale=1, a weak_model, or train with conditioner drop rates above 0."
        )
    if trained is None:
        warnings.warn(
            "nothing is known about dropped conditions in this model's training; guidance may not help.",
            stacklevel=3,
        )
