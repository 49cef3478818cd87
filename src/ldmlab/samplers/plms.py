"""PLMS (Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds"), as in the paper's code."""

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, first_order, noise_of
from ldmlab.samplers.ddim import transfer

# Adams-Bashforth weights of the newest noise estimate and those before it, by how many there are (eq. 12)
WEIGHTS = ((1,), (3, -1), (23, -16, 5), (55, -59, 37, -9))  # over their sum


class Plms(Stepwise):
    """One evaluation a step, two in the first: DDIM's step along a noise estimate carried on from the last four."""

    order = 2  # in general; the weights are those of even steps in sigma / alpha, on which it is 3
    spacing = "official"
    steps = 50
    repeats = True

    def __init__(self, quantize_x0: bool = False) -> None:
        """quantize_x0: clean estimates to the nearest codebook vectors, for VQ first stages."""
        self.quantize_x0 = quantize_x0

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """DDIM's step without noise, along the weighted estimates (eq. 12; in the first step eq. 13)."""
        here, there, known = step.here, step.there, step.past  # known: noise estimates, newest first
        if here.alpha == 0:  # no signal to carry an estimate on from
            known.clear()
            return first_order(x, step.nearest(clean), here, there)
        eps = noise_of(x, step.unrounded, here)
        known[:] = [eps, *known][: len(WEIGHTS)]
        weights = WEIGHTS[len(known) - 1]
        mixed = sum((w * e for w, e in zip(weights[1:], known[1:], strict=True)), weights[0] * eps) / sum(weights)
        if step.number == 0 and there.time is not None and there.sigma > 0:  # eq. 13: the mean of both ends
            ahead = transfer(x, eps, here, there, step.nearest)
            mixed = (eps + noise_of(ahead, step.denoise(ahead, there), there)) / 2
        return transfer(x, mixed, here, there, step.nearest)
