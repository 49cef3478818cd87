"""Inference API: a loaded latent diffusion model (`ldmlab.load`) that samples, encodes, decodes and denoises.

Images are uint8 (B, H, W, 3) here; latents are final ones, (B, C, h, w) float32.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from ldmlab.contracts import AfterStep, Conditioning, Guider, Level, Solver
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.parameterization import begun
from ldmlab.diffusion.respacing import POWERS
from ldmlab.errors import InputError
from ldmlab.first_stages.tiled import TiledFirstStage
from ldmlab.inference.input_images import finished, started_at
from ldmlab.inference.inputs import Inputs, ReadsInputs, check_size, different, has_images, implied_size, rows_of
from ldmlab.inference.sample_settings import ResolvedSettings, SampleSettings
from ldmlab.nn.compiling import Choice, compile_regions, wanted
from ldmlab.nn.pixels import as_images, to_float
from ldmlab.nn.tiling import latent_windows
from ldmlab.sharded import is_sharded

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel(ReadsInputs):
    """Samples, encodes, decodes and denoises with finished weights."""

    def __init__(
        self,
        diffusion: LatentDiffusion,
        image_size: int | tuple[int, int],  # trained on: side, or height and width, px
        info: Mapping[str, Any],  # path, weights, fingerprint, step, ...
        precision: str = "float32",  # of the denoiser: float32 | bfloat16 | float16
        frozen: bool = True,  # False: of a model in training, whose modes and gradients stay
        solver: Solver | None = None,  # what sampler=auto is; None: the path's
        load: "Callable[[str], LoadedModel] | None" = None,  # of a weak model by its name; None: there is none
    ) -> None:
        self.diffusion = diffusion.eval().requires_grad_(False) if frozen else diffusion
        if self.device.type == "cuda":  # on a CPU this layout was measured to be slower
            self.diffusion.to(memory_format=torch.channels_last)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = height, width
        self.info = dict(info)
        self.guiders: tuple[Guider, ...] = ()
        self._load, self._compile, self._solver = load, cast(Choice, False), solver
        self._weak: dict[str, LatentDiffusion] = {}  # by name
        self.in_precision(precision)

    def with_guiders(self, *guiders: Guider) -> "LoadedModel":
        """The same model, with guiders in addition to classifier-free guidance."""
        self.guiders = guiders
        self.info["guiders"] = {name: value for guider in guiders for name, value in guider.as_text().items()}
        return self

    def with_weak_model(self, name: str, other: "LoadedModel") -> "LoadedModel":
        """The same model, with another one of the same latents that `weak_model=name` guides away from."""
        from ldmlab.inference.weak_model import check_weak

        check_weak(self.diffusion, other.diffusion, name)
        other.diffusion.first_stage = self.diffusion.first_stage  # the same weights once
        self._weak[name] = other.compiled(self._compile).diffusion
        known = {key: other.info[key] for key in ("path", "fingerprint", "weights", "step") if key in other.info}
        self.info["weak_models"] = {**self.info.get("weak_models", {}), name: known}
        return self

    def in_precision(self, precision: str) -> "LoadedModel":
        """The same model; its networks compute in float32 | bfloat16 | float16."""
        if precision not in PRECISIONS:
            raise InputError(f"precision={precision} is unknown; choose {', '.join(PRECISIONS)}.")
        self.precision = precision
        return self

    def compiled(self, choice: Choice) -> "LoadedModel":
        """The same model; its networks are compiled block by block where chosen: true | false | auto, on a GPU."""
        self._compile = choice
        if wanted(choice, self.device):
            compile_regions(self.diffusion)
        return self

    @property
    def sharded(self) -> bool:
        """Whether processes share the weights."""
        return any(is_sharded(p) for p in self.diffusion.parameters())

    def sample(
        self,
        *,
        count: int | None = None,  # images of a model without conditions
        batch_size: int = 16,
        **options: Any,  # of `SampleSettings`, and inputs: caption=[...], negative_prompt=[...], image=[...], ...
    ) -> Tensor:
        """uint8 (B, H, W, 3) on the CPU; image i is the same in any batch.

        Settings are those of `SampleSettings`: steps, guidance_scale, eta, seed, size, sampler, ... Inputs have one
        entry an image. Any model takes init_image, where sampling starts, and image with mask, of which only the hole
        is generated.
        """
        chosen = [one.name for one in fields(SampleSettings) if one.name in options]
        settings = SampleSettings(**{name: options.pop(name) for name in chosen})
        inputs = rows_of(options, self.reads, count)
        self.check(inputs)
        for end in (end for one in different(inputs) for end in self.lost(one)):
            warnings.warn(f'the model does not see the end of a caption that is too long: "{end}"', stacklevel=2)
        return torch.cat([images for _, images in generate(self, inputs, settings, batch_size=batch_size)])

    def resolved(self, settings: SampleSettings, inputs: Sequence[Inputs] = ()) -> ResolvedSettings:
        """The settings with every default filled in; unsupported settings are refused before any work.

        Without a size, that of the first entry's image is used, if it has one.
        """
        first, scale = (inputs[0] if len(inputs) else None), settings.guidance_scale
        if scale is None:
            scale = 2.0 if settings.weak_model else self.diffusion.usual_guidance
        if (scale == 1 or settings.weak_model) and first and first.get("negative_prompt"):
            why = f"weak_model={settings.weak_model}" if scale != 1 else "guidance_scale=1"
            way = "leave out one of them" if scale != 1 else "choose a scale above 1"
            raise InputError(f"{why} makes no use of negative_prompt; {way}.")
        self.diffusion.check_guidance(self._guidance(replace(settings, guidance_scale=scale)))  # before any work
        implied = None if first is None else implied_size(first, self.enlargement)
        size = implied or self.image_size if settings.size is None else settings.size
        size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if size != implied:  # an input image's size is padded to what fits
            self.diffusion.latent_shape(size)
        resolved = settings.filled(
            solver=self._solver or self.diffusion.path.solver,
            levels=getattr(self.diffusion.schedule, "steps", None),
            guidance_scale=scale,
            size=size,
            inputs=None if first is None else first.keys() - {n for n in first if first[n] is None},
            fills_holes="mask" not in self.reads,
            tile=self.chosen_tile(settings.tile, size[0] * size[1]),
            window=self.chosen_window(settings.window, size),
        )
        if settings.tile_norms != "shared" and not resolved.tile:
            raise InputError(f"tile_norms={settings.tile_norms} has no effect without tiles; add tile=512.")
        if resolved.tile:
            TiledFirstStage(self.diffusion.first_stage, resolved.tile, resolved.tile_norms)
        if resolved.window:
            latent_windows(size, resolved.window, int(self.diffusion.first_stage.downsampling))  # type: ignore[arg-type]
        self.grid(resolved)  # steps that the rule cannot take are refused
        return resolved

    def _guidance(self, settings: SampleSettings) -> Guidance:
        """By settings with a scale; their weak model is loaded once."""
        assert settings.guidance_scale is not None
        name, channels = settings.weak_model, int(self.diffusion.first_stage.latent_channels)  # type: ignore[arg-type]
        guidance = settings.guidance(settings.guidance_scale, channels)
        if name is not None and name not in self._weak:
            if self._load is None:
                raise InputError(
                    f"weak_model={name} cannot be loaded here; add it by model.with_weak_model(name, other)."
                )
            self.with_weak_model(name, self._load(name))
        return replace(guidance, weak=self._weak[name]) if name else guidance

    def grid(self, settings: SampleSettings) -> list[Level]:
        """The noise levels that resolved settings visit."""
        assert settings.steps is not None and settings.spacing is not None  # noqa: PT018
        assert isinstance(settings.size, tuple)
        stage: Any = self.diffusion.first_stage
        values = stage.latent_channels * math.prod(-(-side // stage.downsampling) for side in settings.size)
        path = self.diffusion.path.at_size(values)
        path = path if settings.shift is None else path.with_shift(settings.shift)
        if settings.shift is not None and settings.spacing.partition(":")[0] in POWERS:
            raise InputError(
                f"shift={settings.shift} has no effect on spacing={settings.spacing}, whose steps are even in sigma / "
                "alpha; leave it out, or add spacing=linspace."
            )
        grid = path.grid(settings.steps, settings.spacing)
        return grid if settings.strength is None else started_at(grid, settings.strength, path)

    @torch.no_grad()  # not inference_mode: guiders need gradients
    def sample_batch(
        self,
        inputs: Sequence[Inputs],
        settings: SampleSettings,  # resolved
        first_index: int | Sequence[int],
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """One batch of images, uint8 (B, H, W, 3) on the CPU."""
        assert isinstance(settings.size, tuple)
        sampler = settings.build_sampler()
        if len(inputs) > 1 and getattr(sampler, "one_image", False):
            numbers = range(first_index, first_index + len(inputs)) if isinstance(first_index, int) else first_index
            alone = zip(inputs, numbers, strict=True)
            return torch.cat([self.sample_batch([one], settings, number, after_step) for one, number in alone])
        batch = self.batch(inputs, first_index)
        check_size(batch, settings.size, self.enlargement)
        tiles = self.in_tiles(settings.tile, settings.tile_norms)
        with self.autocast(), tiles, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # `resolved` has warned already
            canvas, padded, given = self.started(batch, settings.size, settings.repeats)
            images = self.diffusion.sample(
                padded,
                sampler=sampler,
                grid=self.grid(settings),
                index=batch["position"],
                size=canvas,
                guidance=self._guidance(settings),
                guiders=self.guiders,
                seed=settings.seed,
                after_step=after_step,
                given=given,
                window=settings.window or None,
            )
        made = as_images(images)
        return finished(made, batch, settings.size) if has_images(batch) else made

    @torch.no_grad()
    def begin(self, inputs: Sequence[Inputs], settings: SampleSettings, numbers: Sequence[int]) -> Tensor:
        """The initial noisy latents (B, C, h, w) for these inputs."""
        assert isinstance(settings.size, tuple)
        batch = self.batch(inputs, numbers)
        canvas, _, given = self.started(batch, settings.size, None)
        start = self.diffusion.start(batch["position"], canvas, settings.seed)
        first = self.grid(settings)[0]
        return begun(start, first) if given is None else given.begin(start, first)

    @torch.inference_mode()
    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """uint8 (B, H, W, 3) => final latents (the posterior's mean)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(f"encode takes uint8 (B, H, W, 3), not {images.dtype} {tuple(images.shape)}.")
        self.diffusion.latent_shape((images.shape[1], images.shape[2]))  # sizes that do not fit are refused
        with self.in_tiles(self.chosen_tile(tile, images.shape[1] * images.shape[2])):
            return self.diffusion.encode(to_float(images.to(self.device).permute(0, 3, 1, 2)))

    @torch.inference_mode()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Final latents => uint8 (B, H, W, 3) on the CPU; `tile` as for `sample`."""
        pixels = latents[0, 0].numel() * int(self.diffusion.first_stage.downsampling) ** 2  # type: ignore[arg-type]
        with self.in_tiles(self.chosen_tile(tile, pixels)):
            return as_images(self.diffusion.decode(latents.to(self.device)))

    @torch.inference_mode()
    def conditioning(self, **columns: Sequence[Any] | Tensor) -> Conditioning:
        """Inputs such as `caption=[...]` to the conditioning that `denoise` takes."""
        return self.diffusion.conditioning(self.batch(rows_of(columns, self.reads, None), first_index=0))

    @torch.inference_mode()
    def denoise(self, x: Tensor, t: float, conditioning: Conditioning | None = None) -> Tensor:
        """Noisy latents at a time of the path (0 .. T - 1 of a discrete schedule) => the clean estimate."""
        level = self.diffusion.path.level(t)
        with self.autocast():
            return self.diffusion.denoiser(conditioning or Conditioning())(x.to(self.device), level).float()

    def in_tiles(self, tile: int | None, norms: str = "shared") -> AbstractContextManager[Any]:
        """Inside, the first stage works in tiles of that side, px; 0 or None: at once."""
        return self.diffusion.through(TiledFirstStage(self.diffusion.first_stage, tile, norms) if tile else None)

    def autocast(self) -> AbstractContextManager:
        """The precision in which the denoiser and the decoder run."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def generate(
    model: LoadedModel,
    inputs: Sequence[Inputs],
    settings: SampleSettings,
    *,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
    first_index: int = 0,
    after_step: AfterStep | None = None,
    skip: Collection[int] = (),
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (numbers, uint8 (b, H, W, 3)); entry i has number first_index + i and belongs to rank i % world.

    skip: entries that are left out; the numbers of the others stay as they are.

    Noise is a function of (seed, number, step): neither the batch size nor the processes change an image.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} holds no image; choose 1 or more.")
    resolved = settings if isinstance(settings, ResolvedSettings) else model.resolved(settings, inputs)
    if world > 1 and getattr(resolved.build_sampler(), "one_image", False) and model.sharded:
        raise InputError(
            f"sampler={resolved.sampler} takes as many steps as an image needs, which processes that share a sharded "
            "model cannot; choose one of fixed steps, for instance heun or ode:method=rk4."
        )
    shares = [[i for i in range(one, len(inputs), world) if i not in skip] for one in range(world)]
    mine = shares[rank]
    for start in range(0, len(mine), batch_size):
        chunk = mine[start : start + batch_size]
        numbers = [first_index + i for i in chunk]
        yield numbers, model.sample_batch([inputs[i] for i in chunk], resolved, numbers, after_step)
    batches, most = (-(-images // batch_size) for images in (len(mine), max(map(len, shares))))
    if batches < most and model.sharded:  # others' last batch needs us too
        model.sample_batch(inputs[:1], resolved, [first_index])
