"""Training of a first stage: autoencoder and adversary, both updated with every batch."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldmlab import distributed
from ldmlab.contracts import FirstStage, Reconstruction
from ldmlab.errors import InputError
from ldmlab.inference.grids import labels_of
from ldmlab.losses.adversary import RiseAlarm
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.vision_alignment import Encoded
from ldmlab.metrics.reconstruction import CodebookWindow, LatentStatistics, ReconstructionMeasures
from ldmlab.nn.pixels import to_bytes, to_float
from ldmlab.randomness import draw
from ldmlab.training.data_module import Batch, first_images, gathered, slice_of_process
from ldmlab.training.optimizer_groups import train_only
from ldmlab.training.stage import Losses, Stage
from ldmlab.values import LatentChange

_log = logging.getLogger(__name__)
_PANEL_IMAGES = 8


class _Seen(NamedTuple):
    """What the adversary is trained on, after the autoencoder."""

    images: Tensor  # encoded
    target: Tensor  # what the reconstructions are compared with
    change: LatentChange | None  # of the latents between
    reconstructed: Tensor
    noise: Tensor  # for a second pass


class AutoencoderStage(Stage):
    """A first stage against its loss; the best checkpoint is the one with the best LPIPS, or PSNR without LPIPS."""

    kind: ClassVar[str] = "autoencoder"
    averaged: ClassVar[str | None] = "first_stage"
    panel_titles: ClassVar[Mapping[str, str]] = {
        "reconstructions": "input | reconstruction | difference (grey where equal)",
    }

    def __init__(
        self,
        *,
        first_stage: FirstStage,
        loss: AutoencoderLoss,
        background: Sequence[int] | None = (255, 255, 255),  # colour left out of psnr_object
        trained: Sequence[str] | None = None,  # beginnings of parameters' names, [decoder]; None: all parameters
        codebook_window: int = 10_000,  # images over which codebook use is counted; an epoch is a good choice
        codebook_alert: float = 0.5,  # warn when a smaller share of the codebook was used
        **options: Any,  # of Stage
    ) -> None:
        super().__init__(**options)
        assert isinstance(first_stage, nn.Module)
        last_layer = first_stage.last_layer  # refuses a first stage without weights
        assert last_layer.requires_grad
        if trained is not None:
            train_only(first_stage, trained, "stage.trained")
        if loss.adversary is not None and loss.adversary.adaptive and not last_layer.requires_grad:
            raise InputError(
                f"stage.trained={list(trained or [])} leaves out the last layer, by whose gradients loss.adversary is "
                "weighted; add it, or set loss.adversary.adaptive=false, or loss.adversary=null."
            )
        self.first_stage = first_stage
        self.loss = loss
        self.background = background
        codes: int | None = getattr(first_stage, "codebook_size", None)
        remedy = getattr(getattr(first_stage, "quantiser", None), "remedy", "")
        self.codebook = CodebookWindow(codes, codebook_window, codebook_alert, remedy) if codes is not None else None
        self.rise_alarm = RiseAlarm()
        self.one_by_one = loss.adversary is not None and loss.adversary.official_order
        self.monitor, self.monitor_mode = ("psnr", "max") if self._lpips is None else ("lpips", "min")
        self._seen: _Seen | None = None  # of this micro-batch
        changes = "change" in inspect.signature(first_stage.reconstruct).parameters
        if (regularisers := getattr(loss, "regularisers", None)) is not None and regularisers.active and not changes:
            raise InputError(
                f"loss.regularisers: {type(first_stage).__name__}.reconstruct() takes no `change` of its latents; "
                "leave the regularisers off, or choose another first_stage."
            )

    @property
    def _lpips(self) -> nn.Module | None:
        """The loss's, if it has one."""
        return getattr(self.loss, "lpips", None)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The autoencoder (with a learned log-variance) and the adversary, if there is one."""
        of_loss = [p for name, p in self.loss.named_parameters() if not name.startswith("adversary.")]
        trained = [*self.first_stage.parameters(), *of_loss]
        groups = {"generator": [p for p in trained if p.requires_grad]}
        if self.loss.adversary is not None:
            groups["discriminator"] = list(self.loss.adversary.parameters())
        return groups

    def networks(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """The first stage; the adversary, whose gradients are needed in one of two passes only, stays whole."""
        return [(self.first_stage, ("reconstruct", "encode", "decode"))]

    def whole(self) -> list[nn.Parameter]:
        """The layers at which losses are weighed, and codes that are moved by hand."""
        layers = (self.first_stage.last_layer, getattr(self.first_stage, "encoder_last_layer", None))
        quantiser = getattr(self.first_stage, "quantiser", None)
        codes = quantiser.parameters() if isinstance(quantiser, nn.Module) else ()
        return [*(one for one in layers if isinstance(one, nn.Parameter)), *codes]

    def active(self, group: str) -> bool:
        """The adversary is updated from its start on; in the official order its Adam steps on zero gradients before."""
        adversary = self.loss.adversary
        return group == "generator" or (adversary is not None and (self.one_by_one or adversary.trains_at(self.step)))

    @property
    def phase(self) -> tuple[Any, ...]:
        """Also whether the adversary is part of the autoencoder's loss."""
        adversary = self.loss.adversary
        return *super().phase, adversary is not None and adversary.weight_at(self.step) > 0

    def saved(self) -> dict[str, nn.Module]:
        """The first stage, and the loss with its discriminator and log-variance."""
        return {"first_stage": self.first_stage, "loss": self.loss}

    def losses(self, group: str, batch: Batch) -> Losses:
        """The autoencoder's loss; then the adversary's on the same images and reconstructions."""
        if group == "generator":
            return self._autoencoder(batch)
        assert self._seen is not None
        seen, self._seen = self._seen, None
        if not self.one_by_one:
            return Losses(*self.loss.discriminator(seen.target, seen.reconstructed))
        with torch.no_grad():
            reconstructed = self._reconstruct(seen.images, seen.noise, seen.change).images
        total, metrics = self.loss.discriminator(seen.target, reconstructed)
        assert self.loss.adversary is not None
        return Losses(total * self.loss.adversary.trains_at(self.step), metrics)

    def _autoencoder(self, batch: Batch) -> Losses:
        images, target, change = self._regularised(self._images_of(batch), batch["position"])
        noise, for_adversary = self._noise(batch["position"], images)
        given = self._reconstruct(images, noise, change)
        alignment = getattr(self.loss, "alignment", None)
        for part in (self.loss.adversary, alignment) if self._scaler is not None else ():
            if part is not None:
                part.loss_scale = self._scaler.scale(torch.ones((), device=self.device))
        last = (self.first_stage.last_layer, self.step)
        if alignment is None:
            total, metrics = self.loss.autoencoder(target, given, *last)
        else:
            encoded = Encoded(images, getattr(self.first_stage, "encoder_last_layer", None))
            total, metrics = self.loss.autoencoder(target, given, *last, encoded)
        self._seen = _Seen(images, target, change, given.images.detach(), for_adversary)
        if "l1" in metrics:
            self._watch(metrics["l1"])
        return Losses(total, metrics | self._codebook_metrics(given.codes))

    def _regularised(self, images: Tensor, position: Tensor) -> tuple[Tensor, Tensor, LatentChange | None]:
        """What is encoded, what the decoded images are compared with, and the change of latents between."""
        regularisers = getattr(self.loss, "regularisers", None)
        if regularisers is None or not regularisers.active:
            return images, images, None
        return regularisers(
            images,
            position,
            seed=self.seed,
            step_position=self.position,
            downsampling=self.first_stage.downsampling,
            smallest=self.loss.smallest_image,
        )

    def _reconstruct(self, images: Tensor, noise: Tensor, change: LatentChange | None) -> Reconstruction:
        if change is None:
            return self.first_stage.reconstruct(images, noise)
        return self.first_stage.reconstruct(images, noise, change)  # type: ignore[call-arg]

    def _images_of(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        return to_float(batch["image"].to(self.device)).contiguous(memory_format=self._memory_format)

    def _noise(self, position: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior noise by training position, (B, C, H / f, W / f), and that of the adversary's own pass."""
        f = self.first_stage.downsampling
        shape = (self.first_stage.latent_channels, images.shape[2] // f, images.shape[3] // f)
        purposes = ["posterior", *["posterior of the adversary"] * self.one_by_one]
        purposes = purposes if getattr(self.first_stage, "uses_noise", True) else []
        numbers = draw(self.seed, position.to(self.device), dict.fromkeys(purposes, shape))
        nothing = images.new_empty(0)
        return numbers.get("posterior", nothing), numbers.get("posterior of the adversary", nothing)

    def _watch(self, error: Tensor) -> None:
        """Warn when reconstruction has become clearly worse since the adversary's start."""
        if self.loss.adversary is None:
            return
        rise = self.rise_alarm.update(error, self.loss.adversary.weight_at(self.step) > 0)
        if rise is not None and self.global_rank == 0:
            _log.warning(
                "step %d: reconstruction is %.0f %% worse than before the adversary joined; "
                "lower loss.adversary.weight or start it later",
                self.step,
                100 * rise,
            )

    def _codebook_metrics(self, codes: Tensor | None) -> dict[str, Tensor]:
        """Use and perplexity of the codebook over the last full window, once there is one."""
        if self.codebook is None or codes is None:
            return {}
        self.codebook.add(codes)
        return {name: torch.full((), value, device=self.device) for name, value in self.codebook.numbers.items()}

    def _update(self, active: list[str]) -> None:
        self.updating = True
        if self.codebook is not None:
            self.codebook.end_step(self.step + 1, self._images * self.accumulate * distributed.world_size())
            self._update_codebook()
        super()._update(active)

    @torch.no_grad()
    def _update_codebook(self) -> None:
        """Codes that the optimizer does not move; averaged weights follow a restarted code at once."""
        restarted: dict[str, Tensor] = self.first_stage.update_codebook()  # type: ignore[operator]
        averages = self.average.weights() if self.average is not None else {}
        for name in restarted.keys() & averages.keys():
            live, average = self.first_stage.get_parameter(name), averages[name]
            average.copy_(torch.where(restarted[name].reshape(-1, *[1] * (live.ndim - 1)), live, average))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.codebook is not None:
            checkpoint["codebook"] = self.codebook.state()

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if self.codebook is None:
            return
        if "codebook" in state:
            self.codebook.restore(state["codebook"])
        elif distributed.rank() == 0:
            _log.warning(
                "the checkpoint of step %d holds no count of used codes (an older ldmlab wrote it); counting starts "
                "anew, so codebook_use comes after the next %d images",
                self.step,
                self.codebook.images,
            )

    def on_validation_epoch_start(self) -> None:
        """Measures of reconstructions from the posterior's mean, and the latents' statistics per channel."""
        measures = ReconstructionMeasures(self.background, self._lpips).to(self.device)
        self._measures = (measures, LatentStatistics(self.first_stage.latent_channels).to(self.device))  # no submodules

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch["position"]):
            return
        posterior = self.first_stage.encode(self._images_of(batch))
        decoded = to_bytes(self.first_stage.decode(posterior.mean))
        if "filler" in batch:
            return
        measures, latents = self._measures
        latents.update(posterior)
        measures.update(batch["image"].to(self.device), decoded)

    def validation_metrics(self) -> dict[str, float]:
        """The values of both, which then hold nothing in memory."""
        measures, latents = self._measures
        del self._measures
        return measures.compute() | latents.compute()

    def panels(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Rows of input | reconstruction | difference (grey where equal); decoded noise is never shown."""
        shown = first_images(batches, _PANEL_IMAGES, self.device)
        images = self._images_of(slice_of_process(shown))
        reconstructed = self.first_stage.decode(self.first_stage.encode(images).mean).float().clamp(-1, 1)
        row = torch.cat([images, reconstructed, (reconstructed - images) / 2], dim=3)  # (N, 3, H, 3 W)
        self.panel_labels = {"reconstructions": labels_of(shown)}
        return {"reconstructions": gathered(to_bytes(row).permute(0, 2, 3, 1), len(shown["position"]))}
