"""Two programs on the same input, compared by the largest difference of their outputs.

Shapes: B batch, C latent channels, h w latent size, L tokens, D their width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.diffusion.paths import LinearPath
from ldmlab.diffusion.schedule import ddim_grid
from ldmlab.errors import InputError
from ldmlab.interop.imported import assembled, assembled_first_stage
from ldmlab.model_files import ModelFiles
from ldmlab.nn.blocks import pooled_first

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
def compare_denoiser(network: Any, foreign: Callable[..., Tensor], rows: Tensor | None = None) -> float:
    """Outputs for random latents at two times; with `rows` the other takes their numbers in place of a vector.

    foreign: x, t, tokens or None, vector or numbers or None => output.
    """
    side = max(2 ** len(getattr(network, "down", ())), 4 * getattr(network, "size_step", 2))
    x, t = noise(2, network.in_channels, side, side), torch.tensor([1.0, 500.0])
    tokens = None if network.context_width is None else noise(2, 7, network.context_width, seed=1)
    width = getattr(network, "pooled_width", None) or network.vector_width
    vector = labels = None if width is None else noise(2, width, seed=2)
    if rows is not None:
        labels = torch.tensor([0, len(rows) - 1])
        vector = rows[labels]
    own = Conditioning(tokens=tokens, vector=vector)
    if getattr(network, "pooled_width", None):
        assert vector is not None and tokens is not None  # noqa: PT018
        own = Conditioning(tokens=pooled_first(vector, tokens))
    ours = network(x, t, own)
    return check_close("denoiser", ours, foreign(x, t, tokens, labels))


def raw_latents(stage: nn.Module) -> LatentSpace:
    """A first stage alone, whose final latents are the raw ones."""
    return LatentSpace(stage, LatentScale())


def latent_distribution(space: LatentSpace, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean of the final latents, and their standard deviation where there is one."""
    posterior, scale = space.posterior(images), space.latent_scale
    spread = None if posterior.logvar is None else torch.exp(0.5 * posterior.logvar) / scale.std[:, None, None]
    return scale.normalise(posterior.mean), spread


@torch.no_grad()
def compare_first_stage(
    ours: LatentSpace,
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]],  # images => mean and spread of final latents there
    decode: Callable[[Tensor], Tensor],  # final latents => images
) -> Differences:
    """Final latents of an image and images of final latents; of a codebook, the vectors are its own."""
    stage: Any = ours.first_stage
    side = max(4 * stage.downsampling, 16)
    images = noise(1, 3, side, side).clamp(-1, 1)
    (mean, spread), (their_mean, their_spread) = latent_distribution(ours, images), encode(images)
    latents = mean if spread is None else noise(*mean.shape, seed=3)
    if spread is not None and their_spread is not None:
        check_close("encoder's spread", spread, their_spread)
    elif hasattr(stage, "quantiser"):
        codes = torch.randint(stage.codebook_size, (1, 4, 4), generator=torch.Generator().manual_seed(3))
        latents = ours.latent_scale.normalise(stage.quantiser.codebook.weight[codes].movedim(-1, 1))
    return {
        "encoder": check_close("encoder", mean, their_mean),
        "decoder": check_close("decoder", ours.decode(latents), decode(latents)),
    }


@torch.no_grad()
def compare_text(text: Any, tokenizer: Any, encoder: Any, length: int) -> float:
    """Token numbers, which must be equal, and states of captions: empty, short, strange, too long."""
    captions = list(CAPTIONS)
    mine = text.ids(captions)
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


def compare_schedule(model: LatentDiffusion, scheduler: Any, token_values: int) -> float:
    """alpha_bar of all levels, and the levels that DDIM visits; of a flow, the levels of ten steps."""
    if not hasattr(model.schedule, "steps"):
        return compare_flow(model.schedule, scheduler, token_values)
    total = model.schedule.steps
    steps = next((count for count in (50, 20, 10, 5, 2, 1) if total % count == 0 and count < total), None)
    if steps is not None:
        scheduler.set_timesteps(steps)
        spacing = "trailing" if model.schedule.zero_terminal_snr else "official"
        visited = [level.time for level in ddim_grid(model.schedule, steps, spacing)[:-1]]
        if visited != scheduler.timesteps.tolist():
            raise InputError(f"export: DDIM visits other levels there than {visited[:3]} ...; use --format ldmlab.")
    return check_close("schedule", model.schedule.alpha_bar, scheduler.alphas_cumprod)


def compare_flow(path: Any, scheduler: Any, token_values: int) -> float:
    """Levels and times of ten steps; those of a `LinearPath` are handed to the scheduler, whose own are others."""
    steps, tokens, config = 10, 1024, scheduler.config
    plain = type(path) is LinearPath
    given: dict[str, Any] = {"sigmas": [1 - i / steps for i in range(steps)]} if plain else {}
    if config.get("use_dynamic_shifting"):
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        given["mu"] = config.base_shift + slope * (tokens - config.base_image_seq_len)
    scheduler.set_timesteps(steps, **given)
    grid = path.at_size(tokens * token_values).grid(steps)
    sigma = torch.tensor([level.alpha if config.get("invert_sigmas") else level.sigma for level in grid])
    times, span = torch.tensor([level.time for level in grid[:-1]]), abs(path.noise_time - path.clean_time)
    check_close("times", times / span, scheduler.timesteps / span)
    top = sigma.max()
    return check_close("schedule", sigma / top, scheduler.sigmas / top)


@torch.no_grad()
def compare_imports(ours: ModelFiles, foreign: ModelFiles) -> Differences:
    """Two descriptions with weights, run on the same noise; tensors of conditioners must be equal."""
    if ours.spec["kind"] == "first_stage":
        mine, other = (raw_latents(assembled_first_stage(side)) for side in (ours, foreign))
        return compare_first_stage(mine, lambda images: latent_distribution(other, images), other.decode)
    model, found = assembled(ours), assembled(foreign)

    def run(x: Tensor, t: Tensor, tokens: Tensor | None, vector: Tensor | None) -> Tensor:
        return found.backbone(x, t, Conditioning(tokens=tokens, vector=vector))

    result = {"denoiser": compare_denoiser(model.backbone, run)}
    result |= compare_first_stage(model, lambda images: latent_distribution(found, images), found.decode)
    result["schedule"] = check_close("schedule", model.schedule.alpha_bar, found.schedule.alpha_bar)
    # without the names that a model gives to its conditioners
    tensors, others = (
        {name.partition(".")[2]: tensor for name, tensor in side.conditioners.state_dict().items()}
        for side in (model, found)
    )
    for name, tensor in tensors.items():
        if name not in others or not torch.equal(tensor, others[name]):
            raise InputError(f"export: the conditioner's {name} is not the same when read again; use --format ldmlab.")
    return result
