"""The sheet of one first stage as plain values: everything that `ldmlab first-stage` measures."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.app.generation_score import GenerationScore
from ldmlab.contracts import FirstStage, Posterior
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.record import reference_record
from ldmlab.metrics import latent_measures as measures
from ldmlab.nn.pixels import to_float
from ldmlab.provenance import provenance
from ldmlab.randomness import normal


def sheet_of(score: GenerationScore, data: ShardData, images: int, seeds: int) -> dict[str, Any]:
    """sheet.json: reconstruction, latents of the first `images` validation images, generation by `seeds` denoisers."""
    loaded, latent = score.loaded, score.latent
    batches = data.eval_loader("val", score.batch_size, 1, 0, images, kind="images")
    x = torch.cat([to_float(batch["image"]) for batch in batches if "image" in batch])
    if len(x) < 2:
        raise InputError(f"data.val={data.val} has {len(x)} readable images; a sheet needs 2 or more.")
    made = {"path": str(loaded.files.folder), "step": loaded.files.step, "fingerprint": loaded.fingerprint}
    size = {"image_size": data.image_size, "latent": [latent.channels, latent.height, latent.width]}
    return {
        "model": {**made, "downsampling": latent.downsampling, **size},
        "data": reference_record(data, "val", len(x)),
        "reconstruction": score.reconstruction(),
        **LatentSheet(loaded.module, score.batch_size).measured(x),  # type: ignore[arg-type]
        "generation": [score.generation(seed) for seed in range(seeds)],
        "provenance": provenance(),
    }


class LatentSheet:
    """Measures of the latents of a few images (N, 3, H, W) in [-1, 1], all in memory."""

    def __init__(self, first_stage: FirstStage, batch_size: int) -> None:
        self.first_stage, self.batch_size = first_stage, batch_size

    def _batches(self, x: Tensor) -> Iterator[Tensor]:
        device = next(iter(self.first_stage.parameters()), x).device  # type: ignore[attr-defined]
        return (part.to(device) for part in x.split(self.batch_size))

    def posterior(self, images: Tensor) -> Posterior:
        parts = [self.first_stage.encode(part).moments().float().cpu() for part in self._batches(images)]
        return Posterior.from_moments(torch.cat(parts), self.first_stage.latent_channels)

    def encode(self, images: Tensor) -> Tensor:
        """Means of the raw latents, (N, C, h, w)."""
        return self.posterior(images).mean

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) => images in about [-1, 1]."""
        return torch.cat([self.first_stage.decode(part).float().cpu() for part in self._batches(latents)])

    @torch.inference_mode()
    def measured(self, images: Tensor) -> dict[str, Any]:
        """Of sampled latents, as a denoiser trains on them: statistics, spectrum; of their means: smoothness, codes."""
        posterior = self.posterior(images)
        means = posterior.mean
        noise = normal(0, "sheet", torch.arange(len(means)), tuple(means.shape[1:]))
        latents, channels = posterior.sample(noise), measures.channel_statistics(posterior.sample(noise))
        if posterior.logvar is not None:
            spreads = (0.5 * posterior.logvar).exp().mean(dim=(0, 2, 3)).tolist()
            channels = [{**one, "noise": own} for one, own in zip(channels, spreads, strict=True)]
        small = F.interpolate(images, means.shape[2:], mode="area")
        return {
            "statistics": {"channels": channels, "effective_rank": measures.effective_rank(latents)},
            "spectrum": {"latents": measures.spectrum(latents), "images": measures.spectrum(small)},
            "smoothness": {
                "noise": measures.noise_response(self.decode, images, means, noise),
                "interpolation": measures.interpolation(self.encode, self.decode, means),
                "equivariance": measures.equivariance(self.encode, self.decode, images, means),
            },
            "codebook": self._codebook(images),
        }

    def _codebook(self, images: Tensor) -> dict[str, float] | None:
        size: int | None = getattr(self.first_stage, "codebook_size", None)
        if size is None:
            return None
        nothing = images.new_empty(0)
        codes = [self.first_stage.reconstruct(part, nothing).codes for part in self._batches(images)]
        return measures.codebook(torch.cat([one.cpu() for one in codes if one is not None]), size)
