"""`ldmlab noise MODEL IMAGE`: an image's noised latents, with and without rescaling.

The grid has a row for the latent scale of the model and one for each --scale, columns for times. It
decodes alpha latent + sigma noise; numbers are signal-to-noise ratios in dB, 10 log10(alpha^2 Var / sigma^2).

examples:
  ldmlab noise runs/emoji-1a2b apple.png
  ldmlab noise runs/landscapes-1a2b lake.png --scale none 0.2 --times 0,250,500,750,999
"""

import argparse
import math
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ldmlab.contracts import Path
    from ldmlab.diffusion.latent_space import LatentScale
    from ldmlab.inference.model import LoadedModel

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=File, help="model folder, run folder or checkpoint")
    add("image", type=File, help="an image; its size is cut to what the model divides")
    add("--scale", nargs="+", default=["none"], help="other scales: none (latents as they are) or a factor (none)")
    add("--times", help="of the path, as the network receives them (six from its clean end to its noise end)")
    add("--seed", type=int, default=0, help="of the noise (0)")
    add("--out", type=File, default=File("noise.png"), help="the grid (noise.png)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")


def run(args: argparse.Namespace) -> None:
    """Encode, add noise at each time and scale, decode, save the grid."""
    from ldmlab.build import load
    from ldmlab.diffusion.latent_space import LatentScale
    from ldmlab.inference.grids import table

    if args.out.suffix.lower() not in _ENDINGS or args.out.is_dir():
        raise InputError(f"--out {args.out} is not an image file; give a name that ends in {', '.join(_ENDINGS)}.")
    scales = {name: LatentScale.fixed(_factor(name)) for name in args.scale}
    model = load(args.model, device=args.device)
    times = _times(args.times, model.diffusion.path)
    image = _image(args.image, model.diffusion.size_step)
    raw = model.diffusion.posterior(image.to(model.device)).mean
    rows, titles = [], []
    for name, scale in [("as trained", model.diffusion.latent_scale), *scales.items()]:
        frames, ratios = noised_row(model, raw, scale.to(model.device), times, args.seed)
        rows.append(frames)
        titles.append(f"scale {name}: {ratios}")
        print(titles[-1])
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out {args.out}: its folder cannot be made ({error.strerror}); give another.") from error
    table(rows, [f"t = {t:.4g}" for t in times], titles).save(args.out)
    print(args.out)


def noised_row(
    model: "LoadedModel", raw: "Tensor", scale: "LatentScale", times: list[float], seed: int
) -> tuple[list[Any], str]:
    """One image per time from raw latents (1, C, h, w), and the signal-to-noise ratios as text."""
    import torch

    from ldmlab.diffusion.schedule import decibels, even_time
    from ldmlab.nn.pixels import as_images
    from ldmlab.randomness import normal

    path = model.diffusion.path
    clean = scale.normalise(raw)
    variance = float(clean.var(correction=0))
    index = torch.zeros(1, dtype=torch.int64, device=raw.device)
    noise = normal(seed, "start", index, tuple(clean.shape[1:]))
    levels, frames = [path.level(t) for t in times], []
    for level in levels:
        x = level.alpha * clean + level.sigma * noise
        with torch.no_grad():
            pixels = model.diffusion.first_stage.decode(scale.denormalise(x))  # type: ignore[operator]
        frames.append(as_images(pixels)[0].numpy())
    ratios = [variance * (one.alpha / one.sigma) ** 2 if one.sigma else math.inf for one in levels]
    in_decibels = ", ".join(f"{decibels(ratio):.0f}" for ratio in ratios)
    even = even_time(path, variance)
    when = "never" if even is None else f"from t = {even:.4g}"
    return frames, f"variance {variance:.2f}; {in_decibels} dB; noise is stronger {when}"


def _times(text: str | None, path: "Path") -> list[float]:
    """Times that lie on the path; by default six with equal parts between them."""
    import torch

    known = path.quantile(torch.linspace(0, 1, 6, dtype=torch.float64).clamp_max(1 - 2**-33)).tolist()
    if text is None:
        return known
    ends = known[0], known[-1]
    try:
        times = [float(word) for word in text.split(",")]
        whole = all(time == int(time) for time in times) or not hasattr(path, "steps")  # indices, or a flow's times
        fits = whole and all(min(ends) <= time <= max(ends) for time in times)
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"--times {text}: write times of the schedule, {ends[0]:g} .. {ends[1]:g}, such as {ends[1]:g}."
        )
    return times


def _factor(name: str) -> float:
    try:
        factor = 1.0 if name == "none" else float(name)
    except ValueError as error:
        raise InputError(f"--scale {name} is not a factor; write none or a number such as 0.18215.") from error
    if not 0 < factor < float("inf"):
        raise InputError(f"--scale {name} must be above zero; write none or a number such as 0.18215.")
    return factor


def _image(path: File, step: int) -> "Tensor":
    """(1, 3, H, W) in [-1, 1], the middle as far as `step` divides it."""
    from ldmlab.inference.input_images import row
    from ldmlab.nn.pixels import to_float

    image = row("image", path)  # uint8 (3, H, W)
    height, width = (side // step * step for side in image.shape[1:])
    if not height or not width:
        raise InputError(f"{path} is smaller than the {step} px that this model divides images by; take a larger one.")
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return to_float(image[None, :, top : top + height, left : left + width])
