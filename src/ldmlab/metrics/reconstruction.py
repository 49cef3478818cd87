"""Measures of a first stage: quality of reconstructions, statistics of latents, use of codes, also while training.

All are sums over images, so that any split over batches and processes gives the same numbers.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from ldmlab import distributed
from ldmlab.contracts import Posterior
from ldmlab.nn import numerics

_SMALLEST_ERROR = 1e-10  # a perfect image counts as 100 dB
_FAINT = 8  # levels of 255 that a background pixel may be off


Distance = Callable[[Tensor, Tensor], Tensor]  # two batches in [-1, 1] => (B,)


class ReconstructionMeasures(Metric):
    """PSNR, PSNR over object pixels, SSIM and, with a network, LPIPS and PSIM of 8-bit images.

    `psnr`: 10 log10(255^2 / squared error), per image, averaged over images.
    `psnr_object`: the same over the pixels whose original differs from the background colour by more than 8 of 255 in
    any channel (lossy shards leave fainter traces around objects); their squared error is pooled over all images
    before the logarithm, so that nearly empty images do not dominate.
    `ssim`: 11 x 11 Gaussian window of deviation 1.5, data range 255, averaged over images.
    `psim`: LPIPS' distance in VGG's features without its learned channel weights. The paper prints a PSIM and does not
    define it; its values around 1 are of this size, ten times LPIPS', so this is our choice.
    """

    full_state_update = False
    higher_is_better: ClassVar = {  # type: ignore[assignment, misc]
        **dict.fromkeys(("psnr", "psnr_object", "ssim"), True),
        **dict.fromkeys(("lpips", "psim"), False),
    }
    title: ClassVar = {"psnr": "PSNR", "psnr_object": "PSNR, objects", "ssim": "SSIM", "lpips": "LPIPS", "psim": "PSIM"}
    meaning: ClassVar = {
        "psnr": "of reconstructions, dB, mean over images",
        "psnr_object": "the same over pixels that are not background, pooled",
        "ssim": "structural similarity of reconstructions",
        "lpips": "perceptual distance of reconstructions",
        "psim": "the same network without learned weights",
    }
    object_error_sum: Tensor
    object_values: Tensor
    images: Tensor

    def __init__(
        self,
        background: Sequence[int] | None = (255, 255, 255),  # None: no psnr_object
        lpips: Distance | None = None,
        psim: Distance | None = None,
    ) -> None:
        super().__init__()
        self.background = background
        self.lpips, self.psim = lpips, psim
        for name in ("psnr", "ssim", "lpips", "psim"):
            for part in ("sum", "square_sum"):
                self.add_state(f"{name}_{part}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("object_error_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("object_values", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @numerics.exact()
    def update(self, original: Tensor, reconstructed: Tensor) -> None:
        """Two batches of uint8 images (B, 3, H, W)."""
        x, y = original.float(), reconstructed.float()
        error = (x - y).square() / 255.0**2  # (B, 3, H, W)
        self._add("psnr", -10 * torch.log10(error.mean(dim=(1, 2, 3)).clamp_min(_SMALLEST_ERROR)))
        if self.background is not None:
            colour = torch.tensor(list(self.background), dtype=torch.int16, device=original.device)[:, None, None]
            inside = ((original.to(torch.int16) - colour).abs() > _FAINT).any(dim=1, keepdim=True)  # (B, 1, H, W)
            self.object_error_sum += (error * inside).double().sum()
            self.object_values += 3 * inside.sum()
        ssim = structural_similarity_index_measure(y, x, data_range=255.0, reduction="none")
        self._add("ssim", torch.as_tensor(ssim).reshape(len(x)))
        for name, distance in (("lpips", self.lpips), ("psim", self.psim)):
            if distance is not None:
                self._add(name, distance(x / 127.5 - 1, y / 127.5 - 1))
        self.images += len(original)

    def _add(self, name: str, values: Tensor) -> None:
        """One number an image (B,)."""
        values = values.double()
        getattr(self, f"{name}_sum").add_(values.sum())
        getattr(self, f"{name}_square_sum").add_(values.square().sum())

    def compute(self) -> dict[str, float]:
        """Numbers by name, and with `_std` their deviation over images."""
        count = max(int(self.images), 1)
        found: dict[str, float] = {}
        for name in ("psnr", "ssim", *(n for n in ("lpips", "psim") if getattr(self, n) is not None)):
            mean = float(getattr(self, f"{name}_sum")) / count
            spread = float(getattr(self, f"{name}_square_sum")) / count - mean**2
            found |= {name: mean, f"{name}_std": math.sqrt(max(spread, 0.0))}
        if self.background is not None and int(self.object_values):
            error = float(self.object_error_sum) / int(self.object_values)
            found["psnr_object"] = -10 * math.log10(max(error, _SMALLEST_ERROR))
        return found


class LatentStatistics(Metric):
    """Mean, standard deviation and extremes of raw latents, per channel.

    The deviation is that of sampled latents: the posterior's own variance is added to the spread of its means.
    """

    full_state_update = False
    value_sum: Tensor
    square_sum: Tensor
    smallest: Tensor
    largest: Tensor
    values: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        for name in ("value_sum", "square_sum"):
            self.add_state(name, torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("smallest", torch.full((channels,), math.inf), dist_reduce_fx="min")
        self.add_state("largest", torch.full((channels,), -math.inf), dist_reduce_fx="max")
        self.add_state("values", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, posterior: Posterior) -> None:
        """The posteriors of a batch of images."""
        mean = posterior.mean.float()
        variance = torch.exp(posterior.logvar.float()) if posterior.logvar is not None else torch.zeros_like(mean)
        self.value_sum += mean.double().sum(dim=(0, 2, 3))
        self.square_sum += (mean.double().square() + variance.double()).sum(dim=(0, 2, 3))
        self.smallest = torch.minimum(self.smallest, mean.amin(dim=(0, 2, 3)))
        self.largest = torch.maximum(self.largest, mean.amax(dim=(0, 2, 3)))
        self.values += mean.numel() // self.channels

    def compute(self) -> dict[str, float]:
        """`latent_mean/0`, `latent_std/0`, `latent_min/0`, `latent_max/0` and so on, and `latent_std` over all."""
        count = int(self.values)
        if not count:
            return {}
        mean, square = self.value_sum / count, self.square_sum / count
        std = (square - mean.square()).clamp_min(0).sqrt()
        by_name = {"mean": mean, "std": std, "min": self.smallest, "max": self.largest}
        found = {f"latent_{k}/{c}": v for k, values in by_name.items() for c, v in enumerate(values.tolist())}
        found["latent_std"] = float((square.mean() - mean.mean().square()).clamp_min(0).sqrt())
        return found


def codebook_use(counts: Tensor) -> dict[str, float]:
    """`codebook_use`, the share of codes with a count, `codebook_perplexity`, exp(- sum p log p), and its bits.

    The bits, log2 of the perplexity, are `codebook_entropy`; counts (K,).
    """
    share = counts.double() / counts.sum().clamp_min(1)
    entropy = torch.special.entr(share).sum()
    return {
        "codebook_use": float((counts > 0).double().mean()),
        "codebook_perplexity": float(entropy.exp()),
        "codebook_entropy": float(entropy) / math.log(2),
    }


_log = logging.getLogger(__name__)


class CodebookWindow:
    """Counts codes over all processes; the metrics are those of the last full window and are stored in checkpoints."""

    def __init__(self, codebook_size: int, images: int, alert: float, remedy: str = "") -> None:
        self.images, self.alert = images, alert  # length of a window; share below which it warns
        self.remedy = remedy or "fewer codes or a lower learning rate keep more of it alive"
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.counted = 0  # images of the window that is open
        self.numbers: dict[str, float] = {}  # codebook_use, codebook_perplexity, codebook_entropy
        self._step = torch.zeros_like(self.counts)  # this process's codes since the last step ended

    def add(self, codes: Tensor) -> None:
        """The codes of a micro-batch, (B, h, w)."""
        codes = codes.flatten()
        self.counts, self._step = self.counts.to(codes.device), self._step.to(codes.device)  # once
        self._step.scatter_add_(0, codes, torch.ones_like(codes))

    def end_step(self, step: int, images: int) -> None:
        """A step on so many images of all processes has ended; a full window is read and a new one begins."""
        self.counts += distributed.sum_(self._step)
        self._step = torch.zeros_like(self._step)
        self.counted += images
        if self.counted < self.images:
            return
        self.numbers = codebook_use(self.counts.cpu())
        if self.numbers["codebook_use"] < self.alert and distributed.rank() == 0:
            _log.warning(
                "step %d: only %.1f %% of the codebook was used over the last %d images; %s",
                step,
                100 * self.numbers["codebook_use"],
                self.counted,
                self.remedy,
            )
        self.counts.zero_()
        self.counted = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint, between two steps."""
        return {"counts": self.counts.clone().cpu(), "counted": self.counted, "numbers": dict(self.numbers)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.counts.copy_(state["counts"])
        self.counted, self.numbers = state["counted"], dict(state["numbers"])
