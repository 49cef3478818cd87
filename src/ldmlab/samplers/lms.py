"""Linear multistep method on the probability flow (Adams-Bashforth for uneven steps), in sigma / alpha."""

import numpy as np
from numpy.polynomial import Polynomial
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.samplers._stepwise import Step, Stepwise, first_order, noise_of


class Lms(Stepwise):
    """One evaluation a step; the noise estimate is the polynomial through the last `depth` ones, integrated exactly."""

    spacing = "log_snr"
    steps = 25

    def __init__(self, depth: int = 4) -> None:
        """depth: estimates that are used, 1 (Euler) to 4."""
        if not 1 <= depth <= 4:
            raise InputError(f"depth={depth} is not within 1 .. 4 estimates.")
        self.depth = depth
        self.order = min(depth, 2)  # the first step is Euler's, so the whole is no more than 2

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """alpha' (x / alpha + sum_j c_j eps_j), c_j the integral of the j-th Lagrange polynomial over the step."""
        here, there, past = step.here, step.there, step.past  # past: (sigma / alpha, eps), newest first
        if here.alpha == 0:
            return first_order(x, step.unrounded.to(x.dtype), here, there)
        past[:] = [(here.sigma / here.alpha, noise_of(x, step.unrounded, here)), *past][: self.depth]
        places = [place for place, _ in past]
        weights = coefficients(places, there.sigma / there.alpha)
        change = sum(weight * eps for weight, (_, eps) in zip(weights, past, strict=True))
        return there.alpha * (x / here.alpha + change)


def coefficients(places: list[float], end: float) -> list[float]:
    """Integrals from the first place to `end` of the polynomials that are 1 at one place and 0 at the others."""
    found = []
    for j, place in enumerate(places):
        others = np.array(places[:j] + places[j + 1 :])
        basis = Polynomial.fromroots(others) / np.prod(place - others) if len(others) else Polynomial([1.0])
        whole = basis.integ()
        found.append(float(whole(end) - whole(places[0])))
    return found
