"""Consistency distillation of a trained model (Song et al. 2023, algorithm 2; latent consistency, Luo et al. 2023).

f(x, t) is the clean end of the teacher's probability flow through x at t. Over a grid of levels, the student's f at one
level learns its f at the next one, to which the teacher's solver goes. f = c_skip x / alpha + c_out D, where D is the
clean estimate of the network, and with rho = sigma / alpha, c_skip = b^2 / (rho^2 + b^2) and c_out = 1 - c_skip, so
that f(x, clean end) = x.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning, Denoise, Level, Prediction, Solver, Task
from ldmlab.diffusion.few_steps import FewSteps, Scales
from ldmlab.diffusion.guidance import Guidance, stacked
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.errors import InputError, one_of
from ldmlab.randomness import below
from ldmlab.sharded import is_sharded


class Levels(NamedTuple):
    """Levels of a batch, each (B, 1, 1, 1): x = alpha clean + sigma noise, D = of_x x + of_output output."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    of_x: Tensor
    of_output: Tensor


class Consistency(FewSteps):
    """A student of `distil`'s teacher, whose network it begins with; sampled in one step or a few."""

    table: Tensor  # levels of the grid: rows as of `Levels`

    def __init__(
        self,
        first_stage: nn.Module,
        latent_scale: LatentScale,
        backbone: nn.Module,
        conditioners: Mapping[str, nn.Module],
        schedule: Any,  # the teacher's
        prediction: Prediction,  # the teacher's
        task: Task | None = None,
        guidance_trained: bool | None = None,  # follows from `guidance`
        guidance: Scales = 1.0,  # of the teacher
        levels: int = 50,  # of the grid that training steps over
        loss: str = "huber",  # huber: sqrt(|d|^2 + c^2) - c, c = 0.00054 sqrt(values of a latent) | l2: mean of squares
        boundary: float = 0.05,  # b
        target_decay: float | None = None,  # of an average of weights behind the target; None: the weights themselves
    ) -> None:
        spacing = "trailing" if hasattr(schedule, "steps") else schedule.solver.spacing
        super().__init__(
            guidance, Solver("consistency", spacing, 4), first_stage=first_stage, latent_scale=latent_scale,
            backbone=backbone, conditioners=conditioners, schedule=schedule, prediction=prediction, task=task,
        )  # fmt: skip
        if self.objective.form.outputs != 1:
            raise InputError("diffusion=consistency has no use for a learned variance; choose a teacher without.")
        one_of("diffusion.loss", loss, ("huber", "l2"))
        if levels < 2 or not boundary > 0 or not (target_decay is None or 0 < target_decay < 1):
            raise InputError(
                f"diffusion: levels={levels}, boundary={boundary}, target_decay={target_decay}; give 2 or more, above "
                "0, and null or a number between 0 and 1."
            )
        self.kind, self.boundary, self.target_decay = loss, boundary, target_decay
        self.steps = levels
        self.teacher: LatentDiffusion | None = None  # while training
        self.target_network: nn.Module | None = None  # behind the target; None: the student's own

    def distil(self, teacher: LatentDiffusion, values: int) -> None:
        """Learn from a model with the same conditioners, on latents of so many values; the network has its weights."""
        self.teacher = teacher.eval().requires_grad_(False)
        (one, zero), clean = torch.tensor([1.0, 0.0], dtype=torch.float64), self.objective.form.clean
        grid = self.path.at_size(values).grid(self.steps, self.path.solver.spacing)[:-1]  # estimates are affine:
        rows = [(v.time, v.alpha, v.sigma, float(clean(one, zero, v)), float(clean(zero, one, v))) for v in grid]
        self.register_buffer("table", torch.tensor(rows).T, persistent=False)
        if self.target_decay is not None:
            self.target_network = copy.deepcopy(self.backbone).eval().requires_grad_(False)

    @torch.no_grad()
    def step_taken(self) -> None:
        """After an update of the student: the weights behind the target follow it."""
        if self.target_network is not None and self.target_decay is not None:
            live: list[Any] = list(self.backbone.parameters())
            live = [p.full_tensor() if is_sharded(p) else p for p in live]
            torch._foreach_lerp_(list(self.target_network.parameters()), live, 1 - self.target_decay)

    # ---- training

    def loss(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        """Per-image distance (B,) of f at a level and f at the next one, and the times of the first."""
        assert self.teacher is not None  # of `distil`, without which nothing trains
        clean, numbers = self.latents_and_numbers(batch, seed, ["scale", "time"], noise=True)
        index, scale = below(numbers["time"], self.steps), self.scales(numbers["scale"])
        here, there = self.at(index), self.at((index + 1).clamp(max=self.steps - 1))
        last = (index == self.steps - 1)[:, None, None, None]
        x = here.alpha * clean + here.sigma * numbers["noise"]
        with torch.no_grad():
            conditioning = self.teacher.conditioning(batch)
            null = self.teacher.null(batch) if self.guidance != 1 else None
            reached, end = self.solved(x, here, there, (conditioning, null), scale, last)
            given = self.numbered(conditioning, scale)
            aim = torch.where(last, end, self.f(self.target_network or self.backbone, reached, there, given))
        off = (self.f(self.backbone, x, here, given) - aim).square()
        if self.kind == "l2":
            return off.mean(dim=(1, 2, 3)), here.time.flatten()
        c = 0.00054 * off[0].numel() ** 0.5
        return (off.sum(dim=(1, 2, 3)) + c**2).sqrt() - c, here.time.flatten()

    def at(self, index: Tensor) -> Levels:
        """The levels of the grid with these numbers (B,)."""
        return Levels(*self.table[:, index, None, None, None])

    def estimate(
        self, network: nn.Module, x: Tensor, at: Levels, given: Conditioning, scale: Tensor | None = None
    ) -> Tensor:
        """D, float32; with scales (B,) `given` has the conditions and then the null ones, and D is guided."""
        scaled, times = self.objective.form.scaled(x, at.alpha, at.sigma), at.time.flatten()
        if scale is not None:
            scaled, times = torch.cat([scaled, scaled]), torch.cat([times, times])
        output = self.objective.form.checked(network(scaled, times, given), scaled)
        if scale is not None:
            mine, null = output.chunk(2)
            output = torch.lerp(null, mine, scale[:, None, None, None])
        return at.of_x * x + at.of_output * output

    def f(self, network: nn.Module, x: Tensor, at: Levels, given: Conditioning) -> Tensor:
        """c_skip x / alpha + c_out D."""
        skip = self.skip(at.alpha, at.sigma)
        return skip * x + (1 - skip * at.alpha) * self.estimate(network, x, at, given)

    def skip(self, alpha: Any, sigma: Any) -> Any:
        """c_skip / alpha, which is finite without signal too."""
        return self.boundary**2 * alpha / (sigma**2 + (self.boundary * alpha) ** 2)

    def solved(
        self, x: Tensor, here: Levels, there: Levels, given: tuple[Conditioning, Conditioning | None], scale: Tensor,
        last: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x at the next level by the teacher's solver, first order or the path's Heun; and its D at `here`."""
        assert self.teacher is not None
        network, (mine, null) = self.teacher.backbone, given
        conditions, scales = (mine, None) if null is None else (stacked(mine, null), scale)
        clean = self.estimate(network, x, here, conditions, scales)
        kept = there.sigma / here.sigma
        first = kept * x + (there.alpha - kept * here.alpha) * clean
        if self.teacher.path.solver.sampler != "heun":
            return first, clean
        again = self.estimate(network, first, there, conditions, scales)
        noise = (x - here.alpha * clean) / here.sigma, (first - there.alpha * again) / there.sigma
        width = there.sigma / there.alpha - here.sigma / here.alpha
        return there.alpha * (x / here.alpha + width * (noise[0] + noise[1]) / 2), clean

    # ---- sampling

    def denoiser(
        self,
        conditioning: Conditioning,
        other: Conditioning | None = None,  # unused: guidance is inside
        guidance: Guidance | None = None,  # its scale
        variance: list[Tensor] | None = None,  # none is learned
    ) -> Denoise:
        """f in place of the clean estimate."""
        device = next(self.backbone.parameters()).device
        scale = torch.tensor([1.0 if guidance is None else guidance.scale], device=device)
        estimate = super().denoiser(self.numbered(conditioning, scale))

        def denoise(x: Tensor, level: Level) -> Tensor:
            skip = self.skip(level.alpha, level.sigma)
            return skip * x + (1 - skip * level.alpha) * estimate(x, level)

        return denoise
