"""Behaviour that every first stage shares, and the gradients of the quantiser."""

import re
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from conf_files import conf_names, conf_node
from ldmlab.errors import InputError
from ldmlab.first_stages.deep_compression import DeepCompressionAutoencoder
from ldmlab.first_stages.deep_compression_blocks import Down, Up, relu_attention
from ldmlab.first_stages.identity import Identity
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.vq import VQModel
from ldmlab.instantiate import instantiate as built

TINY: dict[str, Any] = {
    "channels": 8,
    "channel_mult": [1, 2],
    "latent_channels": 3,
    "num_res_blocks": 1,
    "norm_groups": 4,
}


@pytest.mark.parametrize("name", conf_names("first_stage", "frozen_f16", "frozen_f8_small"))
def test_every_first_stage_file_has_the_shapes_it_says(name: str) -> None:
    options = conf_node("first_stage", name)
    with torch.device("meta"):
        stage = instantiate(options)
        images = torch.zeros(2, 3, 128, 192)
        f, channels = stage.downsampling, stage.latent_channels
        if factor := re.search(r"_f(\d+)", name):
            assert f == int(factor[1])
        if name[0] in "kv":
            assert stage.last_layer is stage.decoder.output.weight
        posterior = stage.encode(images)
        assert posterior.mean.shape == (2, channels, 128 // f, 192 // f)
        assert stage.decode(posterior.mean).shape == images.shape
        given = stage.reconstruct(images, torch.zeros_like(posterior.mean))
        assert given.images.shape == images.shape
        if given.codes is not None:
            assert given.codes.shape == (2, 128 // f, 192 // f)


DEEP: dict[str, Any] = {
    "latent_channels": 8,
    **{f"{side}_block_out_channels": [8, 16, 32] for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": [0, 1, 1] for side in ("encoder", "decoder")},
    **{f"{side}_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"] for side in ("encoder", "decoder")},
    **{f"{side}_qkv_multiscales": [[], [], [3]] for side in ("encoder", "decoder")},
    "attention_head_dim": 8,
}


def test_image_size_that_f_does_not_divide() -> None:
    stage = KLAutoencoder(**TINY | {"channel_mult": [1, 2, 2]})
    with pytest.raises(InputError, match=r"image size 30x64 is not divisible .* f=4; choose a multiple of 4, .* 28x64"):
        stage.encode(torch.zeros(1, 3, 30, 64))


def test_options_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"attention_downsampling=.* names 3"):
        KLAutoencoder(**TINY, attention_downsampling=[3])
    with pytest.raises(InputError, match="norm_groups=3"):
        KLAutoencoder(**TINY | {"norm_groups": 3})
    with pytest.raises(InputError, match="initialisation=she"):
        KLAutoencoder(**TINY, initialisation="she")
    with pytest.raises(InputError, match="no weights to train"):
        _ = Identity().last_layer


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decoder_block_out_channels": [8, 16]}, "3 levels of the encoder, but decoder_block_out_channels"),
        ({"encoder_layers_per_block": [1, 0, 1]}, r"encoder_layers_per_block=\[1, 0, 1\] leaves a level without"),
        ({"encoder_qkv_multiscales": [[]]}, r"3 levels of the encoder, but kernels=\[\[\]\]; give one a level"),
        ({"decoder_block_types": "Block"}, "decoder kinds=Block is unknown; choose one of ResBlock"),
        ({"decoder_norm_types": "layer_norm"}, "decoder norms=layer_norm is unknown"),
        ({"decoder_act_fns": "tanh"}, "decoder activations=tanh is unknown"),
        ({"latent_channels": 5}, "32 channels are no multiple of 5"),
        ({"encoder_block_out_channels": [8, 24, 40]}, "96 channels are no multiple of 40"),
        ({"attention_head_dim": 64}, "attention_head_dim=64 is wider than a level of 32"),
        ({"downsample_block_type": "pool"}, "downsample_block_type=pool is unknown"),
    ],
)
def test_deep_compression_that_cannot_be(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeepCompressionAutoencoder(**DEEP | changed)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("latent_channels", -1), ("channels", -1), ("norm_groups", 0), ("bottleneck_channels", -2)),
        *(("codebook_size", 0), ("codebook_size", -1), ("dropout", 2.5), ("dropout", -0.5)),
    ],
)
def test_numbers_that_no_part_can_be_built_with(option: str, value: float) -> None:
    kind = {"_target_": "ldmlab.first_stages.vq.VQModel", "codebook_size": 8}
    with pytest.raises(InputError, match=f"first_stage.{option}={value}"):
        built({**kind, **TINY, option: value}, where="first_stage")


@pytest.mark.parametrize("kind", [("pixel_unshuffle", "pixel_shuffle"), ("conv", "interpolate")])
@torch.no_grad()
def test_shortcuts_carry_the_image_past_silent_convolutions(kind: tuple[str, str]) -> None:
    """With every convolution of a resampling at zero, 2 x 2 pixels are means of channels there, and spread back."""
    down, up = Down(4, 8, kind[0], shortcut=True), Up(8, 4, kind[1], shortcut=True)
    for module in (down, up):
        for parameter in module.parameters():
            parameter.zero_()
    x = torch.randn(2, 4, 6, 4)
    pixels = x.unflatten(2, (3, 2)).unflatten(4, (2, 2))  # (B, C, h, 2, w, 2)
    rows = pixels.mean(dim=5).permute(0, 1, 3, 2, 4).flatten(1, 2)  # neighbours in a row
    torch.testing.assert_close(down(x), rows)
    torch.testing.assert_close(up(down(x)), pixels.mean(dim=5, keepdim=True).expand_as(pixels).reshape(x.shape))
    assert not Down(4, 8, kind[0], shortcut=False)(x).equal(down(x))


def test_shortcut_false_is_a_network_without_any() -> None:
    stage = DeepCompressionAutoencoder(**DEEP, shortcut=False)
    assert not any(getattr(module, "shortcut", False) for module in stage.modules())
    assert not stage.encoder.out_shortcut
    assert not stage.decoder.in_shortcut
    same = {name: tensor.shape for name, tensor in DeepCompressionAutoencoder(**DEEP).state_dict().items()}
    assert same == {name: tensor.shape for name, tensor in stage.state_dict().items()}


def test_linear_attention_is_its_sum_over_positions() -> None:
    q, k, v = torch.randn(3, 2, 3, 4, 5).unbind(0)
    weights = torch.einsum("bhdi,bhdj->bhij", q.relu(), k.relu())
    expected = torch.einsum("bhij,bhdj->bhdi", weights / weights.sum(3, keepdim=True).clamp_min(1e-15), v)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(relu_attention(q, k, v), expected, atol=1e-5, rtol=1e-4)


def test_identity_changes_nothing() -> None:
    images = torch.randn(2, 3, 5, 7)
    stage = Identity()
    assert torch.equal(stage.decode(stage.encode(images).sample(torch.randn_like(images))), images)


def test_posterior_noise_and_range() -> None:
    torch.manual_seed(0)
    stage = KLAutoencoder(**TINY, initial_logvar=-100.0)
    images = torch.randn(2, 3, 8, 8)
    posterior = stage.encode(images)
    assert posterior.logvar is not None
    assert torch.all(posterior.logvar == -30)  # clamped
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(stage.reconstruct(images, noise).images, stage.decode(posterior.sample(noise)))


def test_he_initialisation_keeps_attention() -> None:
    torch.manual_seed(0)
    plain = KLAutoencoder(**TINY)
    torch.manual_seed(0)
    he = KLAutoencoder(**TINY, initialisation="he")
    torch.testing.assert_close(he.encoder.input.weight, plain.encoder.input.weight * 6**0.5)
    torch.testing.assert_close(he.encoder.middle.attention.query.weight, plain.encoder.middle.attention.query.weight)
    wide = KLAutoencoder(**TINY | {"channels": 64}, initialisation="he").decoder.levels[0].blocks[0].conv1.weight
    assert float(wide.detach().std()) == pytest.approx((2 / (wide[0].numel())) ** 0.5, rel=0.02)


def vq() -> VQModel:
    torch.manual_seed(0)
    stage = VQModel(**TINY, codebook_size=16)
    nn.init.normal_(stage.quantiser.codebook.weight)
    return stage


def test_quantiser_gradients_follow_the_released_convention() -> None:
    """The encoder's side weighs 1, the codebook's 0.25, and the reconstruction's gradient passes straight through."""
    quantiser = vq().quantiser
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    given = quantiser(latents)
    codebook = quantiser.codebook.weight
    to_latents, to_codebook = torch.autograd.grad(given.penalties["codebook"], (latents, codebook), retain_graph=True)
    chosen = codebook[given.codes].movedim(-1, 1)
    difference = (latents - chosen).detach()
    torch.testing.assert_close(to_latents, 2 * difference / latents.numel())
    expected = torch.zeros_like(codebook)
    pull = -0.25 * 2 * difference / latents.numel()
    expected.index_add_(0, given.codes.flatten(), pull.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(to_codebook, expected)
    weights = torch.randn_like(latents)
    (straight,) = torch.autograd.grad((given.latents * weights).sum(), latents)
    torch.testing.assert_close(straight, weights)


@pytest.mark.parametrize(
    "make",
    [vq, lambda: KLAutoencoder(**TINY), lambda: DeepCompressionAutoencoder(**DEEP)],
    ids=["vq", "kl", "deep"],
)
@torch.no_grad()
def test_half_precision_weights_take_float32(make: Any) -> None:
    stage, images = make(), torch.rand(2, 3, 8, 8) * 2 - 1
    latents = stage.encode(images).mean
    exact, rough = stage.decode(latents), stage.bfloat16()
    assert rough.encode(images).mean.dtype == torch.float32
    assert (rough.encode(images).mean - latents).abs().mean() < 0.05 * latents.abs().mean()
    if not isinstance(stage, VQModel):  # codes of a VQ model may flip
        assert (rough.decode(latents).float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert rough.decode(latents).dtype == torch.bfloat16


def test_search_is_exact_in_parts_and_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser = vq().quantiser
    vectors = torch.randn(50, 3)
    expected = torch.cdist(vectors, quantiser.codebook.weight).argmin(dim=1)
    monkeypatch.setattr("ldmlab.first_stages.quantiser._DISTANCES_AT_ONCE", 7 * 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantiser.nearest(vectors), expected)


def test_vq_latent_is_before_the_quantiser_and_decoding_quantises() -> None:
    stage = vq()
    images = torch.randn(1, 3, 8, 8)
    latents = stage.encode(images).mean
    quantised = stage.quantiser(latents)
    assert not torch.allclose(latents, quantised.latents)
    torch.testing.assert_close(stage.decode(latents), stage.decode(quantised.latents))
    given = stage.reconstruct(images, torch.zeros(()))
    torch.testing.assert_close(given.images, stage.decode(latents))
    assert given.codes is not None
    assert torch.equal(given.codes, quantised.codes)


def test_attention_is_the_official_formula() -> None:
    """softmax(q k^T / sqrt(C)) v over positions, written out."""
    stage = KLAutoencoder(**TINY, attention_downsampling=[2])
    layer = stage.encoder.levels[1].attentions[0]
    x = torch.randn(2, 16, 5, 3)
    hidden = layer.norm(x)
    query, key, value = (conv(hidden).flatten(2) for conv in (layer.query, layer.key, layer.value))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", query, key) / 4.0, dim=2)
    expected = x + layer.out(torch.einsum("bij,bcj->bci", weights, value).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-4)
