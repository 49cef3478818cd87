"""Low-resolution images beside latents of their own size, and enlarged beside pixels."""

import pytest
import torch
from torch import Tensor

from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.errors import InputError


def encode(images: Tensor) -> Tensor:
    raise AssertionError("a low-resolution image is not encoded")


def test_a_small_image_is_enlarged_for_a_model_of_pixels() -> None:
    small = torch.arange(0, 2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    as_it_is, large = LowResolution(), LowResolution(enlarge=4)
    assert as_it_is({"low_resolution": small}, encode).shape == (2, 3, 4, 4)
    image = large({"low_resolution": small}, encode)
    assert image.shape == (2, 3, 16, 16)
    assert image.min() >= -1
    flat = torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)
    assert torch.allclose(large({"low_resolution": flat}, encode), torch.full((1, 3, 16, 16), 51 / 127.5 - 1))
    assert torch.equal(large.null({"low_resolution": flat}, encode), torch.zeros(1, 3, 16, 16))


def test_an_enlargement_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="enlarge=0 must be at least 1"):
        LowResolution(enlarge=0)
