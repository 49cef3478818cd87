"""The mask generator against the areas that LaMa's own draws, and its rules one by one."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from ldmlab.errors import InputError
from ldmlab.tasks.inpainting import PRESETS, Rectangles, Strokes, preset, square_with_hole

REFERENCE = json.loads((Path(__file__).parents[1] / "assets" / "reference" / "masks.json").read_text())


@pytest.mark.parametrize("count", [1000, pytest.param(8000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REFERENCE)
def test_areas_agree_with_lama(name: str, count: int) -> None:
    known, random = REFERENCE[name], Random(5)
    areas = np.array([PRESETS[name].draw(known["size"], known["size"], random).mean() for _ in range(count)])
    error = (known["std"] ** 2 / count + known["standard_error"] ** 2) ** 0.5  # of both means
    assert abs(areas.mean() - known["mean"]) < 3 * error
    over, share = (areas > 0.5).mean(), known["share_over_half"]
    assert abs(over - share) < 3 * (share * (1 - share) * (1 / count + 1 / known["count"])) ** 0.5
    assert areas.std() == pytest.approx(
        known["std"], rel=3 * (1 / 2000 + 1 / 8000) ** 0.5
    )  # of 1,000 and 4,000 normal numbers
    for quantile, value in known["quantiles"].items():
        assert np.quantile(areas, float(quantile)) == pytest.approx(value, abs=0.03)


def test_settings_are_those_of_the_reference() -> None:
    for name, known in REFERENCE.items():
        strokes, kwargs = PRESETS[name].strokes, known["kwargs"]
        told = kwargs["irregular_kwargs"]
        assert (strokes.least, strokes.most, strokes.width, strokes.length, strokes.angle) == (
            *(told["min_times"], told["max_times"], told["max_width"], told["max_len"], told["max_angle"]),
        )
        assert PRESETS[name].box_rate == kwargs["box_proba"]
        assert PRESETS[name].size == known["size"]


def test_a_mask_is_of_one_kind() -> None:
    kind = PRESETS["thick_256"]
    boxes = 0
    for number in range(400):
        mask = kind.draw(256, 256, Random(number))
        assert set(np.unique(mask)) <= {0, 1}
        chosen = Random(number)
        if chosen.random() < 0.3 / 1.3:
            boxes += 1
            assert kind.rectangles is not None
            assert np.array_equal(mask, kind.rectangles.draw(256, 256, chosen))
    assert 0.16 < boxes / 400 < 0.30  # 0.231, three standard errors


def test_boxes_keep_their_margin_and_sizes() -> None:
    rectangles = Rectangles(1, 1, smallest=30, largest=60, margin=10)
    for number in range(200):
        mask = rectangles.draw(100, 80, Random(number))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert rows[0] >= 10
        assert rows[-1] < 90
        assert columns[0] >= 10
        assert columns[-1] < 70
        assert 30 <= len(rows) < 60
        assert 30 <= len(columns) < 60
        assert mask.sum() == len(rows) * len(columns)


def test_one_stroke_more_than_the_largest_count_is_drawn() -> None:
    class Counting(Random):
        def randint(self, a: int, b: int) -> int:
            asked.append((a, b))
            return super().randint(a, b)

    asked: list[tuple[int, int]] = []
    Strokes(4, 50, width=10, length=40).draw(64, 64, Counting(0))
    assert asked[0] == (4, 51)


@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (40, 40)])
def test_the_square_holds_the_far_edge_of_the_hole(shape: tuple[int, int]) -> None:
    long, seen = 0 if shape[0] > shape[1] else 1, set()
    for number in range(300):
        random = Random(number)
        mask = np.zeros(shape, np.uint8)
        first = random.randrange(shape[long] - 6)
        index: list[slice] = [slice(4, 9), slice(4, 9)]
        index[long] = slice(first, first + 6)
        mask[tuple(index)] = 1
        left, top, side = square_with_hole(mask, random)
        start = (top, left)[long]
        assert side == min(shape)
        assert (top, left)[1 - long] == 0
        assert 0 <= start <= shape[long] - side
        seen.add(start)
        if shape[0] != shape[1] and first + 5 < shape[long] - 1:
            assert start <= first + 5 <= start + side
    assert len(seen) > (20 if shape[0] != shape[1] else 0)


def test_an_unknown_preset_and_boxes_too_large_are_refused() -> None:
    with pytest.raises(InputError, match=r"task.masks=thickest is unknown; choose stored or one of thin_256"):
        preset("thickest")
    with pytest.raises(InputError, match="do not fit into 40 x 40 px"):
        Rectangles(1, 1, smallest=30, largest=60, margin=10).draw(40, 40, Random(0))
