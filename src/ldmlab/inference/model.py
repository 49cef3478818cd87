"""A trained latent diffusion model to hold in the hand: what `ldmlab.load` gives. Pure torch.

Images are uint8 (B, H, W, 3) here; latents are final ones, (B, C, h, w) float32.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ldmlab.contracts import AfterStep, Conditioning, Level
from ldmlab.diffusion.conditioning import check_guidance
from ldmlab.diffusion.guidance import Guider
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.schedule import ddim_grid, levels_of
from ldmlab.errors import InputError
from ldmlab.inference import input_images as given_images
from ldmlab.inference.input_images import canvas_of, finished, given_image, on_canvas
from ldmlab.inference.inputs import batch_of, check_requests, check_size, implied_size, lost, rows_of, warn_of_lost
from ldmlab.inference.sample_settings import SampleSettings, chosen_tile, in_parts, with_parts
from ldmlab.nn.pixels import numbers_only, to_bytes, to_float

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel:
    """Samples, encodes, decodes and denoises with finished weights."""

    def __init__(
        self,
        diffusion: LatentDiffusion,
        image_size: int | tuple[int, int],  # trained on: side, or height and width, px
        info: Mapping[str, Any],  # path, weights, fingerprint, step, ...
        precision: str = "float32",  # of the denoiser: float32 | bfloat16 | float16
    ) -> None:
        self.diffusion = diffusion.eval().requires_grad_(False)
        if self.device.type == "cuda":  # on a CPU this layout was measured to be slower
            self.diffusion.to(memory_format=torch.channels_last)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.info = dict(info)
        self.guiders: tuple[Guider, ...] = ()
        self.in_precision(precision)

    def with_guiders(self, *guiders: Guider) -> "LoadedModel":
        """The same model; these guide every sample from now on, besides classifier-free guidance."""
        self.guiders = guiders
        self.info["guiders"] = {name: value for guider in guiders for name, value in guider.as_text().items()}
        return self

    def in_precision(self, precision: str) -> "LoadedModel":
        """The same model; its networks compute in float32 | bfloat16 | float16."""
        if precision not in PRECISIONS:
            raise InputError(f"precision={precision} is no number format; there are {', '.join(PRECISIONS)}.")
        self.precision = precision
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.diffusion.parameters()).device

    @property
    def enlargement(self) -> int:
        """Side of a result over the side of the low-resolution image that it was made from."""
        told = [getattr(c, "enlarge", 1) for _, c in self.diffusion.conditioners.items()]
        return int(self.diffusion.first_stage.downsampling) * max(told, default=1)  # type: ignore[arg-type]

    @property
    def reads(self) -> frozenset[str]:
        """Fields that a request may hold: caption, class_id, ...; empty for a model without conditions."""
        told = (c.reads for _, c in self.diffusion.conditioners.items())
        return frozenset().union(*told, *(guider.reads for guider in self.guiders))  # type: ignore[arg-type]

    # ---- the public face

    def sample(
        self,
        *,
        count: int | None = None,  # images of a model without conditions
        steps: int | None = None,  # None: the sampler's own; 50 for DDIM
        guidance_scale: float | None = None,  # None: 3 if the model was trained for it, else 1 (off)
        eta: float | None = None,  # None: the sampler's own; 0 for DDIM
        seed: int = 0,
        size: int | tuple[int, int] | None = None,  # side, or height and width, px; None: as trained
        batch_size: int = 16,
        sampler: str = "ddim",
        spacing: str | None = None,
        strength: float | None = None,  # with init_image: 0 keeps it, 1 forgets it; None: 0.6
        repeats: int | None = None,  # with mask: of each step, if the model was not trained to fill holes; None: 5
        tile: int | None = None,  # first stage in parts of this side, px; 0: at once; None: 512 above 1024x1024
        tile_norms: str = "shared",  # shared: as the whole image; separate: faster, tones may differ
        window: int | None = None,  # denoise windows of this side, px; 0: at once; None: super-resolution of large ones
        **fields: Sequence[Any]
        | Tensor,  # caption=[...], negative_prompt=[...], image=[...], mask=[...]: one entry an image
    ) -> Tensor:
        """uint8 (B, H, W, 3) on the CPU; image i is the same in any company.

        Any model takes init_image, where sampling starts, and image with mask, of which only the hole is made anew.
        """
        settings = SampleSettings(
            steps=steps, guidance_scale=guidance_scale, eta=eta, seed=seed, size=size, sampler=sampler, spacing=spacing,
            strength=strength, repeats=repeats, tile=tile, tile_norms=tile_norms, window=window,
        )  # fmt: skip
        requests = rows_of(fields, self.reads, count)
        self.check(requests)
        warn_of_lost(self.diffusion, requests)
        return torch.cat([images for _, images in generate(self, requests, settings, batch_size=batch_size)])

    @torch.inference_mode()
    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """uint8 (B, H, W, 3) => final latents (the posterior's mean)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(f"encode takes uint8 (B, H, W, 3), not {images.dtype} {tuple(images.shape)}.")
        self.diffusion.latent_shape((images.shape[1], images.shape[2]))  # sizes that do not fit are refused
        with in_parts(self.diffusion, chosen_tile(tile, images.shape[1] * images.shape[2])):
            return self.diffusion.encode(to_float(images.to(self.device).permute(0, 3, 1, 2)))

    @torch.inference_mode()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Final latents => uint8 (B, H, W, 3) on the CPU; `tile` as for `sample`."""
        pixels = latents[0, 0].numel() * int(self.diffusion.first_stage.downsampling) ** 2  # type: ignore[arg-type]
        with in_parts(self.diffusion, chosen_tile(tile, pixels)):
            return as_images(self.diffusion.decode(latents.to(self.device)))

    @torch.inference_mode()
    def conditioning(self, **fields: Sequence[Any] | Tensor) -> Conditioning:
        """caption=[...] and the like => what `denoise` takes."""
        return self.diffusion.conditioning(self.batch(rows_of(fields, self.reads, None), first_index=0))

    @torch.inference_mode()
    def denoise(self, x: Tensor, t: int, conditioning: Conditioning | None = None) -> Tensor:
        """Noisy latents at time t (0 .. T - 1) of the schedule => the clean estimate."""
        level = levels_of(self.diffusion.schedule).at(t)
        with self.autocast():
            return self.diffusion.denoiser(conditioning or Conditioning())(x.to(self.device), level).float()

    # ---- for `generate`

    def resolved(self, settings: SampleSettings, requests: Sequence[Mapping[str, Any]] = ()) -> SampleSettings:
        """The settings with every default filled in; what the model cannot do is refused before any work.

        Without a size that of the first request's image counts, if it has one.
        """
        guidance, conditioned = settings.guidance_scale, bool(self.diffusion.conditioners)
        if guidance is None:
            guidance = 3.0 if self.diffusion.guidance_trained and conditioned else 1.0
        check_guidance(guidance, self.diffusion.guidance_trained, conditioned=conditioned)
        if guidance == 1 and any(request.get("negative_prompt") for request in requests[:1]):
            raise InputError("a negative caption says where guidance leads away from; set guidance above 1.")
        asked = implied_size(requests[0], self.enlargement) if len(requests) else None
        size = asked or self.image_size if settings.size is None else settings.size
        size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if size != asked:  # a given image's size is carried on to what fits
            self.diffusion.latent_shape(size)
        known = settings.filled(
            guidance_scale=guidance,
            size=size,
            levels=self.diffusion.schedule.steps,
            strength=given_images.resolved_strength(settings.strength, requests),
            repeats=given_images.resolved_repeats(settings.repeats, requests, self.reads),
        )
        filled = with_parts(known, self.diffusion, min(self.image_size), self.reads)
        self.grid(filled)  # steps that the rule cannot take are refused
        return filled

    def grid(self, settings: SampleSettings) -> list[Level]:
        """The noise levels that resolved settings visit."""
        assert settings.steps is not None
        assert settings.spacing is not None
        schedule = self.diffusion.schedule
        grid = ddim_grid(schedule, settings.steps, settings.spacing)
        return grid if settings.strength is None else given_images.started_at(grid, settings.strength, schedule.steps)

    @torch.no_grad()  # not inference_mode: guiders need gradients
    def sample_batch(
        self,
        requests: Sequence[Mapping[str, Any]],
        settings: SampleSettings,  # resolved
        first_index: int | Sequence[int],
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """One batch of images, uint8 (B, H, W, 3) on the CPU."""
        assert settings.guidance_scale is not None
        assert isinstance(settings.size, tuple)
        batch = self.batch(requests, first_index)
        check_size(batch, settings.size, self.enlargement)
        canvas = self.canvas(batch, settings.size)
        told = on_canvas(batch, canvas, self.enlargement)
        parts = in_parts(self.diffusion, settings.tile, settings.tile_norms)
        with self.autocast(), parts, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # `resolved` has said it
            images = self.diffusion.sample(
                told,
                sampler=settings.build_sampler(),
                grid=self.grid(settings),
                index=batch["position"],
                size=canvas,
                guidance_scale=settings.guidance_scale,
                guiders=self.guiders,
                seed=settings.seed,
                after_step=after_step,
                given=given_image(self.diffusion, told, self.reads, settings.repeats),
                window=settings.window or None,
            )
        return finished(as_images(images), batch, settings.size)

    @torch.no_grad()
    def begin(self, requests: Sequence[Mapping[str, Any]], settings: SampleSettings, numbers: Sequence[int]) -> Tensor:
        """The noisy latents (B, C, h, w) that sampling these requests begins with."""
        assert isinstance(settings.size, tuple)
        batch = self.batch(requests, numbers)
        canvas = self.canvas(batch, settings.size)
        start = self.diffusion.start(batch["position"], canvas, settings.seed)
        given = given_image(self.diffusion, on_canvas(batch, canvas, self.enlargement), self.reads, None)
        return start if given is None else given.begin(start, self.grid(settings)[0])

    def canvas(self, batch: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what is sampled and then cut to `size`, px."""
        return canvas_of(batch, size, self.diffusion.size_step, self.enlargement)

    def batch(self, requests: Sequence[Mapping[str, Any]], first_index: int | Sequence[int]) -> dict[str, Any]:
        """Requests, a dict of fields each, as one batch; `position` is the number of the image."""
        indices = range(first_index, first_index + len(requests)) if isinstance(first_index, int) else first_index
        position = torch.tensor(list(indices), dtype=torch.int64, device=self.device)
        return {"position": position, **batch_of(requests, self.reads, self.device)}

    def check(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Refuse requests that mean nothing to this model."""
        check_requests(self.diffusion, requests, self.enlargement)

    def lost(self, request: Mapping[str, Any]) -> list[str]:
        """The ends of captions that the model cannot read because they are too long."""
        return lost(self.diffusion, request)

    def autocast(self) -> AbstractContextManager:
        """The precision in which the denoiser and the decoder run."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def generate(
    model: LoadedModel,
    requests: Sequence[Mapping[str, Any]],  # per image the fields that the model reads; {} without conditions
    settings: SampleSettings,
    *,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
    first_index: int = 0,
    after_step: AfterStep | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (numbers, uint8 (b, H, W, 3)); request i has number first_index + i and belongs to rank i % world.

    Noise is a function of (seed, number, step): neither the batch size nor the processes change an image.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} holds no image; choose 1 or more.")
    settings = model.resolved(settings, requests)
    mine = range(rank, len(requests), world)
    for start in range(0, len(mine), batch_size):
        chunk = mine[start : start + batch_size]
        numbers = [first_index + i for i in chunk]
        yield numbers, model.sample_batch([requests[i] for i in chunk], settings, numbers, after_step)


def as_images(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] => uint8 (B, H, W, 3) on the CPU."""
    return to_bytes(numbers_only(pixels)).permute(0, 2, 3, 1).contiguous().cpu()
