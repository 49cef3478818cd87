"""Signal-to-noise ratios are those of latents that were really noised."""

import pytest
import torch

from ldmlab.diffusion.schedule import Schedule, decibels, even_time, signal_to_noise


@pytest.mark.parametrize("deviation", [0.5, 1.0, 5.5])
def test_the_ratio_of_noised_latents(deviation: float) -> None:
    torch.manual_seed(0)
    schedule, clean, t = Schedule(), deviation * torch.randn(200_000), torch.tensor([300])
    alpha, sigma = (level.flatten() for level in schedule.levels(t))
    measured = (alpha * clean).var() / (sigma * torch.randn(200_000)).var()
    assert float(signal_to_noise(schedule, deviation**2)[300]) == pytest.approx(float(measured), rel=0.02)


def test_latents_that_are_not_rescaled_keep_their_signal_longer() -> None:
    schedule = Schedule()
    rescaled, unscaled = even_time(schedule, 1.0), even_time(schedule, 5.5**2)  # the paper's kl-f8: 1 / 0.18215
    assert rescaled is not None
    assert unscaled is not None
    assert unscaled > rescaled + 200
    ratios = signal_to_noise(schedule, 1.0)
    assert ratios[rescaled] <= 1 < ratios[rescaled - 1]
    assert even_time(schedule, 1e9) is None


def test_decibels() -> None:
    assert decibels(1.0) == 0
    assert decibels(100.0) == pytest.approx(20)
    assert decibels(0.0) == -float("inf")
