"""A small network that says what each pixel shows, trained on real images only.

It looks at 64 x 64 px, whatever the images' size; label maps follow by nearest pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.evaluation.judge_training import Learned, Show, descend, own_random_numbers
from ldmlab.nn.pixels import to_float

SIDE = 64  # px


class Segmenter(nn.Module):
    """Float images (B, 3, 64, 64) in [-1, 1] => logits (B, classes, 64, 64)."""

    learned = Learned(0, 0, 0)  # nothing yet

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.classes = classes
        self.level_1 = nn.Sequential(*_block(3, width // 2))  # 64 x 64
        self.level_2 = nn.Sequential(*_block(width // 2, width, stride=2))  # 32 x 32
        self.level_4 = nn.Sequential(*_block(width, 2 * width, stride=2), *_block(2 * width, 2 * width))  # 16 x 16
        self.level_8 = nn.Sequential(*_block(2 * width, 3 * width, stride=2), *_block(3 * width, 3 * width))  # 8 x 8
        self.up_4 = nn.Sequential(*_block(5 * width, 2 * width))
        self.up_2 = nn.Sequential(*_block(3 * width, width))
        self.up_1 = nn.Sequential(*_block(width + width // 2, width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Each level of the way down joins the way up."""
        full = self.level_1(pixels)
        half = self.level_2(full)
        quarter = self.level_4(half)
        x = self.up_4(torch.cat([_twice(self.level_8(quarter)), quarter], dim=1))
        x = self.up_2(torch.cat([_twice(x), half], dim=1))
        return self.head(self.up_1(torch.cat([_twice(x), full], dim=1)))

    @torch.inference_mode()
    def predict(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """uint8 (N, 3, H, W) => class of each pixel, uint8 (N, 64, 64)."""
        self.eval()
        parts = [self(seen(part)).argmax(dim=1).to(torch.uint8) for part in images.split(batch_size)]
        return torch.cat(parts)


def _block(inside: int, outside: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outside), nn.ReLU()]


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def seen(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) => float (N, 3, 64, 64) in [-1, 1]."""
    pixels = to_float(images)
    if pixels.shape[2:] == (SIDE, SIDE):
        return pixels
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def seen_labels(labels: Tensor) -> Tensor:
    """Whole numbers (N, H, W) => int64 (N, 64, 64), the pixel at the centre of each."""
    rows, columns = (
        ((torch.arange(SIDE) + 0.5) * size / SIDE).to(torch.int64) for size in (labels.shape[1], labels.shape[2])
    )
    return labels[:, rows[:, None], columns].to(torch.int64)


def train_segmenter(
    images: Tensor,  # uint8 (N, 3, 64, 64), real
    labels: Tensor,  # uint8 or int64 (N, 64, 64)
    classes: int,
    *,
    steps: int = 400,
    batch_size: int = 24,
    seed: int = 0,
    show: Show = lambda updates: updates,
) -> Segmenter:
    """Pixels of rare classes count more (by the root of their share); mirrored and recoloured a little."""
    with own_random_numbers(seed):
        model = Segmenter(classes).to(memory_format=torch.channels_last).train()
        share = torch.bincount(labels.flatten().to(torch.int64), minlength=classes) / labels.numel()
        weights = share.clamp_min(1e-4).rsqrt()
        weights = weights / (weights * share).sum()

        def loss() -> Tensor:
            chosen = torch.randint(len(images), (batch_size,))
            pixels, asked = _varied(seen(images[chosen]), labels[chosen].to(torch.int64))
            return F.cross_entropy(model(pixels.contiguous(memory_format=torch.channels_last)), asked, weights)

        descend(model, loss, steps, learning_rate=4e-3, weight_decay=0.02, show=show)
    model.learned = Learned(len(images), steps, batch_size)
    return model.eval()


def _varied(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Half mirrored; contrast and colour changed a little."""
    mirror = torch.rand(len(pixels)) < 0.5
    pixels = torch.where(mirror[:, None, None, None], pixels.flip(3), pixels)
    labels = torch.where(mirror[:, None, None], labels.flip(2), labels)
    gain = 1 + 0.3 * (torch.rand(len(pixels), 3, 1, 1) - 0.5)
    return pixels * gain + 0.2 * (torch.rand(len(pixels), 3, 1, 1) - 0.5), labels
