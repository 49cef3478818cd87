"""Gradient guidance: wrappers around `denoise` that compose with classifier-free guidance and autoguidance.

A log-likelihood l(x) adds its gradient to the score of x = alpha clean + sigma eps, and with a scale s
    eps' = eps - s sigma grad_x l(x)      (Dhariwal & Nichol 2021, algorithm 2; paper appendix C)
    clean' = clean + s (sigma^2 / alpha) grad_x l(x)
which are the same shift. Where a guider wraps another one, the inner shift counts as constant.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.contracts import Denoise, Level, Path
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float


def guided_by_noisy(denoise: Denoise, log_likelihood: Callable[[Tensor, Level], Tensor], scale: float) -> Denoise:
    """By a log-likelihood (B,) of the noisy latent (B, C, h, w); no gradient goes through the denoiser."""

    def guided(x: Tensor, level: Level) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient = _gradient(log_likelihood(leaf, level), leaf)
        return _shifted(denoise(x, level), gradient, level, scale)

    return guided


def guided_by_clean(denoise: Denoise, log_likelihood: Callable[[Tensor], Tensor], scale: float) -> Denoise:
    """By a log-likelihood of the clean estimate; its gradient goes through the denoiser to the noisy latent."""

    def guided(x: Tensor, level: Level) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            clean = denoise(leaf, level)
            gradient = _gradient(log_likelihood(clean), leaf)
        return _shifted(clean.detach(), gradient, level, scale)

    return guided


def _gradient(values: Tensor, leaf: Tensor) -> Tensor:
    """Of each image's value (B,) for its own latent; what ran in float32 also goes back in it."""
    with torch.autocast(leaf.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient


def with_signal(grid: list[Level], path: Path) -> list[Level]:
    """A grid of a continuous path that begins at 0.999 of it where it would begin without any signal to guide by."""
    if grid[0].alpha > 0 or hasattr(path, "steps"):
        return grid
    return [path.level(float(path.time(torch.tensor(0.999, dtype=torch.float64)))), *grid[1:]]


def _shifted(clean: Tensor, gradient: Tensor, level: Level, scale: float) -> Tensor:
    """clean + s (sigma^2 / alpha) grad."""
    if level.alpha == 0:
        raise InputError(
            f"gradient guidance is undefined at time {level.time} (alpha = 0: no signal is left); "
            "use a schedule that keeps some signal, or no guider."
        )
    return clean + scale * level.sigma**2 / level.alpha * gradient


class ClassifierGuider:
    """The paper's LDM-8-G: s grad_x log p(class | x, t) of a classifier of noisy latents."""

    reads = frozenset({"class_id"})

    def __init__(
        self,
        classifier: nn.Module,  # x (B, C, h, w), t (B,) => logits (B, classes)
        scale: float = 10.0,  # s; the paper's
        name: str = "",  # of the classifier, for the record
    ) -> None:
        _check("classifier scale", scale)
        self.classifier, self.scale, self.name = classifier.eval().requires_grad_(False), scale, name

    def __call__(self, denoise: Denoise, batch: Mapping[str, Any]) -> Denoise:
        classes = torch.as_tensor(batch["class_id"])  # (B,)
        known = int(self.classifier.classes)  # type: ignore[arg-type]
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < known:
            raise InputError(
                f"class_id {int(classes.min())} .. {int(classes.max())} is outside the classifier's 0 .. {known - 1}; "
                "choose other classes or another classifier."
            )

        def log_likelihood(x: Tensor, level: Level) -> Tensor:
            assert level.time is not None  # None at the end only, where nothing is guided
            time = torch.full((len(x),), level.time, device=x.device)
            with torch.autocast(x.device.type, enabled=False):  # small gradients vanish in half precision
                logits = self.classifier(x.float(), time)
            return F.log_softmax(logits.float(), dim=1).gather(1, classes.to(x.device)[:, None])[:, 0]

        return guided_by_noisy(denoise, log_likelihood, self.scale)

    def as_text(self) -> dict[str, Any]:
        return {"classifier": self.name, "classifier_scale": self.scale}


class ImageGuider:
    """Pulls the decoded clean estimate towards an image, usually a smaller one (paper appendix C).

    l(x) = -distance(shrink(decode(clean(x))), target); the squared error is that of a Gaussian of variance 1.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],  # final latents => pixels in [-1, 1], with gradients
        distance: Callable[[Tensor, Tensor], Tensor],  # two batches of pixels => (B,): squared_error, LPIPS
        weight: float = 1.0,  # s; the paper does not print its own
        target: Tensor | None = None,  # one image for all, uint8 (3, h, w); None: low_resolution of the batch
        name: str = "",  # of distance and image, for the record
    ) -> None:
        _check("guider weight", weight)
        self.decode, self.distance, self.weight = decode, distance, weight
        self.target, self.name = target, name
        self.reads = frozenset({"low_resolution"} if target is None else ())

    def __call__(self, denoise: Denoise, batch: Mapping[str, Any]) -> Denoise:
        target = batch["low_resolution"] if self.target is None else self.target[None]
        aim = to_float(target)  # (B or 1, 3, h, w)

        def log_likelihood(clean: Tensor) -> Tensor:
            with torch.autocast(clean.device.type, enabled=False):
                images = shrunk(self.decode(clean.float()).float(), (aim.shape[2], aim.shape[3]))
                return -self.distance(images, aim.to(images.device).expand_as(images))

        return guided_by_clean(denoise, log_likelihood, self.weight)

    def as_text(self) -> dict[str, Any]:
        return {"guider": self.name, "guider_weight": self.weight}


def squared_error(images: Tensor, target: Tensor) -> Tensor:
    """-log of a Gaussian of variance 1 without its constant: half the summed squares, (B,)."""
    return 0.5 * (images - target).square().sum(dim=(1, 2, 3))


def shrunk(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to (B, C, *size), bicubic and anti-aliased as in super-resolution; InputError for a larger size."""
    if images.shape[2:] == size:
        return images
    if size[0] > images.shape[2] or size[1] > images.shape[3]:
        raise InputError(
            f"the guider's image of {size[0]}x{size[1]} is larger than the sample of {images.shape[2]}x"
            f"{images.shape[3]} (height x width); give a smaller image or sample at a larger size."
        )
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def _check(option: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{option}={value} is not a finite number of 0 or more; choose 0 (off) or more.")
