"""Guidance by the difference of two outputs, where and how much; and by gradients.

    guided = weak + scale (output - weak)
The weak output is that without the conditions (Ho & Salimans 2022, eq. 6, with scale = 1 + w) or for a negative prompt;
or that of a weaker model with the same conditions (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of
Itself", eq. 3).

Gradient guidance wraps `denoise` and composes with both: a log-likelihood l(x) adds its gradient to the score of
x = alpha clean + sigma eps, and with a scale s
    eps' = eps - s sigma grad_x l(x)      (Dhariwal & Nichol 2021, algorithm 2; paper appendix C)
    clean' = clean + s (sigma^2 / alpha) grad_x l(x)
which are the same shift. Where a guider wraps another one, the inner shift counts as constant.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.contracts import Conditioning, Denoise, Level, Path
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float

_ROUNDING = 1e-6  # relative; a level that is a bound but for rounding is inside


@dataclass(frozen=True)
class Guidance:
    """The scale of guidance, the levels and channels where it acts, and how its deviation is put right."""

    scale: float = 1.0  # 1: off
    interval: tuple[float, float] | None = None  # guided between these levels, both included; None: everywhere
    unit: str = "position"  # of the interval: 0 (clean) .. 1 (noise) of the path | sigma, which is sigma / alpha
    rescale: float = 0.0  # fraction of the correction of the deviation (Lin et al. 2024, "phi")
    channels: int | None = None  # guided ones, the first of the latent; None: all
    weak: Any = None  # LatentDiffusion of autoguidance; None: the model itself without its conditions

    def __post_init__(self) -> None:
        if self.interval is not None:
            self._check_interval(*self.interval)
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale={self.rescale} is outside 0 .. 1; choose 0 (off) or for instance 0.7.")
        if self.channels is not None and self.channels < 1:
            raise InputError(f"guided_channels={self.channels} guides nothing; choose 1 or more, or leave it out.")

    def _check_interval(self, low: float, high: float) -> None:
        most = {"position": 1.0, "sigma": math.inf}.get(self.unit, -1.0)
        if not 0 <= low <= high <= most:
            raise InputError(
                f"guidance_interval={low:g}..{high:g} is no interval of {self.unit}; give two positions that rise from "
                "0 (clean) to 1 (noise), such as 0.1..0.8, or with guidance_interval_unit=sigma 0.28..2.9."
            )

    def acts(self, level: Level, path: Path) -> bool:
        """Whether a level is guided; a second evaluation of a step is guided where the step's first one is.

        Levels beyond an end of the path count as that end.
        """
        if self.interval is None:
            return True
        time = level.time if level.start is None else level.start
        assert time is not None  # None at the clean end only, which no network sees
        if self.unit == "position":
            here = float(path.position(torch.tensor([time], dtype=torch.float64)).clamp(0, 1))
        else:
            here = _ratio(level if level.start is None else path.level(time))
        low, high = self.interval
        return low - _ROUNDING * abs(low) <= here <= high + _ROUNDING * abs(high)

    @property
    def corrects(self) -> bool:
        """Whether `corrected` changes anything."""
        return self.rescale > 0 or self.channels is not None

    def corrected(self, guided: Tensor, output: Tensor) -> Tensor:
        """A guided output (B, C, h, w), rescaled; channels that are not guided are those of the model's own output.

        With phi = rescale, std over the guided values of an image (Lin et al. 2024, eq. 15 and 16):
            guided (phi std(output) / std(guided) + 1 - phi)
        """
        count = output.shape[1] if self.channels is None else self.channels
        guided, strong = guided[:, :count], output[:, :count]
        if self.rescale:
            over = tuple(range(1, guided.ndim))
            ratio = strong.std(dim=over, keepdim=True) / guided.std(dim=over, keepdim=True)
            guided = guided * (self.rescale * ratio + 1 - self.rescale)
        return torch.cat([guided, output[:, count:]], dim=1)


def _ratio(level: Level) -> float:
    return level.sigma / level.alpha if level.alpha else math.inf


def stacked(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings as one batch of twice the size."""
    pairs = {slot: (value, getattr(second, slot)) for slot, value in vars(first).items()}
    return Conditioning(**{slot: None if pair[0] is None else torch.cat(pair) for slot, pair in pairs.items()})


def check_guidance(scale: float, trained: bool | None, conditioned: bool, weak: bool = False) -> None:
    """InputError for a scale that is no number or that the model was not trained for; a warning if that is unknown."""
    if not math.isfinite(scale):
        raise InputError(f"guidance_scale={scale} is no number; choose 1 (off) or for instance 3.")
    if scale == 1 or weak:
        return
    if not conditioned:
        raise InputError(
            f"guidance_scale={scale} needs conditions and this model has none; use guidance_scale=1, or a weak_model."
        )
    if trained is False:
        raise InputError(
            f"guidance_scale={scale} needs a model trained with dropped conditions, unlike this one; use "
            "guidance_scale=1, a weak_model, or train with conditioner drop rates above 0."
        )
    if trained is None:
        warnings.warn(
            "nothing is known about dropped conditions in this model's training; guidance may not help.",
            stacklevel=3,
        )


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
