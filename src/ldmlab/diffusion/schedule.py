"""The four beta schedules of the official code under the names of diffusers (T steps, index 0 is the least noisy).

x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 = alpha_bar_t = prod(1 - beta) and sigma_t^2 = 1 - alpha_bar_t
(Ho et al. 2020, eq. 4). Tables are computed in float64; networks see float32.
"""

import math

import torch
from torch import Tensor

from ldmlab.errors import InputError

NAMES = ("scaled_linear", "linear", "cosine", "sqrt")
_ALIASES = {"sqrt_linear": "linear"}  # the official name; its "linear" is scaled_linear


class Schedule:
    """alpha_bar of T discrete noise levels, float64, and float32 tables of alpha and sigma for each device."""

    def __init__(
        self,
        name: str = "scaled_linear",  # scaled_linear (in sqrt(beta): the paper's) | linear (in beta) | cosine | sqrt
        start: float = 0.0015,  # first beta
        end: float = 0.0195,  # last beta
        steps: int = 1000,  # T
        cosine_offset: float = 0.008,  # keeps the first betas of the cosine schedule from vanishing
        zero_terminal_snr: bool = False,  # no signal at the last level (Lin et al. 2024, algorithm 1)
    ) -> None:
        if not 1 <= steps <= 100_000:
            raise InputError(f"diffusion.schedule.steps={steps} must lie in 1 .. 100000 (paper: 1000).")
        name = _ALIASES.get(name, name)
        if name != "cosine" and not 0 < start <= end < 1:
            raise InputError(
                f"diffusion.schedule.start={start} and end={end} are not 0 < start <= end < 1; "
                "the paper's are 0.0015 and 0.0195."
            )
        self.name = name
        self.steps = steps
        self.zero_terminal_snr = zero_terminal_snr
        self.betas = _betas(name, start, end, steps, cosine_offset)  # (T,)
        if zero_terminal_snr:
            self.betas = _without_terminal_signal(self.betas)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)  # (T,)
        self._tables: dict[torch.device, Tensor] = {}

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the times t (B,) int64, float32, each (B, 1, 1, 1)."""
        if t.device not in self._tables:
            both = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
            self._tables[t.device] = both.float().to(t.device)
        alpha, sigma = self._tables[t.device][:, t, None, None, None]
        return alpha, sigma


def _without_terminal_signal(betas: Tensor) -> Tensor:
    """Betas of the schedule whose alphas are shifted so that the last is 0 and scaled so that the first stays."""
    alpha = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    alpha_bar = torch.cat([torch.ones(1, dtype=alpha.dtype), alpha**2])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _betas(name: str, start: float, end: float, steps: int, cosine_offset: float) -> Tensor:
    """The T betas, float64."""
    if name == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if name == "sqrt":
        return torch.linspace(start, end, steps, dtype=torch.float64).sqrt()
    if name == "cosine":  # Nichol & Dhariwal 2021, eq. 17
        position = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((position + cosine_offset) / (1 + cosine_offset) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
    raise InputError(f"diffusion.schedule.name={name} is unknown; choose one of {', '.join(NAMES)}.")
