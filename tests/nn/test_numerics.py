"""Flags of float32 arithmetic on a GPU, which can be read without one."""

from collections.abc import Iterator

import pytest
import torch
from torch.backends import cuda, cudnn

from ldmlab.nn import numerics


def flags() -> tuple[bool, bool, bool]:
    return cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = flags()
    yield
    cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def test_fast_and_exact() -> None:
    numerics.fast()
    assert flags() == (True, True, True)
    assert torch.get_float32_matmul_precision() == "high"
    with numerics.exact():
        assert flags() == (False, False, False)
    assert flags() == (True, True, True)


def test_measures_are_exact_and_leave_the_flags() -> None:
    from ldmlab.metrics.reconstruction import ReconstructionMeasures

    seen = []

    class Distance(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append(flags())
            return x.flatten(1).mean(1)

    numerics.fast()
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    ReconstructionMeasures(None, Distance()).update(images, images)
    assert seen[0] == (False, False, False)
    assert flags() == (True, True, True)
