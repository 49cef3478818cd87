"""Captions found by images: right where an image is nearest to its own caption among those of its class."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.evaluation.caption_accuracy import CaptionAccuracy
from ldmlab.evaluation.evaluators import Evidence

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "crimson": (220, 0, 40)}
STYLES = {"flat": ["red", "green", "blue"], "line": ["crimson", "green", "blue"]}


class Colours(torch.nn.Module):
    """A CLIP in which an image is its mean colour and a caption the colour that it names."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def encode_text(self, ids: Tensor) -> Tensor:
        return ids.float() / 127.5 - 1


def evaluator(**options: Any) -> CaptionAccuracy:
    clip: Any = SimpleNamespace(
        model=Colours(),
        pixels=lambda images: images,
        ids=lambda texts: torch.tensor([COLOURS[t.split()[0]] for t in texts]),
    )
    return CaptionAccuracy(field="style", captions=9, run="tiny", clip=clip, **options)


def image(colour: str) -> Tensor:
    return torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)


def asked() -> list[dict[str, Any]]:
    return [{"caption": f"{c} dot, {style}", "style": style} for style, colours in STYLES.items() for c in colours]


def evidence(samples: list[str], training: list[str]) -> Evidence:
    captions = asked()

    def real(split: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
        assert (split, fields) == ("val", ("caption", "style"))
        values = {field: [one[field] for one in captions] for field in fields}
        return [{**values, "image": torch.stack([image(colour) for colour in ALL])}]

    more = {
        name: (captions, torch.stack([image(colour) for colour in colours]))
        for name, colours in {"validation": samples, "training": training}.items()
    }
    return Evidence(real, "val", [], torch.empty(0), more=more)


ALL = [colour for colours in STYLES.values() for colour in colours]


def test_samples_of_their_captions_are_right() -> None:
    found = evaluator()(evidence(ALL, ALL[::-1]))
    assert (found.real, found.samples, found.chance) == (1.0, 1.0, 1 / 50)
    assert found.shuffled < 0.5
    assert found.training_captions is not None
    # reversed: of flat blue, green, crimson are asked to be red, green, blue; of line red, green, blue ...
    assert found.training_captions.samples == pytest.approx(1 / 3)
    assert [(one.name, one.real_count, one.samples_count) for one in found.classes] == [("flat", 3, 3), ("line", 3, 3)]


def test_captions_of_other_classes_do_not_compete() -> None:
    almost = ["crimson", *ALL[1:]]  # nearer to line's crimson than to flat's red, which alone is asked for
    assert evaluator()(evidence(almost, ALL)).samples == 1.0


def test_a_class_counts_as_much_as_another() -> None:
    wrong_flat = ["green", "blue", "red", *ALL[3:]]
    assert evaluator()(evidence(wrong_flat, ALL)).samples == 0.5


def test_fewer_candidates_are_easier() -> None:
    wrong = ["green", *ALL[1:]]
    assert evaluator(candidates=3)(evidence(wrong, ALL)).samples == pytest.approx(5 / 6)
    assert evaluator(candidates=1)(evidence(wrong, ALL)).samples == 1.0
