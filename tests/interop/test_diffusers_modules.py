"""Networks that diffusers builds, in every variant we can be, give the same outputs here; others are refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.interop import diffusers
from ldmlab.interop.compvis.compvis_networks import first_stage_params_of
from ldmlab.interop.diffusers import diffusers_first_stages

peer = pytest.importorskip("diffusers")

SMALL = {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 8}
CROSS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
PIXELS = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
}
THREE = {
    "block_out_channels": [32, 32, 96],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
}
CONDITION = {
    "heads": {},
    "widths_of_heads": {"attention_head_dim": [2, 4], "use_linear_projection": True},
    "three_layers": {"layers_per_block": 3, "transformer_layers_per_block": 2},
    "gap_between_levels": {**THREE, "layers_per_block": 2},
    "class_table": {"num_class_embeds": 5},
    "projected_vector": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "sines_first": {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0},
}
PUBLISHED_DDPM = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
PLAIN = {
    "published_ddpm": {**PUBLISHED_DDPM, "attention_head_dim": None, "sample_size": 32},
    "right_and_bottom": {"downsample_padding": 0},
    "epsilon": {"norm_eps": 1e-4},
    "frequencies": {"freq_shift": 1},
    "width_of_heads": {},
    "one_head": {"attention_head_dim": None},
    "two_layers": {"layers_per_block": 2, "in_channels": 6},
    "residual": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
    },
    "residual_by_name": {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "upsample_type": "resnet",
    },
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "class_table": {"num_class_embeds": 5},
}
AUTOENCODERS = {
    "kl": ("AutoencoderKL", {}),
    "kl_without_quant_convs": ("AutoencoderKL", {"use_quant_conv": False, "use_post_quant_conv": False}),
    "kl_without_mid_attention": ("AutoencoderKL", {"mid_block_add_attention": False, "norm_num_groups": 16}),
    "kl_attention_in_levels": (
        "AutoencoderKL",
        {
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        },
    ),
    "kl_widths_between_multiples": ("AutoencoderKL", {"block_out_channels": [24, 40], "norm_num_groups": 8}),
    "vq": ("VQModel", {"num_vq_embeddings": 32, "latent_channels": 3}),
    "vq_other_width": ("VQModel", {"num_vq_embeddings": 32, "latent_channels": 6, "vq_embed_dim": 3}),
}
STAGE = {
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def made(kind: str, config: dict[str, Any]) -> nn.Module:
    """diffusers' module with weights of which none is zero."""
    torch.manual_seed(0)
    module = getattr(peer, kind)(**config).eval()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if parameter.mean() == 1 else 0.0, std=0.1)
    return module


def run_both(kind: str, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    theirs = made(kind, config)
    ours = diffusers.build_unet(dict(theirs.config), theirs.state_dict())
    torch.manual_seed(1)
    x, t = torch.randn(2, theirs.config.in_channels, 8, 8), torch.tensor([3.0, 700.0])
    slots: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    if "cross_attention_dim" in config:
        slots["tokens"] = given["encoder_hidden_states"] = torch.randn(2, 5, config["cross_attention_dim"])
    if "num_class_embeds" in config:
        given["class_labels"] = torch.tensor([4, 0])
        slots["vector"] = theirs.class_embedding(given["class_labels"])
    elif "class_embed_type" in config:
        slots["vector"] = given["class_labels"] = torch.randn(2, 12)
    with torch.no_grad():
        return ours(x, t, Conditioning(**slots)), theirs(x, t, **given).sample


@pytest.mark.parametrize("name", CONDITION)
def test_condition_model(name: str) -> None:
    mine, theirs = run_both("UNet2DConditionModel", SMALL | CROSS | CONDITION[name])
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
    assert theirs.std() > 0.1


@pytest.mark.parametrize("name", PLAIN)
def test_plain_model(name: str) -> None:
    mine, theirs = run_both("UNet2DModel", SMALL | PIXELS | PLAIN[name])
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
    assert theirs.std() > 0.1


def test_names_of_old_files() -> None:
    theirs = made("UNet2DModel", SMALL | PIXELS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = theirs.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    ours = diffusers.build_unet(dict(theirs.config), state)
    fresh = diffusers.build_unet(dict(theirs.config), theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder(name: str) -> None:
    kind, more = AUTOENCODERS[name]
    theirs: Any = made(kind, STAGE | more)
    ours: Any = diffusers.build_first_stage(dict(theirs.config), theirs.state_dict())
    torch.manual_seed(1)
    images = torch.randn(2, 3, 16, 16)
    found = theirs.encode(images)
    mine = ours.encode(images)
    if kind == "VQModel":
        torch.testing.assert_close(mine.mean, found.latents, atol=2e-5, rtol=0)
    else:
        torch.testing.assert_close(mine.moments(), found.latent_dist.parameters, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.decode(mine.mean), theirs.decode(mine.mean).sample, atol=2e-5, rtol=0)


def test_widths_between_multiples_come_back() -> None:
    """As diffusers' own; the official program's are multiples, and every width is a whole number."""
    config = STAGE | {"block_out_channels": [24, 40], "norm_num_groups": 8}
    node = diffusers_first_stages.arguments({"_class_name": "AutoencoderKL", **config})
    _, again = diffusers_first_stages.configuration(node, image_size=16, scaling_factor=1.0)
    assert again["block_out_channels"] == [24, 40]
    with pytest.raises(InputError, match="has no official counterpart"):
        first_stage_params_of({**node, "norm_groups": 32})
    _, official = first_stage_params_of({**node, "norm_groups": 32, "channel_mult": [1.0, 2.0]})
    assert [type(factor) for factor in official["ddconfig"]["ch_mult"]] == [int, int]  # widths of layers there
    with pytest.raises(InputError, match=r"channel_mult=\[1, 1.7\] with channels=24 gives widths that are no whole"):
        KLAutoencoder(channels=24, channel_mult=[1, 1.7], latent_channels=4, norm_groups=8)
    for none in (0, -1, math.nan):
        with pytest.raises(InputError, match="gives widths that are no whole numbers above 0"):
            KLAutoencoder(channels=24, channel_mult=[1, none], latent_channels=4, norm_groups=8)


REFUSED = [
    ({"norm_num_groups": 16}, "norm_num_groups=16"),
    ({"downsample_padding": 2}, "downsample_padding=2"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type=text_time"),
    ({"a_new_option": 3}, "a_new_option=3"),
    ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "SimpleCrossAttnDownBlock2D"),
    ({"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}, "symmetric"),
    ({"block_out_channels": [64, 96]}, "multiples of the first"),
    ({"transformer_layers_per_block": [1, 2]}, "differs between levels"),
    ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
    ({"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel is not supported"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_we_cannot_be_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        diffusers.build_unet(SMALL | CROSS | more)


def test_mixed_resampling_is_refused() -> None:
    with pytest.raises(InputError, match="mixes residual and plain"):
        diffusers.build_unet(SMALL | PIXELS | {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]})


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(InputError, match="neither heads nor their width"):
        diffusers.build_unet(SMALL | CROSS | {"attention_head_dim": [2, 2, 4], **THREE})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"norm_type": "spatial"}, "norm_type=spatial"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "other attention on the way up"),
        ({"latents_mean": [0.1] * 4}, "latents_mean"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny is not supported"),
    ],
)
def test_autoencoders_we_cannot_be_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        diffusers.build_first_stage(STAGE | more)


def test_half_precision_becomes_float32() -> None:
    theirs = made("AutoencoderKL", STAGE)
    state = {key: tensor.half() for key, tensor in theirs.state_dict().items()}
    ours = diffusers.build_first_stage(dict(theirs.config), state)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
