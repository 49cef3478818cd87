"""Images, masks and label maps beside the latent."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.conditioners.mask import Mask, MaskedLatent
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError


def no_encode(pixels: Tensor) -> Tensor:
    raise AssertionError("this needs no latents")


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_looking_up_equals_one_hot_maps(method: str, bias: bool, size: tuple[int, int]) -> None:
    rescaler = SpatialRescaler(7, 3, method=method, bias=bias)
    segmentation = labels(7, 2, *size)
    expected = rescaler.rescale(F.one_hot(segmentation, 7).movedim(-1, 1).float())
    given = rescaler({"segmentation": segmentation}, no_encode)
    assert given.shape == (2, 3, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)


def test_halving_bilinearly_is_the_mean_of_four() -> None:
    rescaler = SpatialRescaler(7, None, stages=1)
    segmentation = labels(7, 2, 8, 8)
    maps = rescaler({"segmentation": segmentation.to(torch.uint8)}, no_encode)
    torch.testing.assert_close(maps, F.avg_pool2d(F.one_hot(segmentation, 7).movedim(-1, 1).float(), 2))
    assert not list(rescaler.parameters())
    assert rescaler.width(LatentSpec(4, 4, 4, 2)) == 7


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(InputError, match=r"segmentation 0 \.\. 7 does not fit conditioner\.classes=7"):
        SpatialRescaler(7)({"segmentation": torch.tensor([[[0, 7]]])}, no_encode)
    with pytest.raises(InputError, match="method=lanczos"):
        SpatialRescaler(7, method="lanczos")


def test_low_resolution_is_given_as_it_is() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    given = LowResolution()({"low_resolution": image}, no_encode)
    torch.testing.assert_close(given.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_mask_is_nearest_neighbour() -> None:
    """Of every f x f pixels the first decides, as in the official script's interpolation."""
    mask = labels(2, 2, 1, 8, 12).to(torch.uint8)
    given = Mask(4)({"mask": mask}, no_encode)
    assert torch.equal(given, 2.0 * mask[:, :, ::4, ::4] - 1)
    stable = Mask(4, keep=0.0)({"mask": mask}, no_encode)
    assert torch.equal(stable, mask[:, :, ::4, ::4].float())
    assert torch.equal(Mask(4).null({"mask": mask}, no_encode), torch.ones(2, 1, 2, 3))
    with pytest.raises(InputError, match=r"keep=1\.0 equals"):
        Mask(4, keep=1.0)


@pytest.mark.parametrize("hole", [-1.0, 0.0])
def test_masked_latent_encodes_the_image_with_holes(hole: float) -> None:
    seen: list[Tensor] = []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels

    image, mask = labels(256, 2, 3, 4, 4).to(torch.uint8), labels(2, 2, 1, 4, 4).to(torch.uint8)
    masked = MaskedLatent(hole)
    given = masked({"image": image, "mask": mask}, encode)
    inside = mask.bool().expand_as(image)
    assert (given[inside] == hole).all()
    assert torch.equal(given[~inside], image[~inside] / 127.5 - 1)
    assert (masked.null({"image": image, "mask": mask}, encode) == hole).all()
    assert masked.width(LatentSpec(4, 4, 4, 1)) == 4
    assert [tuple(pixels.shape) for pixels in seen] == [(2, 3, 4, 4)] * 2
    with pytest.raises(InputError, match=r"hole=-2\.0 is no pixel"):
        MaskedLatent(-2.0)
