"""Codes that are running means, codes that restart, codes compared by direction."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.errors import InputError
from ldmlab.first_stages.quantiser import VectorQuantiser
from ldmlab.first_stages.vq import VQModel


def quantiser(codes: list[list[float]], **options: Any) -> VectorQuantiser:
    made = VectorQuantiser(len(codes), len(codes[0]), 1.0, 0.25, **options)
    with torch.no_grad():
        made.codebook.weight.copy_(torch.tensor(codes))
        if made.watched:
            made.sums.copy_(torch.tensor(codes))
    return made


def as_map(vectors: list[list[float]]) -> Tensor:
    """Vectors as one image of height 1: (1, C, 1, N)."""
    return torch.tensor(vectors).T[None, :, None].requires_grad_()


def test_running_means_are_those_of_the_paper() -> None:
    """N <- g N + (1 - g) n, m <- g m + (1 - g) sum z, e = m / N; a code without vectors stays."""
    made = quantiser([[0.0, 0.0], [10.0, 10.0], [-50.0, 0.0]], decay=0.9)
    given = made(as_map([[1.0, 0.0], [3.0, 2.0], [9.0, 11.0]]))
    assert given.codes.flatten().tolist() == [0, 0, 1]
    assert not made.codebook.weight.requires_grad
    assert made.update() is None
    expected = torch.tensor([[0.4 / 1.1, 0.2 / 1.1], [(9 + 0.9), (9 + 1.1)], [-50, 0]])  # N: 1.1, 1.0, 0.9
    torch.testing.assert_close(made.codebook.weight.data, expected)
    made(as_map([[1.0, 1.0]]))
    made.update()
    torch.testing.assert_close(made.uses, torch.tensor([1.09, 0.9, 0.81]))
    torch.testing.assert_close(made.codebook.weight.data[0], torch.tensor([0.46 / 1.09, 0.28 / 1.09]))
    torch.testing.assert_close(made.codebook.weight.data[1:], expected[1:])


def test_only_the_encoders_side_is_penalised_then() -> None:
    latents = as_map([[1.0, 0.0], [3.0, 2.0]])
    codes = [[0.0, 0.0], [10.0, 10.0]]
    mean, gradient = (
        quantiser(codes, decay=0.9)(latents).penalties["codebook"],
        quantiser(codes)(latents).penalties["codebook"],
    )
    torch.testing.assert_close(gradient, 1.25 * mean)


def test_micro_batches_of_a_step_count_together_and_evaluation_not_at_all() -> None:
    vectors = torch.randn(6, 2, 3, 3)
    whole, parts = (quantiser([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]], decay=0.9, restart_below=0.5) for _ in range(2))
    whole(vectors)
    for part in vectors.split(2):
        parts(part)
    with torch.no_grad():
        parts(vectors + 5)
    parts.eval()(vectors + 5)
    whole.update()
    parts.update()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_dead_codes_restart_at_vectors_of_the_batch(decay: float | None) -> None:
    made = quantiser([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]], decay=decay, restart_below=0.4)
    vectors = [[0.5, 0.25], [-0.5, 1.0], [1.0, -1.0]]
    rows = torch.zeros(3, dtype=torch.bool)
    while not rows.any():
        rows = rows if made(as_map(vectors)).codes.any() else made.update()
    assert rows.tolist() == [False, True, True]
    assert all(code in vectors for code in made.codebook.weight[1:].tolist())
    again = made(as_map(vectors)).codes.unique()
    assert len(again) > 1  # now they are used
    assert not made.update().any()  # and have time before they could restart again
    if decay is None:
        assert made.codebook.weight.requires_grad


def test_directions_are_compared_at_unit_length() -> None:
    made = quantiser([[5.0, 0.0], [0.0, 0.1], [-1.0, -1.0]], cosine=True)
    given = made(as_map([[0.1, 0.2], [9.0, 1.0], [-3.0, -2.0]]))
    assert given.codes.flatten().tolist() == [1, 0, 2]
    chosen = given.latents[0, :, 0].T
    torch.testing.assert_close(chosen, F.normalize(made.codebook.weight[[1, 0, 2]]))
    given.latents.sum().backward()
    assert made.codebook.weight.grad is None  # straight through to the vectors


def test_rates_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"codebook_decay=1.0 must lie between 0 and 1"):
        VectorQuantiser(4, 2, 1.0, 0.25, decay=1.0)
    with pytest.raises(InputError, match=r"restart_below=0.0"):
        VectorQuantiser(4, 2, 1.0, 0.25, restart_below=0.0)


def test_a_plain_codebook_keeps_the_official_tensors() -> None:
    sizes: dict[str, Any] = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    plain = VQModel(latent_channels=3, codebook_size=16, **sizes)
    assert [name for name in plain.state_dict() if "quantiser" in name] == ["quantiser.codebook.weight"]
    watched = VQModel(latent_channels=3, codebook_size=16, codebook_decay=0.99, restart_below=0.01, **sizes)
    watched.reconstruct(torch.rand(2, 3, 8, 8), torch.zeros(())).images.mean().backward()
    assert set(watched.update_codebook()) <= {"quantiser.codebook.weight"}
    assert int(watched.quantiser.updates) == 1
