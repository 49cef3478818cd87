"""Large latents window by window: as the whole where the network sees single pixels, without a seam elsewhere."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.contracts import Conditioning, Level, Posterior
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.nn.tiling import latent_windows, windowed
from ldmlab.randomness import normal
from ldmlab.samplers.ddim import Ddim


class Network(nn.Module):
    """Three convolutions over latent and map; remembers the largest map it saw."""

    accepts = frozenset({"spatial", "tokens"})

    def __init__(self, kernel: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        widths, padding = (4, 16, 16, 3), kernel // 2
        self.layers = nn.ModuleList(nn.Conv2d(a, b, kernel, padding=padding) for a, b in pairwise(widths))
        self.largest = 0

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.spatial is not None
        self.largest = max(self.largest, x.shape[2] * x.shape[3])
        y = torch.cat([x, conditioning.spatial], dim=1)
        for layer in self.layers[:-1]:
            y = F.silu(layer(y))
        y = self.layers[-1](y) + (0 if conditioning.tokens is None else conditioning.tokens.mean())
        return y * t[:, None, None, None] / 1000


class Map(nn.Module):
    """A map given beside the latent, dropped for guidance."""

    reads, slot, drop = frozenset({"map"}), "spatial", 0.1

    def forward(self, batch: dict[str, Any], encode: Any) -> Tensor:
        return batch["map"]

    def null(self, batch: dict[str, Any], encode: Any) -> Tensor:
        return torch.zeros_like(batch["map"])


def sampled(kernel: int, window: int | None, size: int = 96, **options: Any) -> tuple[Tensor, Network]:
    network = Network(kernel)
    model = LatentDiffusion(
        Identity(), LatentScale(), network, {"map": Map()}, Schedule(), EpsPrediction(), guidance_trained=True
    )
    rows = torch.linspace(-1, 1, size)
    batch = {"map": (rows[:, None] * rows).expand(2, 1, size, size)}
    options |= {"sampler": Ddim(), "grid": ddim_grid(model.schedule, 10), "window": window}
    return model.sample(batch, index=torch.arange(2), size=(size, size), **options), network


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_network_of_single_pixels_does_not_notice(guidance_scale: float) -> None:
    whole, _ = sampled(1, None, guidance=Guidance(guidance_scale))
    parts, network = sampled(1, 32, guidance=Guidance(guidance_scale))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    assert network.largest == 32 * 32


def test_far_from_borders_a_convolution_gives_the_same() -> None:
    conditions = Conditioning(spatial=torch.randn(1, 1, 40, 40))
    network, x = Network(3), torch.randn(1, 3, 40, 40)

    def bind(conditioning: Conditioning, null: Conditioning | None) -> Any:
        return lambda x, level: network(x, torch.full((1,), level.time), conditioning)

    level = Level(0.5, 0.5, 500.0)
    whole = bind(conditions, None)(x, level)
    parts = windowed(bind, latent_windows((40, 40), 24, 1))(conditions, None)(x, level)
    torch.testing.assert_close(parts[:, :, :13, :13], whole[:, :, :13, :13])  # the next window begins at 16
    assert not torch.allclose(parts, whole, atol=1e-3)


def flat(x: Tensor, level: Level) -> Tensor:
    """The exact denoiser of images, (B, C, h, w), that are +1 everywhere or -1 everywhere."""
    odds = level.alpha * x.sum(dim=(1, 2, 3), keepdim=True) / max(level.sigma, 1e-3) ** 2
    return torch.tanh(odds).expand_as(x)


def largest_jump(images: Tensor) -> float:
    return float((images[..., 1:] - images[..., :-1]).abs().max())


def test_no_seam_between_windows() -> None:
    grid = ddim_grid(Schedule(), 20, "trailing")
    start = normal(0, "start", torch.arange(8), (3, 32, 96))

    def walk(denoise: Any, x: Tensor) -> Tensor:
        return Ddim()(denoise, x, grid, noise=lambda step: torch.zeros_like(x))

    apart = torch.cat([walk(flat, part) for part in start.split(32, dim=3)], dim=3)
    assert largest_jump(apart) > 1.9  # neighbours have chosen another tone
    together = walk(windowed(lambda *_: flat, latent_windows((32, 96), 32, 1))(Conditioning(), None), start)
    assert largest_jump(together) < 2 / 8 + 0.05  # from one tone to the other in a line over eight pixels at least


def test_each_window_is_bound_once_for_all_steps() -> None:
    prepared = 0

    def bind(conditioning: Conditioning, null: Conditioning | None) -> Any:
        nonlocal prepared
        prepared += 1
        return lambda x, level: x

    parts = latent_windows((40, 40), 24, 1)
    told = Conditioning(tokens=torch.zeros(1, 2, 4))
    denoise = windowed(bind, parts)(told, None)
    for _ in range(3):
        denoise(torch.zeros(1, 3, 40, 40), Level(1.0, 0.0, None))
    assert prepared == 1  # text is the same in all windows
    windowed(bind, parts)(Conditioning(spatial=torch.zeros(1, 1, 40, 40)), None)
    assert prepared == 1 + len(parts)


def test_double_precision_stays() -> None:
    denoise = windowed(lambda *_: lambda x, level: x, latent_windows((40, 20), 24, 1))(Conditioning(), None)
    x = torch.randn(1, 3, 40, 20, dtype=torch.float64)
    torch.testing.assert_close(denoise(x, Level(1.0, 0.0, None)), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("window", "near"), [(30, 32), (4, 16)])
def test_windows_that_do_not_fit_the_latent(window: int, near: int) -> None:
    with pytest.raises(InputError, match=f"window={window} .* choose for instance {near}"):
        latent_windows((40, 40), window, 4)


def test_another_first_stage_for_a_while() -> None:
    class Doubled(Identity):
        def encode(self, images: Tensor) -> Posterior:
            return Posterior(2 * images)

        def decode(self, raw_latents: Tensor) -> Tensor:
            return raw_latents / 2

    model = LatentDiffusion(Identity(), LatentScale(), Network(1), {}, Schedule(), EpsPrediction())
    pixels = torch.rand(1, 3, 4, 4)
    with model.through(Doubled()):
        assert torch.equal(model.encode(pixels), 2 * pixels)
        assert torch.equal(model.decode(pixels), pixels / 2)
        assert torch.equal(model.pixels(pixels), pixels)  # gradients go through the first stage itself
    assert torch.equal(model.encode(pixels), pixels)
    assert not any("instead" in name for name in model.state_dict())
