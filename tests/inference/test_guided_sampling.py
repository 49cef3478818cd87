"""Super-resolution guided to its low-resolution images, through a quantising decoder, by both distances."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from ldmlab.app.guiders import image_guider
from ldmlab.backbones.unet import UNet
from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.diffusion.guidance import shrunk, squared_error
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.first_stages.vq import VQModel
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.interop import published_weights
from ldmlab.nn.lpips import LPIPS
from ldmlab.nn.pixels import to_float


def model() -> LoadedModel:
    """x2 to 32 px: latents of 16 x 16, told images of 16 x 16."""
    torch.manual_seed(0)
    stage = VQModel(
        channel_mult=[1, 2], latent_channels=3, codebook_size=64, channels=8, num_res_blocks=1, norm_groups=4
    )
    nn.init.normal_(stage.quantiser.codebook.weight)
    unet = UNet(
        in_channels=6, out_channels=3, model_channels=32, channel_mult=[1], num_res_blocks=1,
        attention_downsampling=[], heads=2,
    )  # fmt: skip
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    diffusion = LatentDiffusion(
        stage, LatentScale(1.2), unet, {"low_resolution": LowResolution()}, Schedule(), EpsPrediction(),
        guidance_trained=False,
    )  # fmt: skip
    return LoadedModel(diffusion, image_size=32, info={})


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of fetched weights with a VGG16 drawn at random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    network = torchvision.models.vgg16(weights=None, init_weights=False)
    torch.save(network.features.state_dict(), folder / published_weights.WEIGHTS["lpips"].file)
    return folder


def low_resolution(size: int = 16) -> Tensor:
    """uint8 (2, size, size, 3)."""
    return torch.randint(60, 200, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def drawn(made: LoadedModel, **options: object) -> Tensor:
    """Pixels (2, 3, 32, 32) in [-1, 1]."""
    images = made.sample(low_resolution=low_resolution(), steps=10, seed=1, **options)
    return to_float(images.permute(0, 3, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weight"), [("squared", 0.1), ("lpips", 100.0)])
def test_guided_samples_are_nearer_to_their_own_images(
    name: str, weight: float, lpips_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_weights, "weights_folder", lambda: lpips_folder)
    made, aim = model(), to_float(low_resolution().permute(0, 3, 1, 2))
    measure = squared_error if name == "squared" else LPIPS(lpips_folder / published_weights.WEIGHTS["lpips"].file)
    free = drawn(made)
    made.with_guiders(image_guider(name, made, weight))
    assert made.reads == {"low_resolution"}
    guided = drawn(made)
    before, after = (measure(shrunk(images, (16, 16)), aim) for images in (free, guided))
    assert (after < 0.85 * before).all()
    assert (drawn(made, batch_size=1) - guided).abs().max() < 0.03  # three steps of eight bits


def test_decoding_has_gradients_through_the_quantiser() -> None:
    space = model().diffusion
    latents = torch.randn(1, 3, 16, 16, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(space.pixels(latents).square().sum(), latents)
    assert gradient.abs().max() > 0
    assert not space.decode(latents).requires_grad
    torch.testing.assert_close(space.decode(latents), space.pixels(latents))


def test_half_precision_and_inference_leave_the_guide_its_gradient() -> None:
    made = model()
    free = drawn(made)
    made.with_guiders(image_guider("squared", made, 0.01)).in_precision("bfloat16")
    assert (drawn(made) - free).abs().max() > 0.02
    assert not made.diffusion.backbone.conv_in.weight.requires_grad


def test_images_too_small_for_lpips(lpips_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_weights, "weights_folder", lambda: lpips_folder)
    made = model()
    made.with_guiders(image_guider("lpips", made))
    settings = made.resolved(SampleSettings(steps=2, size=16))
    rows = [{"low_resolution": image} for image in low_resolution(8)]
    with pytest.raises(InputError, match="LPIPS compares images of 16 px and more, not 8x8"):
        made.sample_batch(rows, settings, 0)
