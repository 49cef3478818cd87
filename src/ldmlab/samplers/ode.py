"""The probability flow of a path by the solvers of torchdiffeq: adaptive dopri5, or fixed steps of higher order."""

from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from ldmlab.contracts import AfterStep, Denoise, Level, Noise, Path
from ldmlab.errors import InputError, one_of
from ldmlab.samplers._stepwise import further, noise_of, without_steps

ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "dopri5": 5, "dopri8": 8, "bosh3": 3}
_LEAST = 1e-6  # position and sigma of the evaluation at the clean end itself, where eps is undefined


class Ode:
    """d x / d s = alpha' clean + sigma' eps from the first level of a grid to its end.

    Fixed methods step over the grid; adaptive ones (dopri5, dopri8, bosh3) choose their steps by the tolerances and use
    only the ends of the grid. Their steps depend on the error of a whole batch; a model samples its images one by one.
    """

    idle_without = "rtol atol: method=dopri5 or method=dopri8 or method=bosh3"
    spacing = "linspace"
    steps = 50
    needs_path = True
    shows_steps = False  # after_step is refused

    def __init__(self, method: str = "dopri5", rtol: float = 1e-3, atol: float = 1e-6) -> None:
        """rtol, atol: of adaptive methods; SiT samples with 1e-3 and 1e-6."""
        one_of("sampler.method", method, ORDERS)
        if not (rtol > 0 and atol > 0):
            raise InputError(f"sampler.rtol={rtol} and atol={atol} must be above 0, for instance 1e-3 and 1e-6.")
        self.method, self.rtol, self.atol = method, rtol, atol
        self.order = ORDERS[method]
        self.one_image = method in ("dopri5", "dopri8", "bosh3")  # adaptive
        self.path: Path | None = None

    def along(self, path: Path) -> "Ode":
        """The same sampler on a path."""
        other = Ode(self.method, self.rtol, self.atol)
        other.path = path
        return other

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Tensor:
        """As a sampler; InputError for `after_step`, since steps of adaptive methods are not those of the grid."""
        path = without_steps(self, after_step)
        places = positions(path, grid)
        places = places[[0, -1]] if self.one_image else places
        times = 1 - places.to(x.device)  # growing, as the solvers' step rules expect
        more = {"rtol": self.rtol, "atol": self.atol} if self.one_image else {}
        for here, ends in zip(grid, pairwise(times), strict=False):  # one step, or one stretch
            run = denoise if self.one_image else further(denoise, here)
            x = odeint(
                lambda t, y, run=run: -slope(run, path, y, 1 - t), x, torch.stack(ends), method=self.method, **more
            )[-1]
        return x


def positions(path: Path, grid: list[Level]) -> Tensor:
    """s of the levels of a grid, float64; the end is the path's, which grids with a noisy end hold already."""
    times = torch.tensor([level.time for level in grid if level.time is not None], dtype=torch.float64)
    places = path.position(times)
    end = places.new_full((1,), getattr(path, "first", 0.0))
    return places if grid[-1].time is not None or bool(places[-1] - end < _LEAST) else torch.cat([places, end])


def slope(denoise: Denoise, path: Path, x: Tensor, s: Tensor) -> Tensor:
    """d x / d s at a position, in x's dtype."""
    time = path.time(s.detach().cpu().double())
    level = path.level(float(time))
    if not abs(level.sigma) >= _LEAST:  # the end; adaptive methods may evaluate beyond it, where a path is undefined
        time = path.time(s.new_tensor(_LEAST, device="cpu", dtype=torch.float64))
        level = path.level(float(time))
    d_alpha, d_sigma = (float(rate) for rate in path.rates(time[None]))
    clean = denoise(x, level)
    return d_alpha * clean.to(x.dtype) + d_sigma * noise_of(x, clean, level)
