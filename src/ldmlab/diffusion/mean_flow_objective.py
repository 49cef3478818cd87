"""MeanFlow (Geng et al. 2025, "Mean flows for one-step generative modeling"; improved MeanFlow: guidance as an input).

u(x, r, t) is the average velocity over positions r .. t of the path from x at t, so x_r = x_t - (t - r) u: from noise
to data in one step with r = 0, t = 1. As d/dt ((t - r) u) = v along the flow, u = v - (t - r) d u / d t (eq. 6), where
d u / d t = v d u / d x + d u / d t (eq. 8) is one forward-mode derivative; gradients do not pass the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldmlab.contracts import Conditioning, Denoise, Level, Solver, Task, TimeSampling
from ldmlab.diffusion.few_steps import FewSteps, Scales
from ldmlab.diffusion.guidance import Guidance, stacked
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import VelocityPrediction
from ldmlab.errors import InputError, check_fraction

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, C, h, w), positions r and t (B,) => u, towards noise


class MeanFlow(FewSteps):
    """A flow whose network is given t and t - r; the loss of each image is |u - target|^2 / (its value + c)^p."""

    spans: ClassVar[int] = 1

    def __init__(
        self,
        first_stage: nn.Module,
        latent_scale: LatentScale,
        backbone: nn.Module,
        conditioners: Mapping[str, nn.Module],
        schedule: Any,  # a continuous path
        prediction: VelocityPrediction,
        task: Task | None = None,
        guidance_trained: bool | None = None,  # follows from `guidance`
        drop_together: bool = False,
        time_sampling: TimeSampling | None = None,  # of both ends
        guidance: Scales = 1.0,  # omega / (1 - kappa) of the paper
        kappa: float = 0.0,  # share of the guided velocity that is the network's own with the conditions (appendix)
        predicted_tangent: bool = False,  # the derivative goes along the network's u(x, t, t) (improved MeanFlow)
        instant: float = 0.75,  # share of images with r = t, which learn the velocity itself
        power: float = 1.0,  # p
        offset: float = 1e-3,  # c
    ) -> None:
        super().__init__(
            guidance, Solver("mean_flow", "linspace", 1), first_stage=first_stage, latent_scale=latent_scale,
            backbone=backbone, conditioners=conditioners, schedule=schedule, prediction=prediction, task=task,
            drop_together=drop_together, time_sampling=time_sampling,
        )  # fmt: skip
        if not isinstance(prediction, VelocityPrediction) or hasattr(self.path, "steps"):
            raise InputError(
                "diffusion=meanflow learns average velocities of a flow; use prediction=VelocityPrediction and a "
                "continuous path, such as LinearPath."
            )
        if guidance != 1 and not self.drop_purposes:
            raise InputError(f"diffusion.guidance={guidance} needs dropped conditions; set conditioner.NAME.drop=0.1.")
        if not (0 <= kappa < 1 and power >= 0 and offset > 0):
            raise InputError(f"diffusion: kappa={kappa}, power={power}, offset={offset}; give 0 .. 1, 0 up, above 0.")
        if kappa and guidance == 1:
            raise InputError(f"diffusion.kappa={kappa} mixes guided velocities and guidance=1 is none; leave it out.")
        self.predicted_tangent = predicted_tangent
        check_fraction("diffusion.instant", instant)
        self.kappa, self.instant, self.power, self.offset = kappa, instant, power, offset
        self.sign = prediction.sign

    # ---- training

    def loss(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        """Per-image loss (B,), in validation the plain mean of squares, and the times t (B,)."""
        purposes = {"time", "end", "instant", "scale", *(self.drop_purposes.values() if self.training else ())}
        clean, numbers = self.latents_and_numbers(batch, seed, sorted(purposes), noise=True)
        r, t = self.pairs(numbers, batch["position"], clean[0].numel())
        drops = self.drops(numbers) if self.training else {}
        conditioning, scale = self.conditioning(batch, drops), self.scales(numbers["scale"])
        if drops:  # an image without any of its conditions has no guidance
            scale = torch.where(torch.stack([*drops.values()]).all(0), 1.0, scale)
        times = self.path.time(t)
        (alpha, sigma), (d_alpha, d_sigma) = self.path.levels(times), self.path.rates(times)
        x, velocity = alpha * clean + sigma * numbers["noise"], d_alpha * clean + d_sigma * numbers["noise"]
        network = self.velocity(conditioning, scale)
        if self.guidance != 1:
            velocity = self.guided(velocity, x, t, (conditioning, self.null(batch)), scale)
        exact = self.velocity(_float32(conditioning), scale) if x.device.type == "cpu" else network
        error = network(x, r, t).float() - self.target(exact, x, r, t, velocity)
        if not self.training:
            return error.square().mean(dim=(1, 2, 3)), times
        total = error.square().sum(dim=(1, 2, 3))
        return total / (total.detach() + self.offset) ** self.power, times

    def pairs(self, numbers: Mapping[str, Tensor], position: Tensor, values: int) -> tuple[Tensor, Tensor]:
        """Positions r <= t (B,), float32, of two times of an image."""
        ends = [self.path.position(self.objective.times(numbers[name], position, values)) for name in ("time", "end")]
        t = torch.maximum(*ends)
        r = torch.where(numbers["instant"] < self.instant, t, torch.minimum(*ends))
        return r.float(), t.float()

    def velocity(self, given: Any, scale: Tensor) -> Velocity:
        """The network's average velocities for conditions, prepared or not, and scales (B,)."""

        def network(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return self.sign * self.backbone(x, self.path.time(t), self.numbered(given, scale, t - r))

        return network

    @torch.no_grad()
    def guided(
        self, velocity: Tensor, x: Tensor, t: Tensor, both: tuple[Conditioning, Conditioning], scale: Tensor
    ) -> Tensor:
        """omega v + kappa u(x, t, t | c) + (1 - omega - kappa) u(x, t, t), omega = scale (1 - kappa)."""
        omega, one = (scale * (1 - self.kappa))[:, None, None, None], torch.ones_like(scale)
        if self.kappa == 0:
            return omega * velocity + (1 - omega) * self.velocity(both[1], one)(x, t, t).float()
        network = self.velocity(stacked(*both), torch.cat([scale, one]))
        mine, null = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([t, t])).float().chunk(2)
        return omega * velocity + self.kappa * mine + (1 - omega - self.kappa) * null

    @torch.no_grad()
    def target(self, network: Velocity, x: Tensor, r: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """v - (t - r) (d x / d t d u / d x + d u / d t), of x's shape; the derivative is forward-mode, without a graph.

        Fused attention has none, so it is computed by products here, and compiled networks run uncompiled. Under
        autocast of a processor a norm's derivative is float32 where a convolution takes bfloat16, so that is off.
        """
        whole = torch.autocast("cpu", enabled=False)
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), whole:
            tangent = network(x, t, t).to(x.dtype) if self.predicted_tangent else velocity
            change = torch.func.jvp(network, (x, r, t), (tangent, torch.zeros_like(r), torch.ones_like(t)))[1]
        return velocity - (t - r)[:, None, None, None] * change.to(x.dtype)

    # ---- sampling

    def denoiser(
        self,
        conditioning: Conditioning,
        other: Conditioning | None = None,  # unused: guidance is inside
        guidance: Guidance | None = None,  # its scale
        variance: list[Tensor] | None = None,  # none is learned
    ) -> Denoise:
        """The clean estimate from which a first-order step to `level.to` ends at x - (t - r) u; or a flow's."""
        prepared = self.backbone.prepare(conditioning)  # type: ignore[operator]

        def denoise(x: Tensor, level: Level) -> Tensor:
            t, r = (self.place(one, x) for one in (level, level.to or level))
            scale = torch.full((len(x),), 1.0 if guidance is None else guidance.scale, device=x.device)
            u = self.velocity(prepared, scale)(x, r, t).double()
            if level.to is None:
                return self.objective.form.clean(x, self.sign * u, level)
            kept = level.to.sigma / level.sigma
            reached = x - (t - r).double()[:, None, None, None] * u
            return (reached - kept * x) / (level.to.alpha - kept * level.alpha)

        return denoise

    def place(self, level: Level, x: Tensor) -> Tensor:
        """The position of a level for each image, (B,) float32; the end of a grid is 0."""
        time = torch.tensor([0.0 if level.time is None else level.time], dtype=torch.float64)
        s = 0.0 if level.time is None else float(self.path.position(time))
        return torch.full((len(x),), s, device=x.device)


def _float32(conditioning: Conditioning) -> Conditioning:
    """The same without half precision, for a network outside of autocast."""
    half = {name: slot for name, slot in vars(conditioning).items() if slot is not None and slot.itemsize == 2}
    return replace(conditioning, **{name: slot.float() for name, slot in half.items()})
