"""Windows over large maps: they cover every place with shares that add up to one."""

from itertools import pairwise

import pytest
import torch

from ldmlab.errors import InputError
from ldmlab.nn.tiling import blended, spans, windows

SIZES = [(5, 8, 2), (8, 8, 2), (9, 8, 4), (100, 32, 8), (101, 32, 0), (64, 16, 8)]  # length, part, overlap


@pytest.mark.parametrize(("length", "part", "overlap"), SIZES)
def test_spans_cover_and_overlap(length: int, part: int, overlap: int) -> None:
    found = spans(length, part, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(stop - start == min(part, length) for start, stop in found)
    assert all(before[1] - after[0] >= overlap for before, after in pairwise(found))


@pytest.mark.parametrize(("length", "part", "overlap"), SIZES)
@pytest.mark.parametrize("scale", [1, 3])
def test_shares_add_up_to_one(length: int, part: int, overlap: int, scale: int) -> None:
    size = (length, 21)
    total = torch.zeros(scale * length, scale * 21)
    for window in windows(size, part, overlap, scale):
        assert bool((window.weight > 0).all())
        window.of(total).add_(window.weight)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_blending_equal_parts_changes_nothing() -> None:
    image = torch.randn(2, 3, 50, 37)
    parts = windows((50, 37), 16, 5)
    torch.testing.assert_close(blended(lambda i: parts[i].of(image), parts), image)


def test_weights_run_in_a_line_across_an_overlap() -> None:
    left, right = windows((1, 28), 16, 4)
    assert left.weight[0, 12:16].tolist() == pytest.approx([7 / 8, 5 / 8, 3 / 8, 1 / 8])
    assert right.weight[0, :4].tolist() == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])


@pytest.mark.parametrize(("part", "overlap"), [(0, 0), (8, 5), (8, -1)])
def test_refused(part: int, overlap: int) -> None:
    with pytest.raises(InputError, match="choose an overlap of up to half a part"):
        windows((20, 20), part, overlap)
