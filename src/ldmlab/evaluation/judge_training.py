"""How the small judges learn: by AdamW under one cycle of learning rates, from random numbers of their own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Show = Callable[[range], Iterable[object]]  # the updates => the same, shown while they are made


@dataclass(frozen=True)
class Learned:
    """What a judge has learned from."""

    examples: int  # real training images, or crops of them
    updates: int
    batch_size: int  # examples an update


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Random numbers of this seed inside, and outside as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
        yield


def descend(
    model: nn.Module,
    loss: Callable[[], Tensor],  # of a new batch
    steps: int,
    *,
    learning_rate: float,  # the highest of the cycle
    weight_decay: float,
    show: Show,
) -> None:
    """Train the model in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in show(range(steps)):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        schedule.step()
