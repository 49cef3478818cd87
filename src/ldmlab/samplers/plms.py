"""PLMS (Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds"), as in the paper's code."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level
from ldmlab.samplers.ddim import noise_of, transfer
from ldmlab.samplers.euler import first_order

# Adams-Bashforth weights of the newest noise estimate and those before it, by how many there are (eq. 12)
WEIGHTS = ((1,), (3, -1), (23, -16, 5), (55, -59, 37, -9))  # over their sum


class Plms:
    """One evaluation a step, two in the first: DDIM's step along a noise estimate carried on from the last four."""

    order = 2  # in general; the weights are those of even steps in sigma / alpha, on which it is 3
    spacing = "official"
    steps = 50  # where nobody says how many

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,  # (B, C, h, w) at grid[0]
        grid: list[Level],
        *,
        noise: Callable[[int], Tensor],
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """x at the last level of the grid."""
        known: list[Tensor] = []  # noise estimates, newest first
        for step, (here, there) in enumerate(pairwise(grid)):
            clean = denoise(x, here)
            eps = noise_of(x, clean, here)
            known = [eps, *known][:4]
            if here.alpha == 0:  # no signal to carry the estimate on from
                x, known = first_order(x, clean.to(x.dtype), here, there), []
            else:
                mixed = _carried_on(known)
                if step == 0 and there.time is not None and there.sigma > 0:  # eq. 13: the mean of both ends
                    ahead = transfer(x, eps, here, there)
                    mixed = (eps + noise_of(ahead, denoise(ahead, there), there)) / 2
                x = transfer(x, mixed, here, there)
            if after_step is not None:
                x = after_step(step, x, clean.to(x.dtype))
        return x


def _carried_on(known: list[Tensor]) -> Tensor:
    """The weighted mean of the newest noise estimates."""
    weights = WEIGHTS[len(known) - 1]
    mixed = weights[0] * known[0]
    for weight, eps in zip(weights[1:], known[1:], strict=True):
        mixed = mixed + weight * eps
    return mixed / sum(weights)
