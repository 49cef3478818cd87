"""Changes of latents in training: what is drawn belongs to the step or the image; equivariance costs nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.losses.latent_regularisers import LatentRegularisers, Regularised, moved

SIZE = 32


def of(images: Tensor, start: int = 0, seed: int = 1, step: int = 0, f: int = 4, **options: Any) -> Regularised:
    """The regularisers on images at the positions from `start` on, of the step that began at `step`."""
    made = LatentRegularisers(**options)
    position = torch.arange(start, start + len(images))
    return made(images, position, seed=seed, step_position=step, downsampling=f)


def test_what_is_equivariant_loses_nothing() -> None:
    """Averages over patches turn with the image; with a slope across the latent they do not."""
    images = torch.randn(2, 3, SIZE, SIZE)

    def decoded(given: Regularised, tilt: float) -> Tensor:
        latents = F.avg_pool2d(given.images, 4) + tilt * torch.linspace(0, 1, SIZE // 4)
        return F.interpolate(given.change(latents), scale_factor=4)

    for step in range(8):
        given = of(images, step=step, equivariance=1.0, least_scale=1.0)
        target = F.interpolate(F.avg_pool2d(given.target, 4), scale_factor=4)
        torch.testing.assert_close(decoded(given, 0.0), target)
        assert (decoded(given, 1.0) - target).abs().mean() > 0.1


def test_scales_and_turns_of_the_official_program() -> None:
    """At 32 x 32 latents: k / 32 for k in 8 .. 31, turned by 90, 180 or 270 degrees, bilinear without smoothing."""
    images, latents = torch.randn(1, 3, 64, 64), torch.randn(1, 2, 32, 32)
    sides, turns = set(), set()
    for step in range(200):
        given = of(images, step=step, f=2, equivariance=1.0)
        assert torch.equal(given.images, images)
        side = given.target.shape[-1] // 2
        assert given.target.shape[-2:] == (2 * side, 2 * side)
        scaled = F.interpolate(latents, scale_factor=side / 32, mode="bilinear", align_corners=False)
        found = [k for k in range(4) if torch.equal(given.change(latents), torch.rot90(scaled, k, dims=(-1, -2)))]
        assert torch.equal(given.target, moved(images, (2 * side, 2 * side), found[0]))
        sides.add(side)
        turns.update(found)
        assert len(found) == 1
    assert (sides, turns) == (set(range(8, 32)), {1, 2, 3})


def test_shares_of_steps() -> None:
    images = torch.randn(1, 3, SIZE, SIZE)
    kinds = {"transformed": 0, "smaller": 0, "plain": 0}
    for step in range(400):
        given = of(images, step=step, equivariance=0.5, low_resolution=0.25)
        if given.target is not given.images:
            kinds["transformed"] += 1
        else:
            kinds["plain" if given.images is images else "smaller"] += 1
    assert 160 < kinds["transformed"] < 240
    assert 30 < kinds["smaller"] < 75


@pytest.mark.parametrize("spread", ["uniform", "fixed"])
def test_noise_and_masks_belong_to_the_image(spread: str) -> None:
    options: dict[str, Any] = {"noise": 0.5, "noise_spread": spread, "masked": 0.5, "least_channels": 2}
    images, latents = torch.zeros(64, 3, SIZE, SIZE), torch.ones(64, 6, 8, 8)
    whole = of(images, **options).change(latents)
    parts = [of(images[:16], start, step=7, **options).change(latents[:16]) for start in (0, 16, 32, 48)]
    assert torch.equal(whole, torch.cat(parts))  # whatever the micro-batch, and whatever the step began with
    kept = (whole != 0).flatten(2).any(dim=2)  # (B, C)
    assert set(kept.sum(dim=1).tolist()) == {2, 3, 4, 5, 6}
    assert bool((kept[:, :-1] >= kept[:, 1:]).all())  # the last channels go
    assert 20 < int((kept.sum(dim=1) < 6).sum()) < 44
    deviation = (whole - 1)[:, :2].flatten(1).std(dim=1)
    low, high = (0.45, 0.55) if spread == "fixed" else (0.0, 0.5)
    assert float(deviation.mean()) == pytest.approx((low + high) / 2, abs=0.05)
    assert float(deviation.std()) == pytest.approx(0.03 if spread == "fixed" else 0.5 / 12**0.5, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equivariance": 1.5}, r"equivariance=1\.5 is no share"),
        ({"noise": -0.1}, r"noise=-0\.1 is no deviation"),
        ({"noise": 0.1, "noise_spread": "wide"}, "noise_spread=wide is unknown"),
        ({"equivariance": 0.5, "least_scale": 1.0, "rotate": False}, "least_scale=1 leaves nothing to scale"),
        ({"equivariance": 0.5, "least_scale": 0.9}, r"least_scale=0\.9 would shrink latents of 8x8"),
        ({"masked": 0.5, "least_channels": 3}, r"least_channels=3 must leave 1 \.\. 2 of the 3 latent channels"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        of(torch.zeros(1, 3, SIZE, SIZE), **options).change(torch.zeros(1, 3, 8, 8))
