"""Rectified flow on the steps of diffusers' FlowMatchEuler- and FlowMatchHeunDiscreteScheduler (SD3, Flux, LTX)."""

import math
from typing import Self

import torch
from torch import Tensor

from ldmlab.contracts import Level, Solver
from ldmlab.diffusion.paths import LinearPath
from ldmlab.errors import InputError, one_of

_RHO = 7  # Karras et al. 2022, eq. 5
_BETA = 0.6  # both parameters of the beta distribution ("Beta Sampling is All You Need", Lee et al. 2024)
_RULES = ("shifted", "karras", "exponential", "beta")


class FlowMatchPath(LinearPath):
    """`LinearPath` with a spacing of its own, `flow_match`; times are counted in n = |noise_time - clean_time| levels.

    Even positions u from 1 to the lowest level of training, 1 / n after the shift, are shifted: the lowest one twice.
    With `dynamic` the shift follows from the size of a latent, and the lowest level is 1 / n itself. `linspace`: even
    positions from 1 to 1 / steps instead, as pipelines that hand their sigmas to the scheduler (Flux, LTX).
    """

    def __init__(
        self,
        clean_time: float = 0.0,
        noise_time: float = 1000.0,
        shift: float = 1.0,
        shift_base: int | None = None,
        margins: tuple[float, float] = (0.0, 0.0),
        dynamic: tuple[float, float, float, float] | None = None,  # values of a latent, mu, more values, their mu
        dynamic_type: str = "exponential",  # shift = exp(mu), or mu itself: linear. mu: on the line through both pairs
        terminal: float = 0.0,  # the last level before the clean end, to which sampling's levels are stretched
        rule: str = "shifted",  # between the first and the last level: shifted, or even in s^(1/7) (karras), log(s)
        # (exponential), or quantiles of a beta distribution (beta)
        fresh_noise: bool = False,  # sampler `consistency` by default: every step draws its noise anew
    ) -> None:
        super().__init__(clean_time, noise_time, shift, shift_base, margins)
        one_of("diffusion.schedule.rule", rule, _RULES)
        one_of("diffusion.schedule.dynamic_type", dynamic_type, ("exponential", "linear"))
        if abs(noise_time - clean_time) <= 1 or not 0 <= terminal < 1:
            raise InputError(
                f"diffusion.schedule.noise_time={noise_time}, clean_time={clean_time}, terminal={terminal}: times "
                "count levels here, such as 0 .. 1000, and terminal is within 0 .. 1; or choose a LinearPath."
            )
        if dynamic is not None and (len(dynamic) != 4 or dynamic[0] == dynamic[2] or (shift, shift_base) != (1, None)):
            raise InputError(f"diffusion.schedule.dynamic={dynamic}: give two sizes, each with its mu, and no shift.")
        self.solver = Solver("consistency" if fresh_noise else "euler", "flow_match", 28)
        self.dynamic, self.dynamic_type, self.terminal, self.rule = dynamic, dynamic_type, terminal, rule

    def at_size(self, values: int) -> Self:
        if self.dynamic is None:
            return super().at_size(values)
        few, low, many, high = self.dynamic
        mu = low + (values - few) * (high - low) / (many - few)
        return self.with_shift(math.exp(mu) if self.dynamic_type == "exponential" else mu)

    def grid(self, steps: int, spacing: str = "auto") -> list[Level]:
        if spacing not in ("auto", "flow_match", "linspace") or steps < 1:
            return super().grid(steps, spacing)
        if spacing == "linspace":
            s = 1 - torch.arange(steps, dtype=torch.float64) / steps
        else:
            lowest = torch.tensor(1 / abs(self.noise_time - self.clean_time), dtype=torch.float64)
            if self.dynamic is None:
                lowest = self.shifted_position(lowest)
            s = torch.linspace(1, float(lowest), steps, dtype=torch.float64)
        s = self.shifted_position(s)
        if self.terminal and steps > 1:
            s = 1 - (1 - s) * (1 - self.terminal) / (1 - s[-1])
        s = self._by_rule(s, torch.linspace(0, 1, steps, dtype=torch.float64))
        s = self.first + s * (self.last - self.first)
        return [*(self.level(float(time)) for time in self.time(s)), Level(1.0, 0.0, None)]

    def _by_rule(self, s: Tensor, u: Tensor) -> Tensor:
        """Other positions between the ends of s; u: even numbers from 0 to 1."""
        if self.rule == "karras":
            return torch.lerp(s[0] ** (1 / _RHO), s[-1] ** (1 / _RHO), u) ** _RHO
        if self.rule == "exponential":
            return torch.exp(torch.lerp(s[0].log(), s[-1].log(), u))
        if self.rule == "beta":
            from scipy.stats import beta

            return torch.lerp(s[-1], s[0], torch.from_numpy(beta.ppf(1 - u.numpy(), _BETA, _BETA)))
        return s
