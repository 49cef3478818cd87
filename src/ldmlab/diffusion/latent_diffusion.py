"""The latent diffusion model: first stage, latent scale, conditioners and denoiser with one schedule.

Three kinds of numbers: pixels (B, 3, H, W) in [-1, 1]; raw latents, which only the first stage and the latent scale
see; final latents (B, C, h, w), normalised, everywhere else. A batch is a plain dict with `position` (B,) int64.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.contracts import (
    AfterStep,
    Conditioner,
    Conditioning,
    Denoise,
    DiffusionLoss,
    Guider,
    Level,
    Prediction,
    Sampler,
    Task,
    TimeSampling,
    Weighting,
)
from ldmlab.diffusion.diffusion_loss import Objective
from ldmlab.diffusion.given_image import GivenImage
from ldmlab.diffusion.guidance import Guidance, check_guidance, stacked, with_signal
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace, check_size, joined
from ldmlab.diffusion.parameterization import begun
from ldmlab.errors import InputError, check_fraction
from ldmlab.nn.tiling import Bind, latent_windows, windowed
from ldmlab.randomness import normal
from ldmlab.stored_names import CUT_PREFIX, IDS_PREFIX, STATES_PREFIX

Named = list[tuple[str, Conditioner]]
Output = Callable[[Tensor, Level], tuple[Tensor, Tensor | None]]  # prediction, the learned variance's part


class LatentDiffusion(LatentSpace):
    """Loss on a training batch, samples from conditions; plain torch, the first stage frozen."""

    def __init__(
        self,
        first_stage: nn.Module,
        latent_scale: LatentScale,
        backbone: nn.Module,
        conditioners: Mapping[str, nn.Module],  # in the order in which one slot is filled
        schedule: Any,  # contracts.Path, or a discrete schedule of `steps` and `levels`
        prediction: Prediction,
        task: Task | None = None,
        guidance_trained: bool | None = None,  # was conditioning dropped in training? None: unknown, an imported model
        loss: str | DiffusionLoss = "l2",  # l2 | l1 | one of diffusion_loss.py
        drop_together: bool = False,  # one draw drops all conditioners, instead of one draw for each
        time_sampling: TimeSampling | None = None,  # None: uniform
        weighting: Weighting | None = None,  # None: the loss of the prediction as it is
        offset_noise: float = 0.0,  # of a number per image and channel added to the training noise (0.1 is usual)
    ) -> None:
        super().__init__(first_stage, latent_scale)
        check_slots(conditioners, backbone)
        if prediction is None:
            raise InputError("diffusion.prediction=null predicts nothing; give a class of diffusion.parameterization.")
        if offset_noise < 0:
            raise InputError(f"diffusion.offset_noise={offset_noise} must be 0 or more.")
        self.backbone = backbone
        self.conditioners = nn.ModuleDict(dict(conditioners))
        self.objective = Objective(schedule, prediction, time_sampling, weighting, loss)
        self.schedule, self.path, self.task = schedule, self.objective.path, task
        self.prediction = prediction
        self.guidance_trained = guidance_trained
        self.drop_together, self.offset_noise = drop_together, offset_noise

    # ---- conditioning

    def conditioning(self, batch: dict[str, Any], null_mask: Mapping[str, Tensor] | None = None) -> Conditioning:
        """The denoiser's conditioning; a conditioner's `null` where `null_mask[name]` (B,) is true."""

        def value(name: str, conditioner: Conditioner) -> Tensor:
            found = self._output(name, conditioner, batch)
            if null_mask is None or name not in null_mask:
                return found
            mask = null_mask[name].reshape(-1, *[1] * (found.ndim - 1))
            return torch.where(mask, conditioner.null(batch, self.encode).to(found.dtype), found)

        return joined((c.slot, value(name, c)) for name, c in self._each_conditioner())

    def null(self, batch: dict[str, Any]) -> Conditioning:
        """The conditioning of the unconditional pass: inputs that training dropped are null, the rest stays.

        `negative_prompt` replaces the empty caption.
        """

        def value(name: str, conditioner: Conditioner) -> Tensor:
            if "negative_prompt" in batch and "caption" in conditioner.reads:
                return conditioner({**batch, "caption": batch["negative_prompt"]}, self.encode)
            droppable = conditioner.slot != "spatial" if self.guidance_trained is None else conditioner.drop > 0
            if droppable:  # an imported model does not record its rates: spatial inputs are kept, the rest is dropped
                return conditioner.null(batch, self.encode)
            return self._output(name, conditioner, batch)

        return joined((c.slot, value(name, c)) for name, c in self._each_conditioner())

    @property
    def drop_purposes(self) -> dict[str, str]:
        """Guidance dropout: per conditioner with a rate, the purpose of its uniform number."""
        dropped = [name for name, conditioner in self._each_conditioner() if conditioner.drop > 0]
        return {name: "drop" if self.drop_together else f"drop.{name}" for name in dropped}

    def drops(self, uniforms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers (B,) by purpose => per conditioner with a rate, the images without it; (B,) bool."""
        rates: dict[str, float] = {name: conditioner.drop for name, conditioner in self._each_conditioner()}
        return {name: uniforms[purpose] < rates[name] for name, purpose in self.drop_purposes.items()}

    def _each_conditioner(self) -> Named:
        return list(self.conditioners.items())  # type: ignore[arg-type]

    def _output(self, name: str, conditioner: Conditioner, batch: dict[str, Any]) -> Tensor:
        """The conditioner's output, or its states stored when the latents were encoded."""
        stored = batch.get(STATES_PREFIX + name)
        if IDS_PREFIX + name in batch:
            batch = {**batch, "ids": batch[IDS_PREFIX + name], "cut": batch[CUT_PREFIX + name]}
        return conditioner(batch, self.encode) if stored is None else stored.float()

    # ---- training

    def loss(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        """Per-image loss (B,) float32 and its times (B,); random numbers depend on (seed, position, purpose)."""
        uniforms = {"time", *(self.drop_purposes.values() if self.training else ())}
        offset = self.offset_noise != 0
        clean, numbers = self.latents_and_numbers(
            batch, seed, sorted(uniforms), noise=True, offset=offset
        )  # (B, C, h, w)
        noise = numbers["noise"]
        if offset:
            noise = noise + self.offset_noise * numbers["offset"]
        times = self.objective.times(numbers["time"], batch["position"], clean[0].numel())  # (B,)
        conditioning = self.conditioning(batch, self.drops(numbers) if self.training else None)
        check_size(conditioning, clean)

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.backbone(x, t, conditioning)

        return self.objective(network, clean, noise, times), times

    # ---- sampling

    @property
    def usual_guidance(self) -> float:
        """The scale of sampling where none is named."""
        return 3.0 if self.guidance_trained and self.conditioners else 1.0

    def check_guidance(self, guidance: Guidance) -> None:
        """InputError for guidance that this model cannot be sampled with."""
        check_guidance(guidance.scale, self.guidance_trained, bool(self.conditioners), guidance.weak is not None)

    def denoiser(
        self,
        conditioning: Conditioning,
        other: Conditioning | None = None,  # what is guided away from: without conditions, or the weak model's own
        guidance: Guidance | None = None,  # None: off
        variance: list[Tensor] | None = None,  # filled with the learned variance's part of each output
    ) -> Denoise:
        """Clean estimates, guided by one doubled pass or a weak model; what a level does not need is not computed."""
        guidance = None if other is None or guidance is None or guidance.scale == 1 else guidance
        weak = None if guidance is None or guidance.weak is None else guidance.weak.output(other)

        @cache
        def of(doubled: bool) -> Output:  # constants are computed once
            return self.output(stacked(conditioning, other) if doubled else conditioning)  # type: ignore[arg-type]

        def denoise(x: Tensor, level: Level) -> Tensor:
            acting = guidance if guidance is not None and guidance.acts(level, self.path) else None
            doubled = acting is not None and weak is None
            output, learned = of(doubled)(torch.cat([x, x]) if doubled else x, level)  # (2B or B, C, h, w)
            if variance is not None and learned is not None:
                variance[:] = [learned[: len(x)]]  # with the conditions, as the official programs
            if acting is not None:
                output, without = output.chunk(2) if weak is None else (output, weak(x, level)[0])
                guided = torch.lerp(without, output, acting.scale)
                output = acting.corrected(guided, output) if acting.corrects else guided
            return self.objective.form.clean(x, output, level)

        return denoise

    def output(self, conditioning: Conditioning) -> Output:
        """The network's prediction, and the learned variance's part, of latents at a level; float32."""
        form, prepared = self.objective.form, self.backbone.prepare(conditioning)  # type: ignore[operator]

        def output(x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
            assert level.time is not None  # None at the end only, which no network sees
            time = torch.full((len(x),), level.time, device=x.device)
            given = form.scaled(x, level.alpha, level.sigma)
            return form.split(form.checked(self.backbone(given, time, prepared), x))

        return output

    @torch.no_grad()
    def sample(
        self,
        batch: dict[str, Any],  # the conditions, B of each; {} for a model without conditions
        *,
        sampler: Sampler,
        grid: list[Level],
        index: Tensor,  # (B,) int64, the image's number: with the seed it decides the noise
        size: tuple[int, int],  # height and width in pixels
        guidance: Guidance | None = None,  # None: off
        guiders: Sequence[Guider] = (),  # besides that guidance; each wraps those before it
        seed: int = 0,
        after_step: AfterStep | None = None,
        given: GivenImage | None = None,  # an image to start from or to keep in part
        window: int | None = None,  # side of windows that are denoised one by one, px; None: the full latent at once
    ) -> Tensor:
        """Pixels (B, 3, H, W), float32 in about [-1, 1]; the same image in any batch."""
        if guidance is not None:
            self.check_guidance(guidance)
        batch = {"position": index, **batch}
        x, learned = self.start(index, size, seed), list[Tensor]()
        denoise = self._bound(batch, x, guidance, window, learned)
        grid = with_signal(grid, self.path) if guiders else grid
        for guider in guiders:
            denoise = guider(denoise, batch)

        def noise(step: int, purpose: str = "sample") -> Tensor:
            return normal(seed, purpose, index, self.latent_shape(size), step=step + 1)

        sampler = self._for_model(sampler, x, None if window is not None else learned)
        if given is None:
            x = begun(x, grid[0])
        else:
            sampler = given.around(sampler, partial(noise, purpose="again"))
        images = self.decode(sampler(denoise, x, grid, noise=noise, after_step=after_step))
        return images if self.task is None else self.task.finish(images, batch)

    def _bound(
        self, batch: dict[str, Any], x: Tensor, guidance: Guidance | None, window: int | None, learned: list[Tensor]
    ) -> Denoise:
        """The denoiser with the batch's conditions and guidance, window by window where a side is given."""
        conditioning = self.conditioning(batch)
        check_size(conditioning, x)
        bind: Bind = partial(self.denoiser, guidance=guidance, variance=learned)
        if window is not None:
            bind = windowed(bind, latent_windows((x.shape[2], x.shape[3]), window, self._stage.downsampling))
        if guidance is None or guidance.scale == 1:
            return bind(conditioning, None)
        return bind(conditioning, (self.null if guidance.weak is None else guidance.weak.conditioning)(batch))

    def _for_model(self, sampler: Sampler, x: Tensor, learned: list[Tensor] | None) -> Sampler:
        """The sampler with what it takes of the model: path, codebook, and the learned variance of each evaluation."""
        if learned is not None and self.objective.form.outputs == 2 and hasattr(sampler, "with_variance"):
            sampler = sampler.with_variance(learned)
        if hasattr(sampler, "along"):
            sampler = sampler.along(self.path)
        if getattr(sampler, "quantize_x0", False):
            self.quantised(x)  # refused before any step
            sampler = sampler.with_codebook(self.quantised)  # type: ignore[attr-defined]
        return sampler

    def start(self, index: Tensor, size: tuple[int, int], seed: int) -> Tensor:
        """The initial noise of sampling, (B, C, h, w) float32, for images of (height, width)."""
        return normal(seed, "start", index, self.latent_shape(size))

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) for an image of (height, width); both must be multiples of `size_step`."""
        if any(side < 1 or side % self.size_step for side in size):
            near = "x".join(str(max(round(side / self.size_step), 1) * self.size_step) for side in size)
            raise InputError(
                f"size={size[0]}x{size[1]} (height x width) is not a multiple of {self.size_step}, by which this "
                f"model divides images; the nearest is {near}."
            )
        factor = self._stage.downsampling
        return self._stage.latent_channels, size[0] // factor, size[1] // factor

    @property
    def size_step(self) -> int:
        """Pixels by which an image's sides can grow: the first stage's factor, times the denoiser's if it has one."""
        return self._stage.downsampling * int(getattr(self.backbone, "size_step", 1))


def check_slots(conditioners: Mapping[str, nn.Module], backbone: nn.Module) -> None:
    accepts: frozenset[str] = backbone.accepts  # type: ignore[assignment]
    for name, conditioner in conditioners.items():
        check_fraction(f"conditioner.{name}.drop", conditioner.drop)  # type: ignore[arg-type]
        if conditioner.slot not in accepts:
            taken = ", ".join(sorted(accepts)) or "nothing"
            raise InputError(
                f"conditioner={name} fills the slot {conditioner.slot} but the backbone takes {taken}; "
                "choose another backbone or leave the conditioner out."
            )
