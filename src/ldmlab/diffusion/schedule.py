"""Noise levels: the beta schedules of the official code under the names of diffusers, and grids of levels for samplers.

x_t = alpha_t x_0 + sigma_t eps, T times, time 0 is the least noisy. For the schedules here alpha_t^2 = alpha_bar_t =
prod(1 - beta) and sigma_t^2 = 1 - alpha_bar_t (Ho et al. 2020, eq. 4), computed in float64; networks see float32.
Everything else takes alpha and sigma from the path (contracts.Path); `as_path` makes one of any discrete schedule.
"""

import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ldmlab.contracts import Level, Path, Solver
from ldmlab.diffusion.respacing import even_ratios, even_times, quadratic_times
from ldmlab.errors import InputError, one_of
from ldmlab.randomness import below

NAMES = ("scaled_linear", "linear", "cosine", "sqrt")
_ALIASES = {"sqrt_linear": "linear"}  # the official name; its "linear" is scaled_linear
_SAME = 1e-5  # relative; float32 rounds to 1e-7


class DiscretePath:
    """The path of T discrete levels, from `steps` and `levels`; a time is an index, 0 the least noisy."""

    solver = Solver("ddim", "official", 50)
    steps: int

    def quantile(self, u: Tensor) -> Tensor:
        """Uniform numbers (B,) in (0, 1) => times (B,) int64."""
        return below(u, self.steps)

    def position(self, times: Tensor) -> Tensor:
        """times / (T - 1)."""
        return times / max(self.steps - 1, 1)

    def time(self, s: Tensor) -> Tensor:
        """s (T - 1)."""
        return s * (self.steps - 1)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The times (B,) int64 whose sigma / alpha is nearest on a logarithmic scale."""
        levels = levels_of(self)
        known = (levels.sigma / levels.alpha).log().to(ratio.device)
        return (ratio.double().log()[:, None] - known).abs().argmin(1)

    def level(self, time: float) -> Level:
        """The level of a time; between two of them alpha and sigma are interpolated."""
        levels, left = levels_of(self), min(int(time), self.steps - 1)
        if time == left:
            return levels.at(left)
        alpha, sigma = (float(torch.lerp(v[left], v[min(left + 1, self.steps - 1)], time - left)) for v in levels)
        return Level(alpha, sigma, float(time))

    def level_at(self, ratio: float) -> Level:
        """The level of a sigma / alpha, between the known ones."""
        levels = levels_of(self)
        radius = torch.hypot(levels.alpha, levels.sigma)
        return _between(levels.log_snr, radius, torch.tensor(-math.log(ratio), dtype=torch.float64))

    def rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """A discrete schedule has no derivatives."""
        raise InputError(
            "the velocity of a flow is undefined on a discrete schedule; choose the prediction v or eps and a sampler "
            "other than ode and sde, or a continuous path such as diffusion=flow."
        )

    def grid(self, steps: int, spacing: str = "auto") -> list[Level]:
        """As `ddim_grid`; auto is official."""
        return ddim_grid(self, steps, self.solver.spacing if spacing == "auto" else spacing)

    def with_shift(self, shift: float) -> Self:
        """Refused: discrete times are not shifted."""
        raise InputError(f"shift={shift} is for flows, and this model has a discrete schedule; leave it out.")

    def at_size(self, values: int) -> Self:
        """The same at every size."""
        return self


class _Adapted(DiscretePath):
    """The path of a schedule that has only `steps` and `levels`, as of a plugin."""

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.steps, self.levels = schedule, schedule.steps, schedule.levels
        self.alpha_bar = getattr(schedule, "alpha_bar", None)


def as_path(schedule: Any) -> Path:
    """What is a path as it is; a schedule with `steps` and `levels` as one."""
    if hasattr(schedule, "grid"):
        return schedule
    levels_of(schedule)  # refused here if it lacks any
    return _Adapted(schedule)


def same_path(first: Path, second: Path) -> bool:
    """Equal times and levels at a thousand quantiles, which are all levels of a schedule of up to as many."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    times = first.quantile(u), second.quantile(u)
    return torch.equal(*times) and all(map(torch.equal, first.levels(times[0]), second.levels(times[1])))


class Schedule(DiscretePath):
    """alpha_bar of T discrete noise levels, float64, and float32 tables of alpha and sigma for each device."""

    idle_without = "start end: name!=cosine, cosine_offset: name=cosine, least_alpha_bar: zero_terminal_snr"

    def __init__(
        self,
        name: str = "scaled_linear",  # scaled_linear (in sqrt(beta): the paper's) | linear (in beta) | cosine | sqrt
        start: float = 0.0015,  # first beta
        end: float = 0.0195,  # last beta
        steps: int = 1000,  # T
        cosine_offset: float = 0.008,  # keeps the first betas of the cosine schedule from vanishing
        zero_terminal_snr: bool = False,  # no signal at the last level (Lin et al. 2024, algorithm 1)
        least_alpha_bar: float = 0.0,  # that is left there; solvers of diffusers have 2^-24
        noisy_end: bool = False,  # sampling ends at the first level, whatever the spacing, not at the clean latent
    ) -> None:
        if not 1 <= steps <= 100_000:
            raise InputError(f"diffusion.schedule.steps={steps} must lie in 1 .. 100000 (paper: 1000).")
        name = _ALIASES.get(name, name)
        if name != "cosine" and not 0 < start <= end < 1:
            raise InputError(
                f"diffusion.schedule.start={start} and end={end} are not 0 < start <= end < 1; "
                "the paper's are 0.0015 and 0.0195."
            )
        self.name, self.steps, self.zero_terminal_snr, self.noisy_end = name, steps, zero_terminal_snr, noisy_end
        self.betas = _betas(name, start, end, steps, cosine_offset)  # (T,)
        if zero_terminal_snr:  # alphas shifted so that the last is 0, and scaled so that the first stays
            alpha = torch.cumprod(1 - self.betas, dim=0).sqrt()
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
            alpha_bar = torch.cat([torch.ones(1, dtype=alpha.dtype), alpha**2])
            self.betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)  # (T,)
        if zero_terminal_snr:
            self.alpha_bar[-1] = least_alpha_bar
        self._tables: dict[torch.device, Tensor] = {}

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the times t (B,) int64, float32, each (B, 1, 1, 1)."""
        if t.device not in self._tables:
            both = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
            self._tables[t.device] = both.float().to(t.device)
        alpha, sigma = self._tables[t.device][:, t, None, None, None]
        return alpha, sigma


def _betas(name: str, start: float, end: float, steps: int, cosine_offset: float) -> Tensor:
    """The T betas, float64."""
    if name == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if name == "sqrt":
        return torch.linspace(start, end, steps, dtype=torch.float64).sqrt()
    one_of("diffusion.schedule.name", name, NAMES)
    position = torch.arange(steps + 1, dtype=torch.float64) / steps  # cosine: Nichol & Dhariwal 2021, eq. 17
    alpha_bar = torch.cos((position + cosine_offset) / (1 + cosine_offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)


# ---- tables and grids of any schedule


class Levels(NamedTuple):
    """alpha and sigma of every time, float64 (T,)."""

    alpha: Tensor
    sigma: Tensor

    def at(self, t: int) -> Level:
        """The level of a time."""
        return Level(float(self.alpha[t]), float(self.sigma[t]), float(t))

    @property
    def log_snr(self) -> Tensor:
        """log(alpha / sigma), (T,), falling; infinite where there is no noise or no signal."""
        return torch.log(self.alpha / self.sigma)


def levels_of(schedule: Any, *, rounded: bool = False) -> Levels:
    """What `schedule.levels` gives, with the digits of `alpha_bar` where both are the same levels.

    rounded: alpha_bar in float32, as the paper's code keeps its table.
    """
    if missing := [name for name in ("steps", "levels") if not hasattr(schedule, name)]:
        raise InputError(
            f"diffusion.schedule={type(schedule).__name__} has no {' and no '.join(missing)}; a schedule needs steps "
            "and levels(t), see contracts.Schedule."
        )
    found = schedule.levels(torch.arange(schedule.steps))
    if len(found) != 2 or any(part.shape != (schedule.steps, 1, 1, 1) for part in found):
        raise InputError(
            f"diffusion.schedule={type(schedule).__name__}: levels(t) must give alpha and sigma, each of shape "
            "(len(t), 1, 1, 1)."
        )
    alpha, sigma = (part.detach().cpu().double().flatten() for part in found)
    alpha_bar = getattr(schedule, "alpha_bar", None)
    if alpha_bar is not None and alpha_bar.shape == alpha.shape:
        alpha_bar = alpha_bar.float() if rounded else alpha_bar.double()
        exact = alpha_bar.double().sqrt(), (1 - alpha_bar).double().sqrt()
        if all(torch.allclose(a, b, rtol=_SAME, atol=1e-6) for a, b in zip((alpha, sigma), exact, strict=True)):
            return Levels(*exact)
    return Levels(alpha, sigma)


def ddim_grid(schedule: Any, steps: int, spacing: str = "official") -> list[Level]:
    """`steps` levels of the schedule and the end.

    official: stride T // steps from 0, every index + 1, ending at the level of time 0 (paper's code);
    quad: the squares of `steps` even numbers up to sqrt(0.8 T), rounded down, + 1, ending as official (paper's code);
    linspace: T - 1 .. 0 with both ends, or in sections (`linspace:10,15,20`, see `sectioned`);
    leading: every T // steps-th from 0 up; trailing: T - 1 down in steps of T / steps; `:open` as `even_times`;
    karras, log_snr, polyexponential: as `even_ratios`, between the schedule's levels too, where the network's time has
    a fraction. All but the first two end at the clean latent, unless the schedule has a `noisy_end`.
    """
    total = schedule.steps
    if not 1 <= steps <= total:
        raise InputError(f"steps={steps} is not within 1 .. {total}, the noise levels of the model's schedule.")
    if spacing in ("official", "quad"):
        levels = levels_of(schedule, rounded=True)  # so that samples end where the official samples do
        times = _official_times(total, steps) if spacing == "official" else quadratic_times(total, steps)
        return [*(levels.at(t) for t in times), levels.at(0)._replace(time=None)]
    levels = levels_of(schedule)
    if spacing.partition(":")[0] in ("linspace", "leading", "trailing"):
        visited, first = [levels.at(t) for t in even_times(total, steps, spacing)], levels.at(0)
    else:
        known = levels.log_snr
        ratios = even_ratios(-known[-1], -known[0], steps, spacing)
        radius = torch.hypot(levels.alpha, levels.sigma)  # 1 for the schedules above
        visited = [_between(known, radius, -value) for value in ratios]
        first = visited[-1] if steps > 1 else levels.at(0)
    end = first._replace(time=None) if getattr(schedule, "noisy_end", False) else Level(1.0, 0.0, None)
    return [*(level for level in visited if level.sigma > 0), end]


def _between(known: Tensor, radius: Tensor, target: Tensor) -> Level:
    """The level of a log(alpha / sigma); time and radius lie on the straight line between the nearest known ones."""
    last = len(known) - 1
    right = min(max(int((known > target).sum()), 1), last) if last else 0  # first index that is not above
    left = max(right - 1, 0)
    width = float(known[left] - known[right])
    fraction = float(known[left] - target) / width if width > 0 else 0.0
    scale = float(torch.lerp(radius[left], radius[right], fraction))
    signal = torch.sigmoid(2 * target)
    time = min(max(left + fraction, 0.0), float(last))
    return Level(scale * math.sqrt(signal), scale * math.sqrt(1 - signal), time)


def _official_times(total: int, steps: int) -> list[int]:
    """The visited indices, noisiest first; only numbers of steps that the official rule really takes."""

    def visited(steps: int) -> range:
        return range(1, total + 1, total // steps)  # leaves the table when its last is T

    def works(steps: int) -> bool:
        return len(visited(steps)) == steps and visited(steps)[-1] < total

    if not works(steps):
        nearest = sorted(filter(works, range(1, total + 1)), key=lambda other: abs(other - steps))[:2]
        raise InputError(
            f"steps={steps}: the paper's step rule with stride {total} // {steps} cannot take exactly that many of the "
            f"{total} noise levels; use steps={' or '.join(map(str, sorted(nearest)))}, or spacing=linspace."
        )
    return list(visited(steps))[::-1]


def signal_to_noise(schedule: Any, variance: float) -> Tensor:
    """alpha^2 Var(z) / sigma^2 at every time, (T,) float64; infinite where there is no noise (appendix D.1)."""
    levels = levels_of(schedule)
    return variance * (levels.alpha / levels.sigma).square()


def even_time(schedule: Any, variance: float) -> float | None:
    """The first time at which noise is at least as strong as signal; None if that never happens."""
    if not hasattr(schedule, "steps"):  # a continuous path
        time = schedule.time_of(torch.tensor([variance], dtype=torch.float64).sqrt())
        alpha, sigma = schedule.levels(time)
        return float(time) if float(variance * (alpha / sigma) ** 2) <= 1.001 else None
    weaker = torch.nonzero(signal_to_noise(schedule, variance) <= 1)
    return int(weaker[0]) if len(weaker) else None


def decibels(ratio: float) -> float:
    """10 log10, which is 0 where signal and noise are equally strong."""
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf
