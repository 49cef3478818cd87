"""Training of a classifier of noisy latents, by which sampling can be guided."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab import distributed
from ldmlab.conditioners import check_classes
from ldmlab.diffusion.latent_space import LatentSpace
from ldmlab.diffusion.schedule import as_path
from ldmlab.errors import InputError, one_of
from ldmlab.training.data_module import Batch
from ldmlab.training.stage import Losses, Stage

_VAL_SEED = 0x5EED  # the validation noise is the same in every run, so that curves of runs compare


class ClassifierStage(Stage):
    """Cross-entropy of a class given a noisy latent and its time, at times sampled uniformly from the path."""

    kind: ClassVar[str] = "classifier"
    averaged: ClassVar[str | None] = "classifier"
    monitor = "accuracy"
    monitor_mode = "max"

    def __init__(
        self,
        *,
        space: LatentSpace,
        schedule: Any,  # contracts.Path, or a discrete schedule
        classifier: nn.Module,  # x (B, C, h, w), t (B,) => logits (B, classes)
        val_draws: int = 4,  # fixed noise levels and noises for each validation image
        noise_bins: int = 10,  # equal parts of the diffusion times, each with an accuracy of its own
        encoder_precision: str = "float32",  # of a first stage that runs while training: float32 | bfloat16
        **options: Any,  # of Stage
    ) -> None:
        super().__init__(**options)
        one_of("stage.encoder_precision", encoder_precision, ("float32", "bfloat16"))
        space.encoder_precision = encoder_precision
        if val_draws < 1 or noise_bins < 1:
            raise InputError(f"val_draws={val_draws} and noise_bins={noise_bins} must be at least 1.")
        self.space, self.schedule, self.classifier = space, schedule, classifier
        self.path = as_path(schedule)
        self.val_draws, self.noise_bins = val_draws, noise_bins

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"classifier": list(self.classifier.parameters())}

    def saved(self) -> dict[str, nn.Module]:
        """The classifier only; the latent space is described, not stored."""
        return {"classifier": self.classifier}

    def networks(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        return [(self.classifier, ())]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """As usual, but labels without an output are refused here, where reading them does not wait for the device."""
        classes = int(self.classifier.classes)  # type: ignore[arg-type]
        check_classes("class_id", batch["class_id"], "classifier.classes", classes)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def losses(self, group: str, batch: Batch) -> Losses:
        """Mean cross-entropy and accuracy; the noise levels by position on the path, 0 the cleanest."""
        loss, right, level = self._classified(batch, self.seed)
        total = loss.mean()
        return Losses(total, {"loss": total, "accuracy": right.mean()}, {"loss": loss, "level": level})

    def _classified(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Per image: cross-entropy, 1 where the class is right, noise level in [0, 1]; each (B,) float32."""
        labels = batch["class_id"]
        clean, numbers = self.space.latents_and_numbers(batch, seed, ["time"], noise=True)  # (B, C, h, w)
        path = self.path.at_size(clean[0].numel())
        t = path.quantile(numbers["time"])  # (B,)
        alpha, sigma = path.levels(t)
        x = alpha * clean + sigma * numbers["noise"]
        logits = self.classifier(x, t.float()).float()  # (B, classes)
        right = (logits.argmax(1) == labels).float()
        return F.cross_entropy(logits, labels, reduction="none"), right, path.position(t)

    def on_validation_epoch_start(self) -> None:
        """Empty sums: loss, right, count by noise level."""
        self._sums = torch.zeros(3, self.noise_bins, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses and right answers with fixed times and noises."""
        for draw in range(self.val_draws if len(batch["position"]) else 0):
            loss, right, level = self._classified(batch, _VAL_SEED + draw)
            place = (level * self.noise_bins).long().clamp_max(self.noise_bins - 1)
            values = torch.stack([loss, right, torch.ones_like(loss)]).double()
            self._sums.index_add_(1, place, ("filler" not in batch) * values)

    def validation_metrics(self) -> dict[str, float]:
        """Loss and accuracy, accuracy also by noise level."""
        bins = distributed.sum_(self._sums).cpu()
        loss_sum, right_sum, count = bins.sum(1).tolist()
        if not count:
            return {}
        by_noise = {
            f"accuracy_by_noise/{index / self.noise_bins:.2f}": float(right / images)
            for index, (_, right, images) in enumerate(bins.T)
            if images
        }
        return {"loss": loss_sum / count, "accuracy": right_sum / count, **by_noise}
