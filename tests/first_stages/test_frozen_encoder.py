"""First stages around a frozen encoder: normalised patches on the decoder's grid; only the decoder is trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.encoders import FrozenEncoder
from ldmlab.errors import InputError
from ldmlab.first_stages.frozen_encoder import RepresentationAutoencoder


class Averages(FrozenEncoder):
    """A projection of each of 4 x 4 patches' means."""

    name, width = "averages", 8

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 8, 1)
        self.train(False)

    def maps(self, images: Tensor) -> Tensor:
        return self.projection(F.adaptive_avg_pool2d(images, 4))


def first_stage() -> RepresentationAutoencoder:
    torch.manual_seed(0)
    return RepresentationAutoencoder(
        encoder=Averages(), channels=8, channel_mult=[1, 1, 1], num_res_blocks=1, norm_groups=4
    )


def test_latents_are_normalised_patches() -> None:
    made, images = first_stage().train(), torch.randn(2, 3, 16, 16)
    posterior = made.encode(images)
    assert posterior.logvar is None
    assert posterior.mean.shape == (2, 8, 4, 4)
    torch.testing.assert_close(posterior.mean.mean(dim=1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(posterior.mean.std(dim=1, correction=0), torch.ones(2, 4, 4), atol=1e-2, rtol=0)
    assert made.encode(torch.randn(2, 3, 32, 32)).mean.shape == (2, 8, 8, 8)  # resampled
    with pytest.raises(InputError, match="takes square images"):
        made.encode(torch.randn(1, 3, 16, 32))


def test_only_the_decoder_is_trained() -> None:
    made, images = first_stage().train(), torch.randn(2, 3, 16, 16)
    given = made.reconstruct(images, torch.empty(0), lambda latents: 0 * latents)
    assert given.penalties == {}
    assert torch.equal(given.images[0], given.images[1])  # what was changed is decoded
    given.images.mean().backward()
    trained = {name for name, p in made.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in made.named_parameters() if name.startswith("decoder.")}
    assert made.last_layer.grad is not None
    assert not made.encoder.training
    assert any(name.startswith("encoder.") for name in made.state_dict())  # a folder needs no other file
