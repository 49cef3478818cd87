"""Euler's method on the probability flow (Karras et al. 2022, "Elucidating the design space", section 3)."""

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, first_order


class Euler(Stepwise):
    """One evaluation a step; DDIM without noise, on steps that are its own."""

    order = 1
    spacing = "log_snr"
    steps = 50

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """alpha' clean + sigma' eps."""
        return first_order(x, clean, step.here, step.there)
