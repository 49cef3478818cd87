"""The adversary: hinge, adaptive weight, start steps, and a discriminator that no split of the batch can change."""

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from conf_files import conf_names, conf_node
from ldmlab.errors import InputError
from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.patch_discriminator import PatchDiscriminator


def adversary(**options: float) -> Adversary:
    chosen: dict[str, float] = {"weight": 0.5, "discriminator_start": 0, "adversary_start": 0} | options
    return Adversary(discriminator=PatchDiscriminator(8, 2), **chosen)  # type: ignore[arg-type]


def test_weight_starts_and_ramps() -> None:
    plain = adversary(discriminator_start=5, adversary_start=10)
    assert [plain.trains_at(step) for step in (4, 5, 6)] == [False, True, True]
    assert [plain.weight_at(step) for step in (9, 10, 11)] == [0.0, 0.5, 0.5]
    ramped = adversary(adversary_start=10, ramp_steps=4)
    assert [ramped.weight_at(step) for step in (9, 10, 11, 13, 14)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    with pytest.raises(InputError, match="adversary_start=3"):
        adversary(discriminator_start=5, adversary_start=3)


def test_hinge() -> None:
    class Logit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(1, 2, 3))

    player = Adversary(discriminator=Logit(), weight=1.0, discriminator_start=0, adversary_start=0)
    real, fake = torch.full((2, 3, 4, 4), 0.25), torch.full((2, 3, 4, 4), -0.5)
    loss, terms = player.discriminator_loss(real, fake)
    torch.testing.assert_close(loss, torch.tensor(0.5 * (0.75 + 0.5)))
    torch.testing.assert_close(terms["logits_fake"], torch.tensor(-0.5))
    torch.testing.assert_close(player.generator_loss(fake)[0], torch.tensor(0.5))
    confident = player.discriminator_loss(real * 8, fake * 4)[0]
    torch.testing.assert_close(confident, torch.tensor(0.0))


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    player = adversary()
    layer = torch.ones(3, 2, 3, 3, requires_grad=True)
    ratio = player.adaptive_weight(3.0 * layer.sum(), -0.5 * layer.sum(), layer)
    norm = layer.numel() ** 0.5
    torch.testing.assert_close(ratio, torch.tensor(3.0 * norm / (0.5 * norm + 1e-4)))
    assert not ratio.requires_grad
    flat = player.adaptive_weight(3.0 * layer.sum(), 0.0 * layer.sum(), layer)
    torch.testing.assert_close(flat, torch.tensor(1e4))  # its limit
    player.adaptive = False
    torch.testing.assert_close(player.adaptive_weight(layer.sum(), layer.sum(), layer), torch.tensor(1.0))


def test_adaptive_weight_behind_float16_takes_the_scale_of_the_losses() -> None:
    player, layer = adversary(), torch.ones(1, requires_grad=True)

    def weight(scale: float | None) -> Tensor:
        player.loss_scale = None if scale is None else torch.tensor(scale)
        output = layer.half().float()  # gradients on their way back to the layer are float16
        return player.adaptive_weight(1e-8 * output.sum(), output.sum(), layer)

    assert weight(None) == 0  # below the smallest float16
    torch.testing.assert_close(weight(2.0**12), torch.tensor(1e-8), rtol=0.02, atol=0)  # 12 bits above it
    assert weight(2.0**17).isnan()  # beyond the largest


def test_discriminator_judges_each_image_by_itself() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(16, 3)
    images = torch.randn(4, 3, 32, 32)
    together, apart = network(images), torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    assert together.shape == (4, 1, 2, 2)
    assert network(torch.randn(1, 3, 24, 24)).isfinite().all()
    with pytest.raises(InputError, match="16x16 are too small"):
        network(torch.randn(1, 3, 16, 16))
    with pytest.raises(InputError, match=r"discriminator\.norm=batch"):
        PatchDiscriminator(norm="batch")


def test_released_discriminator_size() -> None:
    """Four-by-four kernels 3-64-128-256-512-1; a bias at both ends, two numbers a channel for the norms between."""
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1)
    expected = kernels + 64 + 1 + 2 * (128 + 256 + 512)
    for norm in ("group", "sync_batch"):
        assert sum(p.numel() for p in PatchDiscriminator(64, 3, norm).parameters()) == expected


@pytest.mark.parametrize("name", conf_names("loss"))
def test_every_loss_file_builds(name: str) -> None:
    options = conf_node("loss", name)
    lpips = nn.Identity() if options["lpips_weight"] else None
    assert isinstance(instantiate(options, lpips=lpips), AutoencoderLoss)
