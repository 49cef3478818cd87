"""The sheet of one first stage as plain values: all that `ldmlab first-stage` measures.

Reconstruction and generation are scored in the rooms of the downsampling comparison. The denoiser is that of
conf/experiment/tradeoff/generation.yaml, and that of every first stage costs the same FLOPs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.app.all_stages import FactorScores
from ldmlab.app.compose import compose, plain
from ldmlab.app.factor_stages import Factor
from ldmlab.app.plans import latent_spec
from ldmlab.build import LoadedFirstStage
from ldmlab.contracts import FirstStage, LatentSpec, Posterior
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.flops import denoiser_cost
from ldmlab.evaluation.record import reference_record
from ldmlab.metrics import latent_measures as measures
from ldmlab.nn.pixels import to_float
from ldmlab.provenance import provenance
from ldmlab.randomness import normal

SIDE = 8  # tokens of the denoiser along an axis, where the latent can be cut so
_COUNTED = LatentSpec(4, SIDE, SIDE, 8)  # the latent whose steps are counted


def patch_size(latent: LatentSpec) -> int:
    """The divisor of the latent's side by which its tokens are nearest to SIDE x SIDE."""
    side = latent.height
    return min((p for p in range(1, side + 1) if side % p == 0), key=lambda p: abs(side // p - SIDE))


@dataclass
class GenerationScore:
    """A first stage's scores with each network of `features`; what several share lies in `out`."""

    folder: Path  # of the first stage
    loaded: LoadedFirstStage
    data: Mapping[str, Any]  # its node
    features: Mapping[str, Mapping[str, Any]]  # nodes by name
    out: Path
    steps: int  # of a denoiser on latents of 8 x 8 x 4
    samples: int  # of each denoiser
    batch_size: int
    device: str

    @cached_property
    def latent(self) -> LatentSpec:
        return latent_spec(self.loaded.module, self.data["image_size"])

    def reconstruction(self) -> dict[str, Any]:
        """metrics.json by the name of the features."""
        return self._evaluated(FactorScores(self._factor(0)), self.folder, "reconstruction")

    def generation(self, seed: int) -> dict[str, Any]:
        """Train the denoiser of a seed, unless it is there: its cost, and metrics.json by the name of the features."""
        factor = self._factor(seed).train()
        return {
            "seed": seed,
            "folder": str(factor.denoiser),
            "patch_size": factor.config["backbone"]["patch_size"],
            "steps": factor.max_steps,
            "parameters": factor.cost.parameters,
            "flops": factor.cost.training * factor.images_per_step * factor.max_steps,
            "evaluations": self._evaluated(FactorScores(factor), factor.denoiser, "protocol"),
        }

    def _evaluated(self, scores: FactorScores, model: Path, protocol: str) -> dict[str, Any]:
        found, scores.kept = {}, []  # each network sees the same samples
        for name, node in self.features.items():
            scores.features = dict(node)
            found[name] = scores.evaluated(model, scores.options[protocol], f"sheet-{name}")
        return found

    def _factor(self, seed: int) -> Factor:
        given = ["data.train=given", "data.val=given", f"data.image_size={self.loaded.image_size}", f"seed={seed}"]
        recipe = plain(compose("train", ["experiment=tradeoff/generation", *given]))
        backbone, trainer, stage = recipe["backbone"], recipe["trainer"], recipe["stage"]
        counted = {**backbone, "in_channels": _COUNTED.channels, "out_channels": _COUNTED.channels}
        flops = denoiser_cost(counted, _COUNTED, {}).training * trainer["micro_batch"] * self.steps
        same = {"batch_size": self.batch_size}
        protocol = stage["evaluation"]["protocol"] | {"samples": self.samples}
        scored = {**same, "features": next(iter(self.features.values())), "protocol": protocol}
        more = {
            "shared": str(self.out / "latents"),
            "compute_budget": flops / 1e18,
            "evaluation": stage["evaluation"] | scored,
        }
        own = {
            "data": self.data,
            "first_stage": self.loaded.spec,
            "from_run": str(self.folder) if self.loaded.module.state_dict() else None,  # pixels are not encoded
            "backbone": backbone | {"patch_size": patch_size(self.latent)},
            "trainer": trainer | {"accelerator": {"auto": "auto", "cpu": "cpu"}.get(self.device, "gpu")},
            "paths": recipe["paths"] | {"runs": str(self.out / "generation")},
            "stage": stage | more | {"encode": stage["encode"] | same},
        }
        return Factor(recipe | own)


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
