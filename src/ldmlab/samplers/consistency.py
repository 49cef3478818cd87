"""Multistep consistency sampling (Song et al. 2023, "Consistency models", algorithm 1)."""

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, checked_temperature


class Consistency(Stepwise):
    """Every step goes to the clean latent and from there, with fresh noise, to the next level."""

    spacing = "trailing"
    steps = 4
    order = None

    def __init__(self, temperature: float = 1.0) -> None:
        """temperature: factor of the fresh noise."""
        self.temperature = checked_temperature(temperature)

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """alpha' clean + sigma' noise; the last step has no noise."""
        there = step.there
        return there.alpha * clean + there.sigma * step.noise(step.number) if there.time is not None else clean
