"""Pixels, embeddings and resampling."""

import math

import pytest
import torch
from torch.nn import functional as F

from ldmlab.errors import InputError
from ldmlab.nn.blocks import double, group_norm, grow, halve, timestep_embedding
from ldmlab.nn.pixels import to_bytes, to_float


def test_every_byte_survives() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(pixels)
    assert floats[0] == -1
    assert floats[-1] == 1
    assert torch.equal(to_bytes(floats), pixels)
    assert to_bytes(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 128, 255]


def test_embedding_is_cosines_then_sines() -> None:
    got = timestep_embedding(torch.tensor([2.5]), 4)[0]
    slow = 2.5 * 10_000 ** (-1 / 2)
    torch.testing.assert_close(got, torch.tensor([math.cos(2.5), math.cos(slow), math.sin(2.5), math.sin(slow)]))
    assert timestep_embedding(torch.tensor([1]), 5).shape == (1, 5)


def test_halving_and_doubling_odd_sizes() -> None:
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    small = halve(x)
    assert small.tolist() == [[[[2.0, 3.5]]]]  # the odd last column is averaged on its own
    assert double(small, (2, 3)).tolist() == [[[[2.0, 2.0, 3.5], [2.0, 2.0, 3.5]]]]


@pytest.mark.parametrize("size", [(6, 5), (2, 2), (3, 1)])
@pytest.mark.parametrize("odd", [0, 1])
def test_growing_is_doubling_then_convolution(size: tuple[int, int], odd: int) -> None:
    """Also as a transposed convolution, which the first size takes; the last row may be cropped away."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, *size), (5, 3, 3, 3), (5,))
    )
    target = (2 * size[0] - odd, 2 * size[1])
    found = grow(x, weight, bias, target)
    expected = F.conv2d(double(x, target), weight, bias, padding=1)
    torch.testing.assert_close(found, expected)
    given = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight, bias), given),
        torch.autograd.grad(expected, (x, weight, bias), given),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_norms_sum_in_float32() -> None:
    """A mean of 50 with deviation 1 is lost where sums have eight bits."""
    x = 50 + torch.randn(2, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    norm = group_norm(64)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x.bfloat16())
    expected = F.group_norm(x.bfloat16().double(), 32, norm.weight.double(), norm.bias.double())
    assert (found.double() - expected).abs().max() < 0.03


def test_norm_groups_must_divide() -> None:
    with pytest.raises(InputError, match="48 channels"):
        group_norm(48)
