"""The classifier separates simple things, weighs classes equally, and is the same at every run."""

import pytest
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.classifier import ByClass, train_classifier

NAMES = ["dark", "light", "striped"]


def toy_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise on a dark, a light or a striped ground; the dark ones are rare."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.1, 0.45, 0.45]), count, replacement=True, generator=generator)
    ground = torch.tensor([60.0, 190.0, 120.0])[labels].view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()
    ground[labels == 2, :, ::4] = 255
    noise = 25 * torch.randn(ground.shape, generator=generator)
    return (ground + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.mark.slow
def test_it_learns_and_repeats_itself() -> None:
    train, test = toy_images(90, 0), toy_images(60, 1)
    before = torch.random.get_rng_state()
    classifier = train_classifier(*train, NAMES, steps=25, batch_size=24)
    assert torch.equal(before, torch.random.get_rng_state())
    assert classifier.agreement(*test).mean > 0.8
    again = train_classifier(*train, NAMES, steps=25, batch_size=24)
    assert torch.equal(classifier.predict(test[0]), again.predict(test[0]))


def test_an_autocast_around_the_training_changes_nothing() -> None:
    train, test = toy_images(90, 0), toy_images(60, 1)
    plain = train_classifier(*train, NAMES, steps=8, batch_size=24)
    with torch.autocast("cpu", torch.bfloat16):  # which keeps casts of weights: the first ones, for all updates
        inside = train_classifier(*train, NAMES, steps=8, batch_size=24)
    assert torch.equal(plain(test[0]), inside(test[0]))


def test_balanced_means_every_category_counts_the_same() -> None:
    assert ByClass.of(torch.tensor([90, 0, 0]), torch.tensor([90, 10, 0])).mean == 0.5


def test_a_category_without_images_is_named() -> None:
    images, labels = toy_images(90, 0)
    with pytest.raises(InputError, match="no training image is of class round"):
        train_classifier(images, labels, [*NAMES, "round"], steps=1)
