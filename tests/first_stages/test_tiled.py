"""First stages in parts: the result of the whole image, without a seam, with nothing larger than asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.contracts import Posterior
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.tiled import TiledFirstStage
from ldmlab.first_stages.vq import VQModel
from ldmlab.nn.tiling import spans

SMALL = {"latent_channels": 4, "channels": 8, "num_res_blocks": 1, "norm_groups": 4, "initialisation": "he"}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "kl_f4": (KLAutoencoder, {"channel_mult": (1, 2, 4)}),
    "kl_f8_attention": (KLAutoencoder, {"channel_mult": (1, 1, 2, 2), "attention_downsampling": (8,)}),
    "kl_f2_no_attention": (KLAutoencoder, {"channel_mult": (1, 2), "mid_attention": False}),
    "vq_f4": (VQModel, {"channel_mult": (1, 2, 4), "codebook_size": 64}),
}


def first_stage(kind: str) -> Any:
    torch.manual_seed(0)
    target, choices = KINDS[kind]
    stage = target(**SMALL, **choices).eval().requires_grad_(False)
    for norm in (m for m in stage.modules() if isinstance(m, nn.GroupNorm)):  # a forgotten weight or bias would show
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    return stage


def uneven(height: int, width: int) -> Tensor:
    """Two images whose halves have different contrast, so that parts have different statistics."""
    images = 2 * torch.rand(2, 3, height, width) - 1
    images[..., width // 2 :] *= 0.1
    return images


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 256], ids=["recomputed", "kept"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shared_norms_give_the_whole_image(kind: str, kept: int) -> None:
    stage = first_stage(kind)
    tiled = TiledFirstStage(stage, tile=32, kept_mib=kept)
    tiled.kept_bytes //= 2**20 if kept == 1 else 1  # one byte: no map is kept, as of a very large image
    images = uneven(80, 136)
    whole = stage.encode(images)
    part = tiled.encode(images)
    torch.testing.assert_close(part.mean, whole.mean, atol=2e-5, rtol=0)  # sums in another order
    if whole.logvar is not None:
        torch.testing.assert_close(part.logvar, whole.logvar, atol=2e-5, rtol=0)
    torch.testing.assert_close(tiled.decode(whole.mean), stage.decode(whole.mean), atol=2e-5, rtol=0)


@torch.no_grad()
def test_separate_norms_differ_from_the_whole_image() -> None:
    stage = first_stage("kl_f4")
    latents = stage.encode(uneven(64, 128)).mean
    far = (TiledFirstStage(stage, 32, norms="separate").decode(latents) - stage.decode(latents)).abs().mean()
    assert far > 10 / 127.5  # else the test above would show nothing


def seam(images: Tensor, borders: list[int], factor: int) -> float:
    """Mean jump across the borders over the mean jump across other columns of the same phase of the upsampling."""
    jumps = (images[..., 1:] - images[..., :-1]).abs().mean((0, 1, 2))[factor - 1 :: factor]
    at = torch.zeros(len(jumps), dtype=torch.bool)
    at[[border // factor - 1 for border in borders]] = True
    return float(jumps[at].mean() / jumps[~at].mean())


def smooth_latents(size: int) -> Tensor:
    torch.manual_seed(1)
    return F.interpolate(torch.randn(4, 4, 8, 8), (size, size), mode="bicubic")


@pytest.mark.slow
@torch.no_grad()
def test_no_seam() -> None:
    stage, size, tile, f = first_stage("kl_f4"), 256, 64, 4
    latents = smooth_latents(size // f)
    whole = stage.decode(latents)
    parts = [stage.decode(part) for part in latents.split(tile // f, dim=3)]
    straight = list(range(tile, size, tile))
    assert seam(torch.cat(parts, dim=3), straight, f) > 2 * seam(whole, straight, f)  # the test sees a seam
    shared = TiledFirstStage(stage, tile).decode(latents)
    assert seam(shared, straight, f) == pytest.approx(seam(whole, straight, f), abs=1e-3)
    overlapping = sorted({f * end for span in spans(size // f, 16, 4) for end in span} - {0, size})
    separate = TiledFirstStage(stage, tile, norms="separate").decode(latents)
    assert seam(separate, overlapping, f) < 1.1


@torch.no_grad()
def test_no_map_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, largest = first_stage("kl_f4"), 0
    convolve = F.conv2d

    def watched(x: Tensor, *args: Any, **options: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, x.shape[2] * x.shape[3])
        return convolve(x, *args, **options)

    monkeypatch.setattr(F, "conv2d", watched)
    latents = torch.randn(1, 4, 64, 64)
    TiledFirstStage(stage, 32, kept_mib=4).decode(latents)  # all maps between blocks are kept: narrow borders
    features = 64 * 64  # attention in the middle sees the whole latent
    assert largest <= max(features, (32 + 16) ** 2)


def test_small_images_go_through_whole() -> None:
    stage = first_stage("vq_f4")
    images = uneven(32, 24)
    assert torch.equal(TiledFirstStage(stage, 32).encode(images).mean, stage.encode(images).mean)


def test_norms_are_free_again_after_a_fault() -> None:
    stage = first_stage("kl_f4")
    latents = torch.randn(1, 4, 16, 16)
    before = stage.decode(latents)
    broken = stage.decoder.output.forward
    stage.decoder.output.forward = lambda x: (_ for _ in ()).throw(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        TiledFirstStage(stage, 32).decode(latents)
    stage.decoder.output.forward = broken
    assert torch.equal(stage.decode(latents), before)


class Blocks(nn.Module):
    """A first stage of another make: means of 4 x 4 pixels."""

    downsampling, latent_channels = 4, 3

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 3) if norm else nn.Identity()

    def encode(self, images: Tensor) -> Posterior:
        return Posterior(F.avg_pool2d(self.norm(images), 4))

    def decode(self, raw_latents: Tensor) -> Tensor:
        return F.interpolate(raw_latents, scale_factor=4.0)


def test_first_stages_of_another_make() -> None:
    images = uneven(64, 96)
    for stage in (Blocks(norm=False), Identity()):
        tiled = TiledFirstStage(stage, 32)
        torch.testing.assert_close(tiled.encode(images).mean, stage.encode(images).mean)
        torch.testing.assert_close(tiled.decode(images), stage.decode(images))
    with pytest.raises(InputError, match="supports KL and VQ first stages, not Blocks; choose separate"):
        TiledFirstStage(Blocks(norm=True), 32)
    assert TiledFirstStage(Blocks(norm=True), 32, norms="separate").encode(images).mean.shape == (2, 3, 16, 24)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tile": 30}, "tile=30 .* choose for instance 32"),
        ({"tile": 4}, "tile=4 .* choose for instance 8"),
        ({"norms": "none"}, "tile_norms=none is unknown"),
        ({"kept_mib": 0}, "kept_mib=0"),
    ],
)
def test_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TiledFirstStage(first_stage("kl_f4"), **choices)
