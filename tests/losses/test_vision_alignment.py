"""Alignment with a frozen encoder against numbers of the official VA-VAE program."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.contracts import Reconstruction
from ldmlab.errors import InputError
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.vision_alignment import Encoded, VisionAlignment, marginal_cosine, marginal_distances
from modern_cases import assert_near, recorded

TENSORS, CASES = recorded("lightningdit/vavae")


class Recorded:
    """An encoder that gives the recorded features, at the size asked for."""

    name, weights_hash, width = "recorded", "none", 16

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __call__(self, images: Tensor) -> Tensor:
        return F.interpolate(self.features, size=images.shape[-1] // 2)


def alignment(case: str, dtype: torch.dtype = torch.float32) -> VisionAlignment:
    """With the case's options; the projection changes nothing."""
    given = CASES[case]["LPIPSWithDiscriminator"]
    names = {"distmat_margin": "distance_margin", "cos_margin": "cosine_margin", "distmat_weight": "distance_weight"}
    names |= {"cos_weight": "cosine_weight", "vf_weight": "weight", "adaptive_vf": "adaptive"}
    made = VisionAlignment(
        encoder=Recorded(TENSORS["aux_feature"].to(dtype)),
        latent_channels=16,
        **{names[k]: v for k, v in given.items()},
    ).to(dtype)
    nn.init.dirac_(made.projection.weight)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_official_losses_and_their_gradients(case: str, dtype: torch.dtype) -> None:
    made = alignment(case, dtype)
    latents = TENSORS["z"].to(dtype).requires_grad_()
    features = TENSORS["aux_feature"].to(dtype)
    loss = made.cosine_weight * marginal_cosine(latents, features, made.cosine_margin)
    loss = loss + made.distance_weight * marginal_distances(latents, features, made.distance_margin)
    assert_near(loss, TENSORS[f"{case}.vf_loss"])
    assert_near(torch.autograd.grad(loss, latents)[0], TENSORS[f"{case}.grad_z"])


@pytest.mark.parametrize("case", CASES)
def test_official_weight_and_gradient_of_an_encoder(case: str) -> None:
    picture, layer = TENSORS["picture"], TENSORS["enc_last"].clone().requires_grad_()
    latents = F.conv2d(picture, layer, stride=2)
    decoded = F.interpolate(F.conv2d(latents, TENSORS["dec"]), scale_factor=2)
    loss = AutoencoderLoss(
        penalty_weights={}, lpips_weight=0.0, reduction="sum_per_image", alignment=alignment(case)
    )  # fmt: skip
    given = Reconstruction(decoded, {}, latents=latents)
    total, terms = loss.autoencoder(picture, given, layer, 0, Encoded(picture, layer))
    for name, key in (("alignment", "vf_loss"), ("alignment/weight", "vf_weight"), ("reconstruction", "nll_loss")):
        assert_near(terms[name], TENSORS[f"{case}.encoder.{key}"])
    assert_near(total, TENSORS[f"{case}.encoder.total"])
    assert_near(torch.autograd.grad(total, layer)[0], TENSORS[f"{case}.encoder.grad"])


def test_the_encoder_is_neither_trained_nor_saved() -> None:
    class Frozen(nn.Linear):
        name, weights_hash, width = "frozen", "none", 4

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(F.avg_pool2d(images, 4).movedim(1, -1)).movedim(-1, 1)

    made = VisionAlignment(encoder=Frozen(3, 4), latent_channels=2)  # type: ignore[arg-type]
    assert list(made.state_dict()) == ["projection.weight"] == [name for name, _ in made.named_parameters()]
    made.to(torch.float64)
    assert made.encoder.weight.dtype == torch.float64  # type: ignore[attr-defined]
    assert made(torch.randn(2, 3, 16, 16).double(), torch.randn(2, 2, 8, 8).double()).isfinite()  # 4 x 4 resampled


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"weight": -1.0}, {}, "would push the latents away"),
        ({"cosine_margin": -1.0}, {}, "choose margins of 0 to below 2"),
        ({"distance_margin": 2.0}, {}, "choose margins of 0 to below 2"),
        ({"cosine_weight": 0.0, "distance_weight": 0.0}, {}, "a weight above 0, or alignment=none"),
        ({}, {"latents": None}, "whose reconstruct.. gives its latents"),
        ({}, {"latents": torch.zeros(1, 16, 4, 4)}, "which stage.trained freezes"),
        ({}, {"last_layer": None}, "adaptive=true needs a first stage with encoder_last_layer"),
    ],
)
def test_what_cannot_be_aligned(options: dict[str, Any], given: dict[str, Any], message: str) -> None:
    picture, latents = TENSORS["picture"][:1], TENSORS["z"][:1].requires_grad_()
    with_latents = Reconstruction(picture, {}, latents=given.get("latents", latents))
    encoded, encoder = Encoded(picture, given.get("last_layer", latents)), Recorded(TENSORS["aux_feature"][:1])
    with pytest.raises(InputError, match=message):
        VisionAlignment(encoder=encoder, latent_channels=16, **options).weighted(picture.sum(), with_latents, encoded)
