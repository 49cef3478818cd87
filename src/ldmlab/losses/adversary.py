"""The patch adversary of the paper's first stages: hinge loss, adaptive weight, start steps, warnings.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021, equations 6 and 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.distributed import mean_
from ldmlab.errors import InputError

_EPSILON = 1e-4


def gradient_ratio(loss: Tensor, term: Tensor, layer: Tensor, limit: float, scale: Tensor | None = None) -> Tensor:
    """|d loss / d layer| / (|d term / d layer| + 1e-4), at most `limit`, without gradient.

    The gradients are averaged over processes before their norms are taken, so the number of processes does not matter;
    float32 throughout, but behind float16 layers, where `scale` keeps small gradients. NaN where one overflows under
    that scale, as the step's own gradient then does, so that it is left out.
    """
    losses = [one if scale is None else one * scale for one in (loss, term)]
    gradients = [torch.autograd.grad(one, layer, retain_graph=True)[0].float() for one in losses]
    norms = mean_(torch.stack(gradients)).flatten(1).norm(dim=1)
    if scale is not None:
        norms = (norms / scale).masked_fill(~norms.isfinite().all(), float("nan"))
    return (norms[0] / (norms[1] + _EPSILON)).clamp(max=limit).detach()


_WEIGHT_LIMIT = 1e4


class Adversary(nn.Module):
    """A discriminator with its weight in the autoencoder's loss; steps count updates of the autoencoder.

    Differences from the official program, unless `official_order`: before its start the discriminator's Adam is idle
    here; there it steps on zero gradients, so that its running means are no longer corrected for their start when
    training begins. And the discriminator is trained here on the reconstructions that the autoencoder was trained on;
    there on a second forward pass of the updated autoencoder with new posterior noise. Over ten updates the
    discriminator's weights end about 20 % of their way apart, the autoencoder's 3 to 12 %; all else is equal to 1e-6.
    """

    idle_without = "ramp_steps adaptive official_order: weight"

    def __init__(
        self,
        *,
        discriminator: nn.Module,  # images => logits
        weight: float,  # of its term, in addition to the adaptive factor
        discriminator_start: int,  # updates made before the discriminator's training begins
        adversary_start: int,  # updates made before its term enters the autoencoder's loss
        ramp_steps: int = 0,  # over which that term grows linearly to its weight
        adaptive: bool = True,  # scale by the ratio of gradient norms at the last layer
        official_order: bool = False,  # as the official program, at the cost of a second forward pass
    ) -> None:
        super().__init__()
        if adversary_start < discriminator_start:
            raise InputError(
                f"loss.adversary.adversary_start={adversary_start} comes before discriminator_start="
                f"{discriminator_start}: its gradients would be untrained; choose at least {discriminator_start}."
            )
        self.discriminator = discriminator
        self.weight, self.adaptive, self.official_order = weight, adaptive, official_order
        self.discriminator_start, self.adversary_start = discriminator_start, adversary_start
        self.ramp_steps = ramp_steps
        self.loss_scale: Tensor | None = None  # of float16's small gradients; None: they are float32 or bfloat16

    def trains_at(self, step: int) -> bool:
        """Whether the discriminator is updated after `step` updates of the autoencoder."""
        return step >= self.discriminator_start

    def weight_at(self, step: int) -> float:
        """Weight of its term after `step` updates: 0 before its start, then the ramp, then constant."""
        if step < self.adversary_start:
            return 0.0
        return self.weight * min((step - self.adversary_start + 1) / max(self.ramp_steps, 1), 1.0)

    def generator_loss(self, reconstructed: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's side, - mean D(y), and the mean logit."""
        logits = self.discriminator(reconstructed).float()
        return -logits.mean(), logits.mean().detach()

    def discriminator_loss(self, images: Tensor, reconstructed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """1/2 mean relu(1 - D(x)) + 1/2 mean relu(1 + D(y)), and the mean logits."""
        real = self.discriminator(images).float()
        fake = self.discriminator(reconstructed.detach()).float()
        loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        return loss, {"logits_real": real.mean().detach(), "logits_fake": fake.mean().detach()}

    def adaptive_weight(self, reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
        """The ratio of the gradients of both at the last layer, at most 1e4; 1 where it is not adaptive."""
        if not self.adaptive:
            return torch.ones((), device=last_layer.device)
        return gradient_ratio(reconstruction_loss, generator_loss, last_layer, _WEIGHT_LIMIT, self.loss_scale)


_MEMORY = 0.98  # of the running means: about fifty steps


class RiseAlarm:
    """Compares running means of a loss before and after a start; read at intervals, since reading waits for a GPU."""

    def __init__(self, limit: float = 0.25, every_steps: int = 50) -> None:
        self.limit = limit  # share of the level before the start by which the loss may rise
        self.every_steps = every_steps
        self._before: Tensor | None = None
        self._after: Tensor | None = None
        self._steps_after = 0

    def update(self, value: Tensor, started: bool) -> float | None:
        """One step's loss => the rise as a share when it is beyond the limit, else None."""
        value = value.detach()
        if not started:
            self._before = value if self._before is None else torch.lerp(value, self._before, _MEMORY)
        if not started or self._before is None:  # None: resumed after the start, so there is nothing to compare with
            return None
        self._after = value if self._after is None else torch.lerp(value, self._after, _MEMORY)
        self._steps_after += 1
        if self._steps_after % self.every_steps:
            return None
        rise = float(self._after / self._before) - 1.0
        return rise if rise > self.limit else None
