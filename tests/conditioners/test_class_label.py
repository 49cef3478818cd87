"""Class numbers to learned vectors."""

import pytest
import torch

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError


def no_encode(pixels: torch.Tensor) -> torch.Tensor:
    raise AssertionError("classes need no images")


@pytest.mark.parametrize(("slot", "shape"), [("tokens", (3, 1, 8)), ("vector", (3, 8))])
def test_rows(slot: str, shape: tuple[int, ...]) -> None:
    embedder = ClassEmbedder(10, 8, slot=slot)
    batch = {"class_id": torch.tensor([0, 9, 9])}
    given, null = embedder(batch, no_encode), embedder.null(batch, no_encode)
    assert given.shape == null.shape == shape
    assert torch.equal(given.flatten(1), embedder.embedding.weight[[0, 9, 9]])
    assert torch.equal(null.flatten(1), embedder.embedding.weight[[10, 10, 10]])
    assert embedder.width(LatentSpec(4, 8, 8, 4)) == 8
    assert torch.equal(embedder({"class_id": [0, 9, 9]}, no_encode), given)  # as a user of the Python face would


@pytest.mark.parametrize("wrong", [10, -1])
def test_unknown_classes_are_refused(wrong: int) -> None:
    with pytest.raises(InputError, match=r"conditioner\.classes=10"):
        ClassEmbedder(10, 8)({"class_id": torch.tensor([0, wrong])}, no_encode)


def test_options() -> None:
    with pytest.raises(InputError, match="slot=spatial"):
        ClassEmbedder(10, slot="spatial")
    with pytest.raises(InputError, match="drop=-1"):
        ClassEmbedder(10, drop=-1)
