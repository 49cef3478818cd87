"""Pixels, embeddings and resampling."""

import math

import pytest
import torch

from ldmlab.errors import InputError
from ldmlab.nn.blocks import double, group_norm, halve
from ldmlab.nn.embedding import timestep_embedding
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


def test_norm_groups_must_divide() -> None:
    with pytest.raises(InputError, match="48 channels"):
        group_norm(48)
