"""The stream of samples of an evaluation: numbered, shared between processes, shown while it runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ldmlab.evaluation.record import all_items
from ldmlab.evaluation.score import Numbered
from ldmlab.inference.model import LoadedModel, generate
from ldmlab.inference.sample_settings import SampleSettings

Requests = Sequence[Mapping[str, Any]]
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (items, how many, title) => the same items, shown


@dataclass(frozen=True)
class Drawing:
    """Draws images uint8 (B, 3, H, W); number and seed decide an image's noise, whoever draws it and when."""

    model: LoadedModel
    batch_size: int
    rank: int
    world: int
    track: Track

    def share(self, asked: Requests, settings: SampleSettings, title: str, first: int = 0) -> Iterator[Numbered]:
        """This process's part of the images numbered from `first` on."""
        stream = generate(
            self.model,
            asked,
            settings,
            batch_size=self.batch_size,
            rank=self.rank,
            world=self.world,
            first_index=first,
        )
        count = len(range(self.rank, len(asked), self.world))
        for index, images in self.track(stream, -(-count // self.batch_size), title):
            yield torch.tensor(index), images.permute(0, 3, 1, 2)

    def whole(self, asked: Requests, settings: SampleSettings, title: str, first: int = 0) -> Tensor:
        """The images of all processes in order, (N, 3, H, W)."""
        stream = self.share(asked, settings, title, first)
        mine = [(int(number), image) for index, part in stream for number, image in zip(index, part, strict=True)]
        return torch.stack([image for _, image in sorted(all_items(mine), key=itemgetter(0))])

    def again(self, asked: Requests, settings: SampleSettings, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """A few images (3, H, W) that were drawn before with their numbers, by this process alone."""
        settings = self.model.resolved(settings, asked)
        for start in range(0, len(numbers), self.batch_size):
            chunk = list(numbers[start : start + self.batch_size])
            images = self.model.sample_batch([asked[number] for number in chunk], settings, chunk)
            yield from zip(chunk, images.permute(0, 3, 1, 2), strict=True)
