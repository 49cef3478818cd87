"""Samples learned by heart are found; fresh ones are not accused."""

import torch

from ldmlab.evaluation.neighbours import nearest_training_pictures


def test_copies_are_found_and_fresh_samples_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    train, held_out, fresh = (torch.randn(n, 16, generator=generator) for n in (500, 300, 100))
    copies = train[:100] * 1.5 + 0.01 * torch.randn(100, 16, generator=generator)  # length does not matter
    found = nearest_training_pictures(copies, held_out, train)
    assert found.copies > 0.95
    assert torch.equal(found.index, torch.arange(100))
    assert nearest_training_pictures(fresh, held_out, train).copies < 0.1
    assert found.typical_sample < found.bar < found.typical_held_out
