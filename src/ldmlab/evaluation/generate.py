"""Images for a list of requests, batch by batch, shared between processes by number."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ldmlab.contracts import AfterStep
from ldmlab.errors import InputError
from ldmlab.evaluation.model import LoadedModel
from ldmlab.evaluation.settings import SampleSettings


def generate(
    model: LoadedModel,
    requests: Sequence[Mapping[str, Any]],  # per image the fields that the model reads; {} without conditions
    settings: SampleSettings,
    *,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
    first_index: int = 0,
    after_step: AfterStep | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (numbers, uint8 (b, H, W, 3)); request i has number first_index + i and belongs to rank i % world.

    Noise is a function of (seed, number, step): neither the batch size nor the processes change an image.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} holds no image; choose 1 or more.")
    settings = model.resolved(settings, requests)
    mine = range(rank, len(requests), world)
    for start in range(0, len(mine), batch_size):
        chunk = mine[start : start + batch_size]
        numbers = [first_index + i for i in chunk]
        yield numbers, model.sample_batch([requests[i] for i in chunk], settings, numbers, after_step)
