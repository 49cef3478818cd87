"""Measures of reconstructions, latents and codes against their definitions written out, and for any split."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldmlab.contracts import Posterior
from ldmlab.metrics.reconstruction import LatentStatistics, ReconstructionMeasures, codebook_use


def images() -> tuple[Tensor, Tensor]:
    """White images with a coloured square each, and noisy copies."""
    generator = torch.Generator().manual_seed(0)
    original = torch.full((5, 3, 24, 24), 255, dtype=torch.uint8)
    for index in range(5):
        original[index, :, 4 : 8 + 2 * index, 4:12] = torch.randint(0, 250, (3, 1, 1), generator=generator).byte()
    noise = torch.randint(-20, 20, original.shape, generator=generator)
    return original, (original.int() + noise).clamp(0, 255).byte()


def measured(original: Tensor, rebuilt: Tensor, parts: int = 1) -> dict[str, float]:
    measures = ReconstructionMeasures(
        lpips=lambda x, y: (x - y).abs().mean(dim=(1, 2, 3)), psim=lambda x, y: (x - y).square().sum(dim=(1, 2, 3))
    )
    for x, y in zip(original.chunk(parts), rebuilt.chunk(parts), strict=True):
        measures.update(x, y)
    return measures.compute()


def test_definitions() -> None:
    original, rebuilt = images()
    found = measured(original, rebuilt)
    each = [peak_signal_noise_ratio(y.float(), x.float(), 255.0) for x, y in zip(original, rebuilt, strict=True)]
    assert found["psnr"] == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    assert found["psnr_std"] == pytest.approx(float(torch.stack(each).std(correction=0)), rel=1e-3)
    ssim = structural_similarity_index_measure(rebuilt.float(), original.float(), data_range=255.0)
    assert found["ssim"] == pytest.approx(float(ssim), rel=1e-5)
    inside = (original != 255).any(dim=1, keepdim=True).expand_as(original)
    error = (original.double() - rebuilt.double())[inside].square().mean()
    assert found["psnr_object"] == pytest.approx(10 * math.log10(255**2 / float(error)), rel=1e-6)
    error = ((original.double() - rebuilt.double()) / 127.5).square().sum(dim=(1, 2, 3))
    assert found["psim"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert found["psim_std"] == pytest.approx(float(error.std(correction=0)), rel=1e-3)
    assert found["lpips"] == pytest.approx(float((original.float() - rebuilt.float()).abs().mean() / 127.5), rel=1e-5)


def test_any_split_gives_the_same_numbers() -> None:
    original, rebuilt = images()
    assert measured(original, rebuilt, 5) == pytest.approx(measured(original, rebuilt, 1), rel=1e-6)


def test_edges() -> None:
    original, rebuilt = images()
    assert measured(original, original)["psnr"] == pytest.approx(100.0)
    blank = torch.full_like(original, 255)
    assert "psnr_object" not in measured(blank, rebuilt)  # no object pixel: no number
    without = ReconstructionMeasures(background=None)
    without.update(original, rebuilt)
    assert set(without.compute()) == {"psnr", "psnr_std", "ssim", "ssim_std"}


def test_single_image_batches_have_ssim() -> None:
    original, rebuilt = images()
    measures = ReconstructionMeasures()
    measures.update(original[:1], rebuilt[:1])
    assert 0.0 < measures.compute()["ssim"] < 1.0


def test_latent_statistics_are_those_of_drawn_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 2, 16, 16, generator=generator) * torch.tensor([2.0, 0.5])[:, None, None] + 1.0
    logvar = torch.full_like(mean, math.log(0.25))
    statistics = LatentStatistics(2)
    for part in range(0, 64, 16):
        statistics.update(Posterior(mean[part : part + 16], logvar[part : part + 16]))
    found = statistics.compute()
    drawn = Posterior(mean, logvar).sample(torch.randn(mean.shape, generator=generator))
    for channel in range(2):
        assert found[f"latent_std/{channel}"] == pytest.approx(float(drawn[:, channel].std()), rel=0.02)
        assert found[f"latent_mean/{channel}"] == pytest.approx(float(mean[:, channel].mean()), abs=1e-4)
        assert found[f"latent_max/{channel}"] == pytest.approx(float(mean[:, channel].max()))
    assert found["latent_std"] == pytest.approx(float(drawn.std()), rel=0.02)


def test_codebook_use() -> None:
    even, single = torch.tensor([2, 2, 2, 2, 0, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 0, 3, 0, 0])
    names = ("codebook_use", "codebook_perplexity", "codebook_entropy")
    assert codebook_use(even) == pytest.approx(dict(zip(names, (0.5, 4.0, 2.0), strict=True)))
    assert codebook_use(single) == pytest.approx(dict(zip(names, (0.125, 1.0, 0.0), strict=True)))
