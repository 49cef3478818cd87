"""FLOPs counted without computing, against layers counted by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning, LatentSpec
from ldmlab.evaluation.flops import decoder_flops, denoiser_cost, flops_of

NODE = {
    "_target_": "ldmlab.backbones.unet.UNet",
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "heads": 2,
}


def _by_hand(module: nn.Module, call: Any) -> int:
    """2 x multiplications of every convolution and linear layer that runs: k^2 C_in C_out h w, and D_in D_out a row."""
    counted = []

    def convolution(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        counted.append(2 * layer.weight.numel() * output.shape[0] * output.shape[2] * output.shape[3])

    def linear(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        counted.append(2 * layer.weight.numel() * (output.numel() // layer.out_features))

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(convolution)
        elif isinstance(layer, nn.Linear):
            layer.register_forward_hook(linear)
    call()
    return sum(counted)


def _attention(tokens: int, width: int) -> int:
    """The two products of attention over `tokens` places: queries with keys, weights with values."""
    return 2 * 2 * tokens * tokens * width


@pytest.mark.parametrize("attention", [[], [1, 2]])
def test_a_denoiser_costs_what_its_layers_cost(attention: list[int]) -> None:
    cost = denoiser_cost({**NODE, "attention_downsampling": attention}, LatentSpec(3, 8, 8, 4), {})
    options = {name: value for name, value in NODE.items() if name != "_target_"}
    network = UNet(**options, attention_downsampling=attention)
    hand = _by_hand(network, lambda: network(torch.zeros(1, 3, 8, 8), torch.zeros(1), Conditioning()))
    hand += 2 * 9 * 64 * 64 * 8 * 8  # the convolution after growing, which is no call of its layer
    hand += _attention(16, 64)  # in the middle, 4 x 4
    if attention:  # one block down and two up on 8 x 8 of 32 and on 4 x 4 of 64
        hand += 3 * _attention(64, 32) + 3 * _attention(16, 64)
    assert cost.forward == hand
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    assert 2.5 * cost.forward < cost.training < 3.0 * cost.forward  # the first layer's input needs no gradient


def test_guidance_asks_twice() -> None:
    cost = denoiser_cost({**NODE, "attention_downsampling": []}, LatentSpec(3, 8, 8, 4), {})
    assert cost.sampling(50, guided=True) == 2 * cost.sampling(50) == 100 * cost.forward


@pytest.mark.slow
def test_conditions_cost_something() -> None:
    node = {**NODE, "attention_downsampling": [1]}
    alone = denoiser_cost(node, LatentSpec(3, 8, 8, 4), {})
    conditioned = denoiser_cost({**node, "context_width": 16}, LatentSpec(3, 8, 8, 4), {"tokens": 16})
    wider = denoiser_cost({**node, "in_channels": 5}, LatentSpec(3, 8, 8, 4), {"spatial": 2})
    assert conditioned.forward > alone.forward
    assert wider.forward - alone.forward == 2 * 9 * 2 * 32 * 64  # two more channels into the first convolution


def test_decoding_pixels_costs_nothing() -> None:
    assert decoder_flops({"_target_": "ldmlab.first_stages.identity.Identity"}, LatentSpec(3, 8, 8, 1)) == 0


def test_backward_passes_are_counted() -> None:
    layer = nn.Linear(5, 7)
    assert flops_of(lambda: layer(torch.zeros(3, 5)).sum().backward()) == 2 * (
        2 * 3 * 5 * 7
    )  # no gradient of the input
