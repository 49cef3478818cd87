"""Measures of latents on cases whose values are known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.metrics.latent_measures import (
    channel_statistics,
    codebook,
    effective_rank,
    equivariance,
    interpolation,
    noise_response,
    spectrum,
)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def same(x: Tensor) -> Tensor:
    return x


def test_white_noise_has_a_flat_spectrum_and_full_rank() -> None:
    """Whatever its channels' means and deviations."""
    latents = noise(400, 4, 16, 16) * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None, None] + 3
    found = spectrum(latents)
    assert found["power"] == pytest.approx([1.0] * 15, rel=0.05)  # 800 values or more a ring: deviation 0.05
    assert found["slope"] == pytest.approx(0, abs=0.02)
    assert found["high_band"] == pytest.approx(found["white"], abs=0.003)
    assert effective_rank(latents) == pytest.approx(4, abs=0.01)
    first = channel_statistics(latents)[1]
    assert (first["mean"], first["std"]) == pytest.approx((3, 5), rel=0.01)
    assert first["kurtosis"] == pytest.approx(0, abs=0.05)


def test_a_wave_has_its_power_at_its_frequency() -> None:
    place = torch.arange(8) + 0.5
    wave = torch.cos(math.pi / 8 * 3 * place).expand(1, 1, 8, 8) * torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
    found = spectrum(wave)
    assert found["power"].index(max(found["power"])) + 1 == 3
    assert sum(found["power"][:2] + found["power"][3:]) < 1e-9
    assert found["high_band"] < 1e-9
    assert effective_rank(torch.cat([wave, 2 * wave], dim=1)) == pytest.approx(1)


def test_smoother_latents_have_less_in_the_high_band() -> None:
    rough = noise(50, 2, 16, 16)
    smooth = F.avg_pool2d(rough, 3, 1, 1)
    assert spectrum(smooth)["high_band"] < 0.5 * spectrum(rough)["high_band"]
    assert spectrum(smooth)["slope"] < -0.5


def test_constant_latents_have_no_spectrum() -> None:
    found = spectrum(torch.full((3, 2, 4, 4), 2.0))
    assert (found["slope"], found["high_band"]) == (None, None)
    assert channel_statistics(torch.zeros(3, 1, 4, 4)) == [{"mean": 0.0, "std": 0.0, "kurtosis": None}]


def test_pixels_are_equivariant_and_a_fixed_pattern_is_not() -> None:
    images = noise(4, 3, 16, 16).clamp(-1, 1)
    exact = equivariance(same, same, images, images)
    assert exact == {name: {"encoder": 0.0, "decoder": 0.0} for name in ("half_size", "turned")}
    ramp = torch.linspace(-1, 1, 16)

    def patterned(x: Tensor) -> Tensor:
        return x + ramp[: x.shape[3]]

    wrong = equivariance(patterned, same, images, patterned(images))
    assert wrong["turned"]["decoder"] == 0
    assert wrong["turned"]["encoder"] == pytest.approx(
        float(
            (ramp[None] - torch.rot90(ramp.expand(16, 16), 1)).square().mean()
            / patterned(images).var(dim=(0, 2, 3)).mean()
        ),
        rel=0.01,
    )


def test_noise_lowers_psnr_as_its_power_says() -> None:
    """Latents of deviation 0.2 that are pixels, so noise s 0.2 gives 20 log10(2 / (0.2 s)) dB."""
    images = 0.2 * noise(8, 3, 32, 32)
    found = dict(noise_response(same, images, images, noise(9, 3, 32, 32)[1:]))
    assert found[0.0] == 100
    assert found[0.4] == pytest.approx(20 * math.log10(2 / 0.08), abs=0.1)


def test_half_way_latents_that_the_encoder_never_gives() -> None:
    latents = torch.tensor([1.0, -1.0] * 8).view(16, 1, 1, 1).expand(16, 1, 4, 4)
    assert interpolation(torch.sign, same, latents) == {"ends": 0.0, "middle": 0.0}
    found = interpolation(lambda x: torch.where(x >= 0, 1.0, -1.0), same, latents)
    assert found == {"ends": 0.0, "middle": 1.0}


def test_codes_use_and_entropy() -> None:
    found = codebook(torch.tensor([[0, 1], [1, 0]]), 8)
    assert found == {"size": 8, "use": 0.25, "bits": pytest.approx(1), "most_bits": 3}
