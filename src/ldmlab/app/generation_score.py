"""Reconstruction and generation by one first stage, in the rooms of the downsampling comparison.

The denoiser is that of conf/experiment/tradeoff/generation.yaml, and that of every first stage costs the same FLOPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ldmlab.app.all_stages import FactorScores
from ldmlab.app.compose import compose, plain
from ldmlab.app.factor_stages import Factor
from ldmlab.app.plans import latent_spec
from ldmlab.build import LoadedFirstStage
from ldmlab.contracts import LatentSpec
from ldmlab.evaluation.flops import denoiser_cost

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
        found = {}
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
