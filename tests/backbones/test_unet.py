"""What the U-Net promises beside the official numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.nn.blocks import with_coordinates


def randomised(module: nn.Module) -> nn.Module:
    """Fresh weights end in zeros and would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)
    return module


def make(**changes: object) -> UNet:
    options = {"heads": 2, "context_width": 16, "attention_downsampling": [2], "num_res_blocks": 1} | changes
    unet = UNet(in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], **options)  # type: ignore[arg-type]
    randomised(unet)
    return unet


def inputs(size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return x, torch.tensor([3.0, 700.5]), Conditioning(tokens=tokens)


VARIANTS: dict[str, Callable[[], UNet]] = {
    "tokens": make,
    "residual_resampling": lambda: make(residual_resampling=True, scale_shift=True),
    "head_channels": lambda: make(heads=None, head_channels=16, transformer_depth=2),
    "coordinates": lambda: make(coordinates=True),
    "recomputed": lambda: make(gradient_checkpointing=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 3), (1, 1)])
@torch.no_grad()
def test_any_size(variant: str, size: tuple[int, int]) -> None:
    x, t, conditioning = inputs(size)
    out = VARIANTS[variant]()(x, t, conditioning)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_gives_equal_gradients(variant: str) -> None:
    unet, (x, t, conditioning) = VARIANTS[variant](), inputs()
    gradients = []
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(x, t, conditioning).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(unet.parameters()))  # none unused, as DDP wants
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_compiles_into_one_graph(variant: str, prepared: bool) -> None:
    unet, (x, t, conditioning) = VARIANTS[variant](), inputs()
    given = unet.prepare(conditioning) if prepared else conditioning
    torch.compiler.reset()  # graphs of other cases count towards its limit
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, given), unet(x, t, given))


def test_fresh_network_says_nothing() -> None:
    unet = UNet(4, 4, 32, [1, 2], 1, [2], heads=2, context_width=16)
    assert unet(*inputs()).abs().max() == 0


@torch.no_grad()
def test_bfloat16_autocast_is_close() -> None:
    unet, given = make(), inputs()
    exact = unet(*given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = unet(*given)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@torch.no_grad()
def test_half_precision_weights_take_float32() -> None:
    unet, given = make(vector_width=6), inputs()
    x, t, conditioning = given[0], given[1], Conditioning(tokens=given[2].tokens, vector=torch.ones(2, 6))
    exact = unet(x, t, conditioning)
    rough = unet.bfloat16()(x, t, conditioning)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@torch.no_grad()
def test_whole_and_fractional_times() -> None:
    unet, (x, _, conditioning) = make(), inputs()
    whole = unet(x, torch.tensor([3, 700]), conditioning)
    assert torch.equal(whole, unet(x, torch.tensor([3.0, 700.0], dtype=torch.float64), conditioning))
    assert not torch.equal(whole, unet(x, torch.tensor([3.5, 700.5]), conditioning))


@torch.no_grad()
def test_conditions_are_used() -> None:
    unet = make(vector_width=6)
    x, t, conditioning = inputs()
    tokens = conditioning.tokens
    assert tokens is not None
    given = Conditioning(tokens=tokens, vector=torch.ones(2, 6))
    base = unet(x, t, given)
    assert not torch.allclose(base, unet(x, t, Conditioning(tokens=tokens + 1, vector=given.vector)))
    assert not torch.allclose(base, unet(x, t, Conditioning(tokens=tokens, vector=torch.zeros(2, 6))))
    assert unet.accepts == {"tokens", "vector", "spatial"}


@pytest.mark.parametrize("recompute", [False, True])
def test_one_token_is_told_without_attention(recompute: bool) -> None:
    """The same token twice goes through attention, which must not tell the difference, nor gradients."""
    unet, (x, t, _) = make(transformer_depth=2, gradient_checkpointing=recompute), inputs()
    token = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2))
    found = {}
    for count in (1, 2):
        unet.zero_grad()
        out = unet(x, t, Conditioning(tokens=token.repeat(1, count, 1)))
        out.square().mean().backward()
        found[count] = out.detach(), {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=1e-4)
    assert len(found[1][1]) == len(list(unet.parameters()))  # none unused, as DDP wants


@torch.no_grad()
def test_a_table_of_classes_inside_the_official_network_is_a_vector_added_as_it_is() -> None:
    """label_emb: silu(time + row); a projection by the identity matrix gives the same."""
    x, t, conditioning = inputs()
    vector = torch.randn(2, 128, generator=torch.Generator().manual_seed(2))
    given = Conditioning(tokens=conditioning.tokens, vector=vector)
    plain, projected = make(vector_width=128, project_vector=False), make(vector_width=128)
    assert not any(name.startswith("vector.") for name in plain.state_dict())
    state = plain.state_dict() | {"vector.weight": torch.eye(128), "vector.bias": torch.zeros(128)}
    projected.load_state_dict(state)
    torch.testing.assert_close(plain(x, t, given), projected(x, t, given))
    with pytest.raises(InputError, match=r"project_vector=false adds vectors of 6 to a time vector of 128"):
        make(vector_width=6, project_vector=False)


@torch.no_grad()
def test_spatial_is_joined_to_the_input() -> None:
    unet, (x, t, conditioning) = make(), inputs()
    split = Conditioning(tokens=conditioning.tokens, spatial=x[:, 3:])
    assert torch.equal(unet(x[:, :3], t, split), unet(x, t, conditioning))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_feature_maps_keep_the_layout_of_the_weights(layout: torch.memory_format) -> None:
    seen: list[bool] = []
    unet = make().to(memory_format=layout)  # type: ignore[call-overload]
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous(memory_format=layout)))
    x, t, conditioning = inputs()
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(unet(given, t, conditioning), make()(x, t, conditioning))
    assert all(seen)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_channels": 8}, "exactly one"),
        ({"heads": 7}, "backbone.heads=7"),
        ({"heads": None, "head_channels": 48}, "head_channels=48"),
    ],
)
def test_impossible_heads(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": -4}, "backbone.heads=-4 is less than 1"),
        ({"heads": 0}, "backbone.heads=0 is less than 1"),
        ({"heads": None, "head_channels": -16}, "backbone.head_channels=-16"),
        ({"model_channels": -32}, "backbone.model_channels=-32"),
        ({"channel_mult": []}, "backbone.channel_mult=0"),
        ({"channel_mult": [1, -2]}, "backbone.channel_mult=-2"),
        ({"num_res_blocks": -1}, "backbone.num_res_blocks=-1"),
        ({"transformer_depth": 0}, "backbone.transformer_depth=0"),
        ({"frequency_shift": 16}, "frequency_shift=16"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"dropout": float("nan")}, "dropout=nan"),
    ],
)
def test_impossible_sizes(changes: dict[str, Any], words: str) -> None:
    sizes = {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_downsampling": [2],
        "heads": 2,
    }
    with pytest.raises(InputError, match=words):
        UNet(in_channels=4, out_channels=4, context_width=16, **sizes | changes)


def test_conditioning_must_fit() -> None:
    x, t, conditioning = inputs()
    with pytest.raises(InputError, match="does not take tokens"):
        make(context_width=None)(x, t, conditioning)
    with pytest.raises(InputError, match="needs tokens"):
        make()(x, t, Conditioning())


@torch.no_grad()
def test_coordinates_tell_places_apart() -> None:
    """Of a constant image every cell is told its own place, the same at every batch size."""
    found = with_coordinates(torch.zeros(3, 1, 2, 4))
    assert found[:, 0].abs().max() == 0
    assert torch.equal(found[0], found[2])
    assert found[0, 1].tolist() == [[-0.5] * 4, [0.5] * 4]
    assert found[0, 2].tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2
    x, t, told = inputs((4, 4))
    unet = make(coordinates=True)
    before = unet(x, t, told)
    unet.conv_in.weight[:, 4:] = 0
    assert not torch.allclose(unet(x, t, told), before)  # and the network hears it
