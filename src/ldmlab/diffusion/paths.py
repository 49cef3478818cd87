"""Continuous noise levels: rectified flow, GVP and VP paths as in SiT, and EDM's path without scaling.

x = alpha clean + sigma noise at a position s: 0 is the clean end, 1 the noise end, and a sampler goes from 1 to 0. The
network receives a time that is linear in s (EDM: log(sigma) / 4), so its convention is two numbers of the path: 0 and
1000 as in SD3, 1 and 0 as in SiT, 0 and 1 as in REPA. Derivatives are by s, so they point from data to noise.
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from ldmlab.contracts import Level, Solver
from ldmlab.diffusion.respacing import checked_spacing, even_ratios
from ldmlab.errors import InputError

Pair = tuple[Tensor, Tensor]  # of alpha and of sigma
SPACINGS = ("linspace", "trailing", "karras", "log_snr", "polyexponential")
_EDGE = 1e-3  # positions this far from an infinite log-SNR end the spacings in log-SNR


class ContinuousPath(ABC):
    """A path by its curve; everything else (times, grids, quantiles, shifts) is the same for all."""

    solver = Solver("euler", "linspace", 50)

    def __init__(
        self,
        clean_time: float = 0.0,  # what the network receives at the clean end
        noise_time: float = 1000.0,  # and at the noise end
        shift: float = 1.0,  # s => shift s / (1 + (shift - 1) s); above 1: more time at high noise (SD3, eq. 23)
        shift_base: int | None = None,  # shift = sqrt(values of a latent / shift_base): by resolution or dimension
        margins: tuple[float, float] = (0.0, 0.0),  # of s that are left out at the clean and at the noise end
    ) -> None:
        if clean_time == noise_time:
            raise InputError(f"diffusion.schedule.clean_time={clean_time} equals noise_time; give two times.")
        if not shift > 0 or (shift_base is not None and shift_base < 1):
            raise InputError(f"diffusion.schedule.shift={shift} and shift_base={shift_base} must be above 0.")
        if shift != 1 and shift_base is not None:
            raise InputError(f"diffusion.schedule.shift={shift} is overridden by shift_base={shift_base}; give one.")
        self.clean_time, self.noise_time, self.shift, self.shift_base = clean_time, noise_time, shift, shift_base
        self.first, self.last = margins[0], 1 - margins[1]  # the range of s
        if self.first > 0:  # even times end with a step many times as long in log-SNR as the one before
            self.solver = self.solver._replace(multistep="log_snr")
        if not 0 <= self.first < self.last <= 1:
            raise InputError(f"diffusion.schedule.margins={margins} leave no path; give for instance [0.001, 0.001].")

    @abstractmethod
    def curve(self, s: Tensor) -> Pair:
        """alpha and sigma of positions, float64."""

    @abstractmethod
    def slopes(self, s: Tensor) -> Pair:
        """d alpha / d s and d sigma / d s."""

    @abstractmethod
    def position_of(self, ratio: Tensor) -> Tensor:
        """s of sigma / alpha, float64."""

    # ---- times

    def time(self, s: Tensor) -> Tensor:
        """What the network receives at positions s."""
        return self.clean_time + s * (self.noise_time - self.clean_time)

    def position(self, times: Tensor) -> Tensor:
        """The positions of times: 0 the clean end, 1 the noise end."""
        return (times.double() - self.clean_time) / (self.noise_time - self.clean_time)

    def quantile(self, u: Tensor) -> Tensor:
        """Uniform numbers (B,) in (0, 1) => times (B,), float32, after the shift; a larger number is noisier."""
        return self.time(self.first + self.shifted_position(u) * (self.last - self.first)).float()

    def time_of(self, ratio: Tensor) -> Tensor:
        """The times (B,), float32, at which sigma / alpha has these values."""
        return self.time(self.position_of(ratio.double()).clamp(self.first, self.last)).float()

    def shifted_position(self, u: Tensor) -> Tensor:
        """shift u / (1 + (shift - 1) u)."""
        return u if self.shift == 1 else self.shift * u / (1 + (self.shift - 1) * u)

    def at_size(self, values: int) -> Self:
        """The path for latents of that many values (C h w); another one only with `shift_base`."""
        return self if self.shift_base is None else self.with_shift(math.sqrt(values / self.shift_base))

    def with_shift(self, shift: float) -> Self:
        """The same path with its times shifted otherwise."""
        other = copy.copy(self)
        other.shift, other.shift_base = shift, None
        return other

    # ---- levels

    def levels(self, times: Tensor) -> Pair:
        """alpha and sigma of times (B,), float32, each (B, 1, 1, 1)."""
        return _columns(self.curve(self.position(times)))

    def rates(self, times: Tensor) -> Pair:
        """d alpha / d s and d sigma / d s of times (B,), float32 unless the times are float64, each (B, 1, 1, 1)."""
        dtype = torch.float64 if times.dtype == torch.float64 else torch.float32
        return _columns(self.slopes(self.position(times)), dtype)

    def level(self, time: float) -> Level:
        """The level of one time."""
        alpha, sigma = self.curve(self.position(torch.tensor(time, dtype=torch.float64)))
        return Level(float(alpha), float(sigma), float(time))

    def level_at(self, ratio: float) -> Level:
        """The level of a sigma / alpha."""
        return self.level(float(self.time(self.position_of(torch.tensor(ratio, dtype=torch.float64)))))

    def grid(self, steps: int, spacing: str = "auto") -> list[Level]:
        """`steps` levels from the noise end down, and the clean end.

        linspace, trailing: even in s, shifted as in training; karras, log_snr, polyexponential: as `even_ratios`, which
        begin and end 0.001 from an end where that is infinite; auto: the path's own.
        """
        spacing = self.solver.spacing if spacing == "auto" else spacing
        if steps < 1:
            raise InputError(f"steps={steps} is no number of steps; choose 1 or more.")
        if spacing in ("official", "quad"):
            raise InputError(f"spacing={spacing} is a rule for the paper's discrete schedules; use linspace.")
        name, _ = checked_spacing(spacing, SPACINGS)
        at_clean, _ = self._ratios()
        if name in ("linspace", "trailing"):
            ends = steps if at_clean == 0 else max(steps - 1, 1)  # the clean end is a level of its own otherwise
            u = 1 - torch.arange(steps, dtype=torch.float64) / ends
            s = self.first + self.shifted_position(u) * (self.last - self.first)
        else:
            s = self._even_in_ratio(steps, spacing)
        return [*(self.level(float(time)) for time in self.time(s)), Level(1.0, 0.0, None)]

    def _ratios(self) -> tuple[float, float]:
        """sigma / alpha at both ends."""
        alpha, sigma = self.curve(torch.tensor([self.first, self.last], dtype=torch.float64))
        low, high = (sigma / alpha).tolist()
        return low, high

    def _even_in_ratio(self, steps: int, spacing: str) -> Tensor:
        low, high = self._ratios()
        edges = torch.tensor([self.last - _EDGE if math.isinf(high) else self.last, self.first + _EDGE * (low == 0)])
        alpha, sigma = self.curve(edges.double())
        top, bottom = sigma / alpha
        s = self.position_of(even_ratios(top.log(), bottom.log(), steps, spacing).exp())
        s[0] = self.last  # pure noise, from which sampling begins
        return s


def _columns(pair: Pair, dtype: torch.dtype = torch.float32) -> Pair:
    alpha, sigma = (part.to(dtype)[:, None, None, None] for part in pair)
    return alpha, sigma


class LinearPath(ContinuousPath):
    """Rectified flow, alpha = 1 - s and sigma = s (Liu et al. 2023; SiT's Linear)."""

    def curve(self, s: Tensor) -> Pair:
        return 1 - s, s

    def slopes(self, s: Tensor) -> Pair:
        return -torch.ones_like(s), torch.ones_like(s)

    def position_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)


class CosinePath(ContinuousPath):
    """alpha = cos(pi s / 2) and sigma = sin(pi s / 2) (SiT's GVP; REPA's cosine)."""

    def curve(self, s: Tensor) -> Pair:
        angle = s * math.pi / 2
        return torch.sin((1 - s) * math.pi / 2), torch.sin(angle)  # exactly 0 at both ends

    def slopes(self, s: Tensor) -> Pair:
        alpha, sigma = self.curve(s)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def position_of(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * 2 / math.pi


class VariancePreservingPath(ContinuousPath):
    """log alpha = -s^2 (beta_max - beta_min) / 4 - s beta_min / 2, sigma^2 = 1 - alpha^2 (Song et al. 2021, eq. 33).

    Beyond the clean end, where adaptive solvers look, sigma is -sqrt(alpha^2 - 1) with a slope by which the flow of a
    velocity or a score is that of the same formula in s.
    """

    def __init__(
        self,
        clean_time: float = 0.0,
        noise_time: float = 1000.0,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        margins: tuple[float, float] = (1e-5, 0.0),  # at s = 0 the derivative of sigma is infinite
    ) -> None:
        super().__init__(clean_time, noise_time, margins=margins)
        if not (beta_min < beta_max and beta_min + margins[0] * (beta_max - beta_min) / 2 > 0):
            raise InputError(
                f"diffusion.schedule.beta_min={beta_min} must be below beta_max={beta_max}, and above 0 unless a "
                "margin of the clean end leaves out the times without noise."
            )
        self.beta_min, self.width = beta_min, beta_max - beta_min

    def curve(self, s: Tensor) -> Pair:
        log_alpha = -0.25 * s**2 * self.width - 0.5 * s * self.beta_min
        variance = -torch.expm1(2 * log_alpha)
        return log_alpha.exp(), variance.sign() * variance.abs().sqrt()

    def slopes(self, s: Tensor) -> Pair:
        alpha, sigma = self.curve(s)
        slope = -0.5 * (s * self.width + self.beta_min) * alpha
        return slope, torch.where(sigma < 0, (sigma**2 - 1) / alpha, -alpha) * slope / sigma

    def position_of(self, ratio: Tensor) -> Tensor:
        twice = torch.log1p(ratio**2)  # -2 log alpha
        return (torch.sqrt(self.beta_min**2 + 2 * self.width * twice) - self.beta_min) / self.width


class EdmPath(ContinuousPath):
    """alpha = 1; log sigma is linear in s, and the network receives log(sigma) / 4 (Karras et al. 2022, table 1)."""

    unit, rate = 1.0, 4.0  # sigma = unit exp(rate time)

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        solver: tuple[str, str, int] = ("heun", "karras", 18),  # sampler, spacing and steps of `sampler=auto`
        noisy_end: bool = False,  # sampling ends at sigma_min, not at the clean latent
        wide_start: bool = False,  # and begins with sqrt(sigma_max^2 + 1) times the noise, as in diffusers
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise InputError(f"diffusion.schedule.sigma_min={sigma_min} must be above 0 and below {sigma_max}.")
        super().__init__(math.log(sigma_min / self.unit) / self.rate, math.log(sigma_max / self.unit) / self.rate)
        self.width, self.solver = math.log(sigma_max / sigma_min), Solver(*solver)
        self.noisy_end, self.wide_start = noisy_end, wide_start

    def curve(self, s: Tensor) -> Pair:
        sigma = self.unit * torch.exp(self.rate * self.time(s))
        return torch.ones_like(sigma), sigma

    def slopes(self, s: Tensor) -> Pair:
        return torch.zeros_like(s), self.width * self.curve(s)[1]

    def position_of(self, ratio: Tensor) -> Tensor:
        return self.position((ratio / self.unit).log() / self.rate)

    def grid(self, steps: int, spacing: str = "auto") -> list[Level]:
        levels = super().grid(steps, spacing)
        if self.wide_start:
            levels[0] = levels[0]._replace(spread=math.hypot(levels[0].sigma, 1))
        if not self.noisy_end:
            return levels
        end = levels[-2] if steps > 1 else self.level(self.clean_time)
        return [*levels[:-1], end._replace(time=None)]

    def time_of(self, ratio: Tensor) -> Tensor:
        """As the others, but beyond both ends too: training draws any sigma."""
        return self.time(self.position_of(ratio.double())).float()


class VarianceExplodingPath(EdmPath):
    """EDM's path with the times of NCSN++, log(sigma / 2) (Song et al. 2021; VE of Karras et al. 2022, table 1)."""

    unit, rate = 2.0, 1.0

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__(sigma_min, sigma_max, ("heun", "log_snr", 18))
