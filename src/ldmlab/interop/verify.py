"""Two programs on the same input, compared by the largest difference of their outputs.

Shapes: B batch, C latent channels, h w latent size, L tokens, D their width.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.diffusion.schedule import ddim_grid
from ldmlab.errors import InputError
from ldmlab.interop.imported import Imported, assembled, assembled_first_stage

LIMIT = 1e-4  # float32 runs of one network differ by about 1e-5
CAPTIONS = ("", "a red apple", "Grüße aus Köln: 2 CATS & one dog, it's 5 o'clock!", "one of many words " * 40)
Differences = dict[str, float]


def check_close(part: str, mine: Tensor, foreign: Tensor) -> float:
    """The largest absolute difference; InputError from 1e-4 on, or where either side is not finite."""
    if mine.shape != foreign.shape:
        raise InputError(
            f"export: the {part} gives {list(foreign.shape)} there, {list(mine.shape)} here; use --format ldmlab."
        )
    difference = float((mine.double() - foreign.double()).abs().max())
    if not difference < LIMIT:  # also for nan
        raise InputError(
            f"export: the {part} differs by {difference:.1e} between the two programs, more than {LIMIT:.0e}; "
            "nothing was written, use --format ldmlab."
        )
    return difference


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that are the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def compare_unet(unet: nn.Module, foreign: Callable[..., Any], rows: Tensor | None = None) -> float:
    """Outputs for random latents at two times; ours takes `rows` of the other one's class table."""
    levels = len(unet.down)  # type: ignore[arg-type]
    side = max(2**levels, 8)
    x, t = noise(2, int(unet.in_channels), side, side), torch.tensor([1.0, 500.0])  # type: ignore[arg-type]
    slots: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    if unet.context_width is not None:
        slots["tokens"] = inputs["encoder_hidden_states"] = noise(2, 7, int(unet.context_width), seed=1)  # type: ignore[arg-type]
    if rows is not None:
        inputs["class_labels"] = torch.tensor([0, len(rows) - 1])
        slots["vector"] = rows[inputs["class_labels"]]
    elif unet.vector_width is not None:
        slots["vector"] = inputs["class_labels"] = noise(2, int(unet.vector_width), seed=2)  # type: ignore[arg-type]
    return check_close("U-Net", unet(x, t, Conditioning(**slots)), foreign(x, t, **inputs).sample)


def raw_latents(stage: nn.Module) -> LatentSpace:
    """A first stage alone, whose final latents are the raw ones."""
    return LatentSpace(stage, LatentScale())


@torch.no_grad()
def compare_first_stage(model: LatentSpace, foreign: Any, scaling_factor: float) -> Differences:
    """Final latents of an image and images of final latents; of a codebook, the vectors are its own."""
    stage: Any = model.first_stage
    side = max(4 * stage.downsampling, 16)
    images = noise(1, 3, side, side).clamp(-1, 1)
    posterior, scale = model.posterior(images), model.latent_scale
    found = foreign.encode(images)
    mine = scale.normalise(posterior.mean)
    if posterior.logvar is None:
        encoded = found.latents * scaling_factor
        codes = torch.randint(stage.codebook_size, (1, 4, 4), generator=torch.Generator().manual_seed(3))
        latents = scale.normalise(stage.quantiser.codebook.weight[codes].movedim(-1, 1))
    else:
        encoded, latents = found.latent_dist.mean * scaling_factor, noise(*mine.shape, seed=3)
        spread = torch.exp(0.5 * posterior.logvar) / scale.std[:, None, None]
        check_close("encoder's spread", spread, found.latent_dist.std * scaling_factor)
    return {
        "encoder": check_close("encoder", mine, encoded),
        "decoder": check_close("decoder", model.decode(latents), foreign.decode(latents / scaling_factor).sample),
    }


@torch.no_grad()
def compare_text(text: Any, tokenizer: Any, encoder: Any, length: int) -> float:
    """Token numbers, which must be equal, and states of captions: empty, short, strange, too long."""
    captions = list(CAPTIONS)
    mine = text.ids(captions) if hasattr(text, "ids") else text.tokenizer(captions)
    foreign = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    for caption, row, other in zip(captions, mine.cpu(), foreign, strict=True):
        if not torch.equal(row, other):
            raise InputError(
                f"export: the tokens of the caption {caption[:40]!r} differ between the two programs; "
                "nothing was written, use --format ldmlab."
            )
    return check_close("text encoder", text({"caption": captions}, None), encoder(foreign)[0])


def compare_schedule(model: LatentDiffusion, scheduler: Any) -> float:
    """alpha_bar of all levels, and the levels that DDIM visits."""
    total = model.schedule.steps
    steps = next((count for count in (50, 20, 10, 5, 2, 1) if total % count == 0 and count < total), None)
    if steps is not None:
        scheduler.set_timesteps(steps)
        spacing = "trailing" if model.schedule.zero_terminal_snr else "official"
        visited = [level.time for level in ddim_grid(model.schedule, steps, spacing)[:-1]]
        if visited != scheduler.timesteps.tolist():
            raise InputError(f"export: DDIM visits other levels there than {visited[:3]} ...; use --format ldmlab.")
    return check_close("schedule", model.schedule.alpha_bar, scheduler.alphas_cumprod)


@torch.no_grad()
def compare_imports(ours: Imported, foreign: Imported) -> Differences:
    """Two descriptions with weights, run on the same noise; tensors of conditioners must be equal."""
    if ours.spec["kind"] == "first_stage":
        stages = [raw_latents(assembled_first_stage(side)) for side in (ours, foreign)]
        return compare_latent_spaces(stages[0], stages[1])
    mine, other = assembled(ours), assembled(foreign)
    result = {"U-Net": compare_unet(mine.backbone, _as_diffusers(other.backbone))}
    result |= compare_latent_spaces(mine, other)
    result["schedule"] = check_close("schedule", mine.schedule.alpha_bar, other.schedule.alpha_bar)
    tensors, found = (_unnamed(model.conditioners.state_dict()) for model in (mine, other))
    for name, tensor in tensors.items():
        if name not in found or not torch.equal(tensor, found[name]):
            raise InputError(f"export: the conditioner's {name} is not the same when read again; use --format ldmlab.")
    return result


def compare_latent_spaces(ours: LatentSpace, foreign: LatentSpace) -> Differences:
    """Final latents of an image, and the image of those latents."""
    stage: Any = ours.first_stage
    images = noise(1, 3, *[max(4 * stage.downsampling, 16)] * 2).clamp(-1, 1)
    latents = ours.encode(images)
    return {
        "encoder": check_close("encoder", latents, foreign.encode(images)),
        "decoder": check_close("decoder", ours.decode(latents), foreign.decode(latents)),
    }


def _as_diffusers(unet: nn.Module) -> Callable[..., Any]:
    """Our U-Net with the interface of diffusers'."""

    def run(x: Tensor, t: Tensor, **inputs: Tensor) -> SimpleNamespace:
        conditioning = Conditioning(tokens=inputs.get("encoder_hidden_states"), vector=inputs.get("class_labels"))
        return SimpleNamespace(sample=unet(x, t, conditioning))

    return run


def _unnamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of conditioners without the names that a model gives to its conditioners."""
    return {name.partition(".")[2]: tensor for name, tensor in state.items()}
