"""The averaged weights against the formula, and their life beside the raw ones."""

import pytest
import torch
from torch import nn

from ldmlab.averaging import AveragedWeights


def test_the_warm_up_follows_the_formula() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.0)
    average = AveragedWeights(net, decay=0.5)
    expected = 0.0
    for update in range(1, 40):
        with torch.no_grad():
            net.weight.fill_(float(update))
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        assert average.weights()["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert average.updates == 39


def test_only_trainable_weights_are_averaged_in_float32() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(torch.bfloat16)
    net[0].requires_grad_(False)
    average = AveragedWeights(net, 0.9)
    assert set(average.weights()) == {"1.weight", "1.bias"}
    assert {t.dtype for t in average.weights().values()} == {torch.float32}


def test_applied_gives_the_raw_weights_back_even_after_an_error() -> None:
    net = nn.Linear(2, 2)
    average = AveragedWeights(net, 0.9)
    with torch.no_grad():
        net.weight.add_(1)
    raw = net.weight.detach().clone()
    seen: list[torch.Tensor] = []

    def fail() -> None:
        with average.applied():
            seen.append(net.weight.detach().clone())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(seen[0], average.weights()["weight"])
    assert torch.equal(net.weight, raw)


def test_state_comes_back_bit_for_bit_and_only_for_the_same_network() -> None:
    net = nn.Linear(2, 2)
    average = AveragedWeights(net, 0.9)
    for _ in range(3):
        with torch.no_grad():
            net.weight.mul_(1.1)
        average.update()
    again = AveragedWeights(net, 0.9)
    again.load_state_dict(average.state_dict())
    assert again.updates == 3
    assert torch.equal(again.weights()["weight"], average.weights()["weight"])
    with pytest.raises(ValueError, match="another network"):
        AveragedWeights(nn.Linear(2, 2, bias=False), 0.9).load_state_dict(average.state_dict())
