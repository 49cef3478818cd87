"""A small judge of categories, trained on real images only, and how often it puts images where they belong.

The judge never meets the diffusion model: held-out real images tell how good it is; samples are measured by that.
All rates are balanced: the mean over categories of the share put into the right one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.evaluation.judge_training import Learned, Show, descend, own_random_numbers

_SIDE = 32  # px the judge looks at


@dataclass(frozen=True)
class Agreement:
    """How often images asked for as a category are put into it."""

    categories: tuple[str, ...]
    right: tuple[int, ...]  # images per category put into the right one
    asked: tuple[int, ...]  # images per category

    @property
    def balanced(self) -> float:
        """Mean over the categories that have images of the share that is right."""
        shares = [right / asked for right, asked in zip(self.right, self.asked, strict=True) if asked]
        return sum(shares) / max(len(shares), 1)


class CategoryClassifier(nn.Module):
    """A convolutional network on 32 x 32 images: uint8 (B, 3, H, W) => logits (B, categories)."""

    learned = Learned(0, 0, 0)  # nothing yet

    def __init__(self, categories: Sequence[str], width: int = 32) -> None:
        super().__init__()
        self.categories = tuple(categories)
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
            nn.Linear(4 * width, len(self.categories)),
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) or prepared float images (B, 3, 32, 32) => logits."""
        return self.network(prepared(images) if images.dtype == torch.uint8 else images)

    @torch.inference_mode()
    def predict(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Category numbers (N,)."""
        self.eval()
        return torch.cat([self(part).argmax(dim=1) for part in images.split(batch_size)])

    def agreement(self, images: Tensor, labels: Tensor) -> Agreement:
        """Images uint8 (N, 3, H, W) against the categories (N,) they were asked or taken for."""
        count = len(self.categories)
        right = torch.bincount(labels[self.predict(images) == labels], minlength=count)
        return Agreement(
            self.categories, tuple(right.tolist()), tuple(torch.bincount(labels, minlength=count).tolist())
        )


def _block(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def prepared(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) => float (B, 3, 32, 32) in [-1, 1], averaged over areas."""
    pixels = images.float() / 127.5 - 1
    return pixels if pixels.shape[2:] == (_SIDE, _SIDE) else F.interpolate(pixels, (_SIDE, _SIDE), mode="area")


def train_classifier(
    images: Tensor,  # uint8 (N, 3, H, W), real
    labels: Tensor,  # (N,) category numbers
    categories: Sequence[str],
    *,
    steps: int = 700,
    batch_size: int = 64,
    seed: int = 0,
    show: Show = lambda updates: updates,
) -> CategoryClassifier:
    """Train on batches drawn with equal weight per category, moved, mirrored and recoloured a little."""
    counts = torch.bincount(labels, minlength=len(categories))
    if (counts == 0).any():
        missing = [name for name, count in zip(categories, counts.tolist(), strict=True) if not count]
        raise InputError(f"protocol.category_field: no training image is of category {', '.join(missing)}.")
    with own_random_numbers(seed):
        model = CategoryClassifier(categories).train()
        pixels = prepared(images).contiguous(memory_format=torch.channels_last)
        weights = (1 / counts.double())[labels]

        def loss() -> Tensor:
            chosen = torch.multinomial(weights, batch_size, replacement=True)
            return F.cross_entropy(model(_varied(pixels[chosen])), labels[chosen], label_smoothing=0.1)

        descend(model, loss, steps, learning_rate=3e-3, weight_decay=0.05, show=show)
    model.learned = Learned(len(images), steps, batch_size)
    return model.eval()


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
