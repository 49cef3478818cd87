"""Training of a denoiser on latents."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldmlab.contracts import Level, Sampler
from ldmlab.diffusion.alignment import Alignment
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.errors import InputError, one_of
from ldmlab.inference.grids import labels_of
from ldmlab.nn.pixels import to_bytes
from ldmlab.training.data_module import Batch, first_images, gathered, slice_of_process
from ldmlab.training.stage import Losses, Stage

_VAL_SEED = 0x5EED  # the validation noise is the same in every run, so that curves of runs compare


class DiffusionStage(Stage):
    """A latent diffusion model against its loss; the denoiser's weights are averaged."""

    kind: ClassVar[str] = "diffusion"
    averaged: ClassVar[str | None] = "denoiser"
    monitor = "loss"
    panel_titles: ClassVar[Mapping[str, str]] = {
        "samples": "samples for the conditions of validation images, averaged weights",
        "val": "the validation images themselves, as encoded and decoded by the first stage",
    }

    def __init__(
        self,
        *,
        diffusion: LatentDiffusion,
        sampler: Sampler,  # for the panels
        grid: list[Level],  # its noise levels
        guidance_scale: float = 3.0,  # of the panels; 1 where conditions are never dropped
        guidance_interval: tuple[float, float] | None = None,  # positions between which the panels are guided
        guidance_rescale: float = 0.0,  # of the panels, 0 .. 1
        guided_channels: int | None = None,  # of the panels, the first of the latent; None: all
        panel_count: int = 16,  # images in a panel
        val_draws: int = 4,  # fixed noise levels and noises for each validation image
        alignment: Alignment | None = None,  # of the denoiser with frozen encoders
        encoder_precision: str = "float32",  # of a first stage that runs while training: float32 | bfloat16
        **options: Any,  # of Stage
    ) -> None:
        super().__init__(**options)
        one_of("stage.encoder_precision", encoder_precision, ("float32", "bfloat16"))
        diffusion.encoder_precision = encoder_precision
        if val_draws < 1 or panel_count < 1:
            raise InputError(f"val_draws={val_draws} and panel_count={panel_count} must be at least 1.")
        self.diffusion = diffusion
        self.sampler, self.grid = sampler, grid
        scale = guidance_scale if diffusion.guidance_trained and len(diffusion.conditioners) else 1.0
        interval = None if guidance_interval is None else (guidance_interval[0], guidance_interval[1])
        self.guidance = Guidance(scale, interval, rescale=guidance_rescale, channels=guided_channels)
        diffusion.check_guidance(self.guidance)
        self.panel_count, self.val_draws, self.alignment = panel_count, val_draws, alignment

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The backbone, the trainable conditioners and the projectors of an alignment are one group."""
        parts = [self.diffusion, *([] if self.alignment is None else [self.alignment])]
        return {"denoiser": [p for part in parts for p in part.parameters() if p.requires_grad]}

    def saved(self) -> dict[str, nn.Module]:
        """Backbone, latent scale and, unless frozen, conditioners; frozen parts are stored once, apart from them."""
        modules = {"denoiser": self.diffusion.backbone, "latent_scale": self.diffusion.latent_scale}
        if any(p.requires_grad for p in self.diffusion.conditioners.parameters()):
            modules["conditioner"] = self.diffusion.conditioners
        if any(True for _ in self.diffusion.objective.parameters()):  # of a learned weighting
            modules["objective"] = self.diffusion.objective
        if (target := getattr(self.diffusion, "target_network", None)) is not None:  # of a consistency model
            modules["target"] = target
        if self.alignment is not None:
            modules["projectors"] = self.alignment.projectors
        return modules

    def networks(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """The backbone, and conditioners and a weighting that are trained."""
        found = [(self.diffusion.backbone, ()), *((part, ("null",)) for part in self.diffusion.conditioners.values())]
        if isinstance(weighting := self.diffusion.objective.weighting, nn.Module):
            found.append((weighting, ("finished",)))
        if self.alignment is not None:
            found.append((self.alignment.projectors, ()))
        return [one for one in found if any(p.requires_grad for p in one[0].parameters())]

    def losses(self, group: str, batch: Batch) -> Losses:
        """Mean of the images' losses; their noise levels by position on the path, 0 the cleanest."""
        seen, cut = self._captions()
        watching = nullcontext(list[Tensor]()) if self.alignment is None else self.alignment.watching()
        with watching as features:
            loss, t = self.diffusion.loss(batch, self.seed)
        total = loss.mean()
        metrics = {"loss": total}
        if self.alignment is not None:
            total = self._aligned(self.alignment, total, features[-1], batch, metrics)
        now_seen, now_cut = self._captions()
        if now_seen > seen:
            metrics["captions_cut"] = total.new_full((), (now_cut - cut) / (now_seen - seen))
        return Losses(total, metrics, {"loss": loss, "level": partial(self.diffusion.path.position, t)})

    @property
    def phase(self) -> tuple[Any, ...]:
        """With whether the alignment has ended."""
        return (*super().phase, self.alignment is not None and self.alignment.ended(self.step))

    def _aligned(
        self, alignment: Alignment, loss: Tensor, features: Tensor, batch: Batch, metrics: dict[str, Tensor]
    ) -> Tensor:
        """The loss with the alignment's term, which is logged as well."""
        if alignment.ended(self.step):
            return loss + alignment.unused(features)
        metrics["alignment"] = alignment(features, batch)
        return loss + alignment.weight * metrics["alignment"]

    def _update(self, active: list[str]) -> None:
        super()._update(active)
        if (taken := getattr(self.diffusion, "step_taken", None)) is not None:
            taken()

    def tokenizers(self) -> dict[str, Any]:
        named = self.diffusion.conditioners.items()
        return {name: c.tokenizer for name, c in named if hasattr(c, "cut") and hasattr(c, "tokenizer")}

    def _captions(self) -> tuple[int, int]:
        """Number of captions seen by text conditioners so far, and number of those that were cut."""
        counting: list[Any] = [c for c in self.diffusion.conditioners.values() if hasattr(c, "cut")]
        return sum(c.seen for c in counting), sum(c.cut for c in counting)

    def on_validation_epoch_start(self) -> None:
        self._total, self._count = torch.zeros((), dtype=torch.float64, device=self.device), 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses with fixed times and noises."""
        counted = "filler" not in batch
        for draw in range(self.val_draws if len(batch["position"]) else 0):
            self._total += counted * self.diffusion.loss(batch, _VAL_SEED + draw)[0].double().sum()
            self._count += counted * len(batch["position"])

    def validation_metrics(self) -> dict[str, float]:
        return self.mean_over_processes({"loss": self._total}, self._count)

    def panels(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Samples for the first validation conditions and, of the same order, the real images as decoded latents."""
        shown = first_images(batches, self.panel_count, self.device)
        count = len(shown["position"])
        batch = slice_of_process({**shown, "number": torch.arange(count, device=self.device)})
        index = batch.pop("number")
        real = self.diffusion.latents(batch, _VAL_SEED)
        factor = int(self.diffusion.first_stage.downsampling)  # type: ignore[arg-type]
        size = (real.shape[2] * factor, real.shape[3] * factor)
        conditions = {name: value for name, value in batch.items() if name not in ("moments", "position")}
        samples = self.diffusion.sample(
            conditions, sampler=self.sampler, grid=self.grid, index=index, size=size,
            guidance=self.guidance, seed=self.seed,
        )  # fmt: skip
        labels = labels_of(shown)
        self.panel_labels = {"samples": labels, "val": labels} if labels else {}
        images = {"samples": samples, "val": self.diffusion.decode(real)}
        return {name: gathered(to_bytes(p.float()).permute(0, 2, 3, 1), count) for name, p in images.items()}
