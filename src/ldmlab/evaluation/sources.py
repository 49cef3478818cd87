"""Sources of the images that are scored: samples of a model, and reconstructions of a first stage.

Image sets on disk are the third kind (`image_sets.py`). The number of images of a source is known before the first one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldmlab import distributed
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation import protocol as protocols
from ldmlab.evaluation.real_images import Fields, batches_of, count_of, repeated
from ldmlab.evaluation.record import all_items
from ldmlab.evaluation.scoring import Numbered, Track, numbered
from ldmlab.inference.model import LoadedModel, generate
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.nn.pixels import numbers_only, to_bytes, to_float

Requests = Sequence[Fields]
Kept = list[tuple[float, Numbered]]  # a process's batches of samples, and the seconds that each took
_LONG = 10  # sampler steps from which the time is estimated before the start


def requests(protocol: protocols.Protocol, reads: frozenset[str], reference: Sequence[Mapping[str, Any]]) -> Requests:
    """The conditions of each sample: the fields that the model takes, one dict an image.

    reference: image i takes the conditions of reference image i, from the start again when they run out.
    balanced_classes: every class the same number of times; a remainder goes to the first classes.
    """
    count = protocol.samples or min(len(reference), protocol.at_most or len(reference))
    takes = ", ".join(sorted(reads))
    if not reads:
        return [{} for _ in range(count)]
    if protocol.conditions == "none":
        raise InputError(
            f"protocol.conditions=none, but the model takes {takes}; choose reference or balanced_classes."
        )
    if protocol.conditions == "balanced_classes":
        if reads != {"class_id"}:
            raise InputError(
                f"protocol.conditions=balanced_classes is for models that take class_id alone, and this one "
                f"takes {takes}; choose protocol.conditions=reference."
            )
        assert protocol.classes is not None
        return [{"class_id": index % protocol.classes} for index in range(count)]
    if missing := [name for name in sorted(reads) if not reference or name not in reference[0]]:
        raise InputError(
            f"the reference images have no {', '.join(missing)}, which the model takes as input; pack them so."
        )
    return repeated(reference, reads, count)


class Source(Protocol):
    """Images that are compared with real ones."""

    @property
    def count(self) -> int: ...  # images, of all processes

    @property
    def captions(self) -> Callable[[int], str] | None: ...  # of the image of a number; None: it shows no caption

    def images(self, batch_size: int, track: Track) -> Iterable[Numbered]: ...  # this process's share

    def record(self, images: int) -> dict[str, Any]: ...  # for metrics.json: how they are made, and how many


class Samples:
    """Samples of a model for the conditions that a protocol derives from the reference images.

    Number and seed decide an image's noise, whatever the batch size, the process and the time of its sampling.
    """

    kept: Kept | None = None  # for several evaluations of the same samples, which the first one makes

    def __init__(self, model: LoadedModel, protocol: protocols.Protocol, known: Requests) -> None:
        self.model, self.protocol = model, protocol
        self.requests = requests(protocol, model.reads, known)
        self.settings = model.resolved(protocol.settings(), self.requests)
        self.clock: list[float] = []  # seconds that each batch took

    @property
    def count(self) -> int:
        """As configured in the protocol."""
        return len(self.requests)

    @property
    def captions(self) -> Callable[[int], str] | None:
        """Captions, of a model that takes them."""
        return (lambda number: str(self.requests[number]["caption"])) if "caption" in self.model.reads else None

    def images(self, batch_size: int, track: Track) -> Iterator[Numbered]:
        """The protocol's samples, timed."""
        made, self.clock = self.kept or (), [seconds for seconds, _ in self.kept or ()]
        yield from (batch for _, batch in made)
        began = time.monotonic()
        for batch in () if made else self.share(self.requests, self.settings, "samples", batch_size, track):
            self.clock.append(time.monotonic() - began)
            if self.kept is not None:
                self.kept.append((self.clock[-1], batch))
            yield batch
            began = time.monotonic()

    def share(
        self, requests: Requests, settings: SampleSettings, title: str, batch_size: int, track: Track, first: int = 0
    ) -> Iterator[Numbered]:
        """This process's part of other samples, numbered from `first` on."""
        rank, world = distributed.rank(), distributed.world_size()
        stream = generate(
            self.model, requests, settings, batch_size=batch_size, rank=rank, world=world, first_index=first
        )
        count = len(range(rank, len(requests), world))
        for index, images in track(stream, -(-count // batch_size), f"{title}, batches of {batch_size}"):
            yield torch.tensor(index), images.permute(0, 3, 1, 2)

    def all(
        self, requests: Requests, settings: SampleSettings, title: str, batch_size: int, track: Track, first: int = 0
    ) -> Tensor:
        """Other samples of all processes in order, (N, 3, H, W)."""
        stream = self.share(requests, settings, title, batch_size, track, first)
        mine = [(int(number), image) for index, part in stream for number, image in zip(index, part, strict=True)]
        return torch.stack([image for _, image in sorted(all_items(mine), key=itemgetter(0))])

    def again(self, numbers: Sequence[int], batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """A few of the protocol's samples (3, H, W) again, by this process only."""
        for start in range(0, len(numbers), batch_size):
            chunk = list(numbers[start : start + batch_size])
            images = self.model.sample_batch([self.requests[number] for number in chunk], self.settings, chunk)
            yield from zip(chunk, images.permute(0, 3, 1, 2), strict=True)

    def say_time(self, batch_size: int, images: int) -> None:
        """Estimate the time of sampling `images`, of all processes, from two steps of the first batch, if long."""
        steps = self.settings.steps or 0
        if steps < _LONG or self.kept:
            return
        rank, world = distributed.rank(), distributed.world_size()
        numbers = list(range(rank, self.count, world)[:batch_size])
        began = time.monotonic()
        with suppress(InputError):  # a sampler that cannot take two steps: no estimate
            short = self.model.resolved(replace(self.protocol.settings(), steps=2), self.requests)
            self.model.sample_batch([self.requests[number] for number in numbers], short, numbers)
            seconds = (time.monotonic() - began) / 2 * steps * -(-images // (batch_size * world))
            distributed.say(f"sampling {images:,} images in {steps} steps: about {_duration(seconds)} on this machine")

    def record(self, images: int) -> dict[str, Any]:
        """The sampler's settings: equal for equal samples."""
        made = {"images": images, "conditions": self.protocol.conditions, "precision": self.model.precision}
        return self.settings.as_text() | made


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class Reconstructions:
    """Images of a split encoded and decoded by a first stage, KL models by the posterior's mean."""

    captions = None  # they were not made for a caption

    def __init__(self, first_stage: nn.Module, data: ShardData, protocol: protocols.Protocol) -> None:
        self.first_stage, self.data, self.split = first_stage, data, protocol.reference
        self.limit = min((n for n in (protocol.samples, protocol.reference_limit) if n is not None), default=None)
        self.batch: Mapping[str, Any] = {}  # of the loader, behind the last images given

    @property
    def count(self) -> int:
        """Images of the split, or of its first ones, readable or not."""
        return count_of(self.data, self.split, self.limit)

    @torch.no_grad()
    def images(self, batch_size: int, track: Track) -> Iterator[Numbered]:
        """This process's share."""
        for batch in batches_of(self.data, self.split, self.limit, batch_size, track, "reconstructions"):
            self.batch = batch
            for index, images in numbered([batch]):
                yield index, self._reconstructed(images)

    def _reconstructed(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) => the same of the reconstruction, on the CPU."""
        device = next((p.device for p in self.first_stage.parameters()), images.device)
        mean = self.first_stage.encode(to_float(images.to(device))).mean  # type: ignore[operator]
        return to_bytes(numbers_only(self.first_stage.decode(mean).float())).cpu()  # type: ignore[operator]

    def record(self, images: int) -> dict[str, Any]:
        """Nothing is sampled."""
        return {"size": self.data.image_size, "conditions": "reference", "images": images}
