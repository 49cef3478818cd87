"""A small image classifier trained on real images only, and its accuracy on real images and on samples.

The classifier never sees the diffusion model: its accuracy on validation images is the limit that samples are measured
by. All accuracies are balanced: the mean over classes of the fraction classified correctly.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.errors import InputError

Show = Callable[[range], Iterable[object]]  # the updates => the same, shown while they are made


@dataclass(frozen=True)
class Learned:
    """Size of a classifier's training."""

    examples: int  # real training images, or crops of them
    updates: int
    batch_size: int  # examples an update


@dataclass(frozen=True)
class ByClass:
    """Scores of classes, 0 .. 1, with the images or pixels behind each; None for a class without any."""

    scores: list[float | None]
    counts: list[int]

    @classmethod
    def of(cls, right: Tensor, total: Tensor, counts: Tensor | None = None) -> "ByClass":
        """right / total (K,), of the classes with a count (K,); default: `total`."""
        known = (total if counts is None else counts).tolist()
        rows = zip(right.tolist(), total.tolist(), known, strict=True)
        return cls([a / b if count else None for a, b, count in rows], known)

    @property
    def mean(self) -> float:
        """Over the classes that have a score."""
        known = [score for score in self.scores if score is not None]
        return sum(known) / max(len(known), 1)


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Random numbers of this seed inside; the generator outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
        yield


def descend(
    model: nn.Module,
    loss: Callable[[], Tensor],  # of a new batch
    learned: Learned,
    *,
    learning_rate: float,  # the highest of the cycle
    weight_decay: float,
    show: Show,
) -> None:
    """Train the model in place, in its own precision; it holds what it learned from.

    An autocast around all updates would train nothing: it keeps the first weights' casts until its end.
    """
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=learned.updates)
    for _ in show(range(learned.updates)):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, enabled=False):
            loss().backward()
        optimizer.step()
        schedule.step()
    model.eval().learned = learned  # type: ignore[assignment]


class ImageClassifier(nn.Module):
    """A convolutional network on images of a small side: uint8 (B, 3, H, W) => logits (B, classes)."""

    learned = Learned(0, 0, 0)  # not trained yet

    def __init__(self, classes: Sequence[str], width: int = 32, side: int = 32) -> None:
        """side: px that images are scaled to; comments are of 32."""
        super().__init__()
        self.classes, self.side = tuple(classes), side
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1, bias=False),  # 16 x 16
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),  # 8 x 8
            *_block(2 * width, 4 * width),
            nn.MaxPool2d(2),  # 4 x 4
            *_block(4 * width, 4 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * width, len(self.classes)),
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) or prepared float images (B, 3, side, side) => logits."""
        return self.network(prepared(images, self.side) if images.dtype == torch.uint8 else images)

    @torch.inference_mode()
    def predict(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Class numbers (N,)."""
        self.eval()
        return torch.cat([self(part).argmax(dim=1) for part in images.split(batch_size)])

    def agreement(self, images: Tensor, labels: Tensor) -> ByClass:
        """Fraction of images uint8 (N, 3, H, W) classified as their class numbers (N,)."""
        count = len(self.classes)
        right = torch.bincount(labels[self.predict(images) == labels], minlength=count)
        return ByClass.of(right, torch.bincount(labels, minlength=count))


def _block(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def prepared(images: Tensor, side: int = 32) -> Tensor:
    """uint8 (B, 3, H, W) => float (B, 3, side, side) in [-1, 1], averaged over areas."""
    pixels = images.float() / 127.5 - 1
    return pixels if pixels.shape[2:] == (side, side) else F.interpolate(pixels, (side, side), mode="area")


def train_classifier(
    images: Tensor,  # uint8 (N, 3, H, W), real
    labels: Tensor,  # (N,) class numbers
    classes: Sequence[str],
    *,
    steps: int = 700,
    batch_size: int = 64,
    side: int = 32,  # px that it sees
    seed: int = 0,
    show: Show = lambda updates: updates,
) -> ImageClassifier:
    """Train on batches sampled with equal weight per class, moved, mirrored and recoloured a little."""
    counts = torch.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        missing = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
        raise InputError(f"no training image is of class {', '.join(missing)}; pack the data with another split.")
    with own_random_numbers(seed):
        model = ImageClassifier(classes, side=side).train()
        pixels = prepared(images, side).contiguous(memory_format=torch.channels_last)
        weights = (1 / counts.double())[labels]

        def loss() -> Tensor:
            chosen = torch.multinomial(weights, batch_size, replacement=True)
            return F.cross_entropy(model(_varied(pixels[chosen])), labels[chosen], label_smoothing=0.1)

        learned = Learned(len(images), steps, batch_size)
        descend(model, loss, learned, learning_rate=3e-3, weight_decay=0.05, show=show)
    return model


def _varied(pixels: Tensor) -> Tensor:
    """Half mirrored, rotated, scaled and moved a little; contrast and colour changed a little."""
    count = len(pixels)
    angle, size = 0.3 * (torch.rand(count) - 0.5), 1 + 0.3 * (torch.rand(count) - 0.5)
    mirror = 1.0 - 2.0 * (torch.rand(count) < 0.5).float()
    cosine, sine = size * angle.cos(), size * angle.sin()
    shift = 0.2 * (torch.rand(2, count) - 0.5)
    rows = [torch.stack([mirror * cosine, -sine, shift[0]], 1), torch.stack([mirror * sine, cosine, shift[1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    gain, offset = 1 + 0.3 * (torch.rand(count, 3, 1, 1) - 0.5), 0.2 * (torch.rand(count, 3, 1, 1) - 0.5)
    return moved * gain + offset
