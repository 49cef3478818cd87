"""What networks predict: the clean image comes back from the target, and the same image from either."""

import math

import pytest
import torch

from ldmlab.contracts import Level
from ldmlab.diffusion.parameterization import EpsPrediction, VPrediction


@pytest.mark.parametrize("prediction", [EpsPrediction(), VPrediction()])
def test_a_network_that_is_right_gives_the_clean_image(prediction: EpsPrediction | VPrediction) -> None:
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    alpha, sigma = math.cos(0.4), math.sin(0.4)
    target = prediction.target(clean, noise, torch.full((2, 1, 1, 1), alpha), torch.full((2, 1, 1, 1), sigma))
    found = prediction.clean(alpha * clean + sigma * noise, target, Level(alpha, sigma, 400.0))
    torch.testing.assert_close(found.float(), clean)


def test_v_says_something_where_no_signal_is_left() -> None:
    clean, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    v = VPrediction().target(clean, noise, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(VPrediction().clean(noise, v, Level(0.0, 1.0, 999.0)).float(), clean)
