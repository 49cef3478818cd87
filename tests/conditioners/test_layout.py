"""Boxes to tokens: the numbers of the published encoding."""

from typing import Any

import pytest
import torch

from ldmlab.annotations import cropped
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.errors import InputError

EMPTY = 8191
LAST = 89 * 90 + 89  # the bottom right cell of 90 x 90


def box(class_id: int, *corners: float) -> dict[str, Any]:
    return {"class_id": class_id, "box": list(corners)}


def layout(**changes: Any) -> LayoutTokens:
    return LayoutTokens(**{"width": 16, "depth": 1, "objects": 3, "heads": 2, **changes})


def no_encode(pixels: torch.Tensor) -> torch.Tensor:
    raise AssertionError("boxes need no images")


def test_tokens_of_a_image() -> None:
    boxes = [box(353, 0, 0, 1, 1), box(7, 0.25, 0.5, 0.75, 0.9)]
    corners = [round(44.5) * 90 + round(22.25), round(80.1) * 90 + round(66.75)]  # 44.5 goes to the even 44
    assert corners == [44 * 90 + 22, 80 * 90 + 67]
    expected = [353, 0, LAST, 7, *corners, EMPTY, EMPTY, EMPTY]
    assert layout().tokens(boxes) == [*expected, 0, LAST]
    assert layout(crop_tokens=False).tokens(boxes) == expected


def test_published_length() -> None:
    tokens = LayoutTokens(width=8, depth=1).tokens([], [0.0, 0.0, 1.0, 1.0])
    assert len(tokens) == 92
    assert tokens == [EMPTY] * 90 + [0, LAST]


def test_a_told_crop_keeps_places_in_the_whole_image() -> None:
    """As in the official data code: with crop tokens boxes are counted in the whole image, without in the crop."""
    crop, seen = [0.5, 0.0, 1.0, 0.5], [box(1, 0.0, 0.0, 1.0, 1.0)]
    corners = [round(44.5), 44 * 90 + 89]
    assert layout().tokens(seen, crop) == [1, *corners, *[EMPTY] * 6, *corners]
    assert layout(crop_tokens=False).tokens(seen, crop)[:3] == [1, 0, LAST]


def test_nothing_given_keeps_the_crop() -> None:
    module = layout()
    batch = {"boxes": [[box(1, 0, 0, 1, 1)], []], "crop": [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]}
    null = module.null(batch, no_encode)
    torch.testing.assert_close(null[1], module(batch, no_encode)[1])
    assert not torch.allclose(null[0], null[1])
    bare = module.null({"boxes": [[], []]}, no_encode)
    assert torch.equal(bare[0], bare[1])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([box(0, 0, 0, 1, 1)] * 4, r"4 boxes, more than conditioner\.objects=3"),
        ([box(8191, 0, 0, 1, 1)], "class_id 8191 is not 0 .. 8190"),
        ([box(-1, 0, 0, 1, 1)], "class_id -1"),
        ([box(0, 0.5, 0, 0.4, 1)], "is no box"),
        ([box(0, 0, 0, 1, 256)], "is no box"),
        ([box(0, 0, 0, 1)], "is no box"),
    ],
)
def test_refusals(boxes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout()({"boxes": [boxes]}, no_encode)


def test_the_grid_leaves_a_token_for_empty() -> None:
    with pytest.raises(InputError, match="vocab_size=8100 leaves no empty token"):
        layout(vocab_size=8100)


def test_classes_beyond_those_of_the_data_are_refused() -> None:
    assert layout(classes=20).tokens([box(19, 0, 0, 1, 1)])[0] == 19
    with pytest.raises(InputError, match=r"class_id 20 is not 0 \.\. 19"):
        layout(classes=20).tokens([box(20, 0, 0, 1, 1)])
    with pytest.raises(InputError, match=r"conditioner\.classes=8192 is not 1 \.\. 8191"):
        layout(classes=8192)


def test_an_object_that_the_crop_cuts_is_told_whole() -> None:
    """As in the official data code, which tells crop and boxes apart."""
    (seen,) = cropped([box(1, 0.25, 0.0, 0.75, 0.5)], [0.5, 0.0, 1.0, 0.5])
    assert seen["box"] == [0.0, 0.0, 0.5, 1.0]
    whole = [1, round(89 * 0.25), 44 * 90 + round(89 * 0.75)]
    assert layout().tokens([seen], [0.5, 0.0, 1.0, 0.5])[:3] == whole
    assert layout(crop_tokens=False).tokens([seen], [0.5, 0.0, 1.0, 0.5])[:3] == [1, 0, LAST - 45]
    assert layout().tokens([seen])[:3] == [1, 0, LAST - 45]  # asked for without its crop


def test_attributes_multiply_the_class_tokens() -> None:
    told = {**box(3, 0, 0, 1, 1), "group_of": True, "depiction": True, "inside": False}
    assert layout(classes=10).tokens([told])[0] == 3
    assert layout(classes=10, attributes=["group_of"]).tokens([told])[0] == 3 + 10
    every = layout(classes=340, attributes=["group_of", "occluded", "depiction", "inside"])
    assert every.tokens([told])[0] == 3 + 340 * 5
    assert every.tokens([told | {"inside": True, "occluded": True}])[0] == 3 + 340 * 15
    for changes in ({"attributes": ["red"], "classes": 10}, {"attributes": ["inside"]}):
        with pytest.raises(InputError, match=r"conditioner\.attributes="):
            layout(**changes)
    with pytest.raises(InputError, match="at most 8191 tokens in all"):
        layout(attributes=["inside"], classes=600)


def test_boxes_may_name_their_class() -> None:
    module, named = layout(classes=2, names=["cat", "dog"]), [{"class": "dog", "box": [0, 0, 1, 1]}]
    assert module.tokens(named) == module.tokens([box(1, 0, 0, 1, 1)])
    module.check({"boxes": named})
    for wrong, message in [("dgo", "did you mean dog"), ("x", "fix it"), (None, "class None is not one of the 2")]:
        with pytest.raises(InputError, match=message):
            module.check({"boxes": [{**named[0], "class": wrong}]})
    with pytest.raises(InputError, match="give its class_id"):
        layout().check({"boxes": named})
    with pytest.raises(InputError, match=r"conditioner\.names has 2 names for conditioner\.classes=3"):
        layout(classes=3, names=["cat", "dog"])
