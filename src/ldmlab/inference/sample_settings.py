"""How an image is sampled: everything but the model and its inputs.

`SampleSettings` is the one list of these options: `LoadedModel.sample` takes them by name, `ldmlab sample` makes its
options of them, and every image and score records them. Nothing heavy is imported before a sampler is built.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ldmlab.argument_types import check_types, idle, named_value
from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.contracts import Sampler, Solver
    from ldmlab.diffusion.guidance import Guidance

SAMPLERS = sorted(path.stem for path in (Path(__file__).parents[1] / "samplers").glob("[!_]*.py"))
_SPACINGS = "official | quad | linspace | leading | trailing | karras | log_snr | polyexponential"
STRENGTH = 0.6  # default of image to image
REPEATS = 5  # default where a model fills holes without having been trained for it
LONGEST = 2**16  # px
GUIDANCE = ("guidance_interval", "guidance_rescale", "guided_channels", "weak_model")  # nothing at scale 1
# Recorded where they are used:
_SOMETIMES = (*GUIDANCE, "shift", "temperature", "churn", "quantize_x0", "strength", "repeats", "tile", "window")


def _option(default: Any, text: str, least: float | None = None, most: float = math.inf, words: str = "") -> Any:
    """A field with its help; numbers lie within `least` .. `most`, words are among `words`."""
    return field(default=default, metadata={"help": text, "least": least, "most": most, "words": words.split()})


@dataclass(frozen=True)
class SampleSettings:
    """None is replaced by the default of the sampler or the model (`LoadedModel.resolved`)."""

    steps: int | None = _option(None, "sampling steps (the sampler's own: 50 for ddim, all levels for ddpm)", 1, 10**6)
    guidance_scale: float | None = _option(
        None, "of classifier-free guidance; 1 is off (3 if the model was trained for it, else 1)", -1e6, 1e6
    )
    guidance_interval: tuple[float, float] | None = _option(
        None, "LOW..HIGH: guided only between these positions of the path, 0 (clean) .. 1 (noise) (everywhere)", 0
    )
    guidance_interval_unit: str = _option(
        "position", "position | sigma: what the interval's bounds are; sigma / alpha (position)", words="position sigma"
    )
    guidance_rescale: float | None = _option(None, "how far guidance keeps the output's deviation, 0 .. 1 (0)", 0, 1)
    guided_channels: int | None = _option(None, "only the first channels of the latent are guided; DiT: 3 (all)", 1)
    weak_model: str | None = _option(
        None, "guide away from this weaker model: run, checkpoint or model folder; PATH@raw, PATH@0.05: its weights"
    )
    eta: float | None = _option(None, "fresh noise per step: 0 none, 1 as DDPM (0; sampler euler_ancestral: 1)", 0)
    seed: int = _option(0, "with an image's number it decides the noise (0)", 0, 2**64 - 1)
    size: int | tuple[int, int] | None = _option(None, "HEIGHTxWIDTH or one side, px (as trained)", 1, LONGEST)
    sampler: str = _option("auto", f"auto | {' | '.join(SAMPLERS)}; NAME:option=value; or package.Class (auto)")
    spacing: str | None = _option(None, f"of the steps: {_SPACINGS} (the sampler's)")
    shift: float | None = _option(None, "of a flow's times; above 1: more steps at high noise (the model's)", 1e-6)
    temperature: float | None = _option(None, "factor of the fresh noise, for samplers that draw some (1)", 0)
    churn: float | None = _option(None, "noise before each step of euler or heun (0; EDM: 40)", 0)
    quantize_x0: bool | None = _option(None, "clean estimates to the nearest codebook vectors, for VQ first stages")
    strength: float | None = _option(
        None, f"with --from: near 0 keeps the image, 1 forgets it ({STRENGTH}; with --mask 1)", 1e-6, 1
    )
    repeats: int | None = _option(
        None, f"of each step where a model fills holes without having been trained for it ({REPEATS}); 1: fastest", 1
    )
    tile: int | None = _option(None, "decode in tiles of this side, px; 0: at once (512 above 1024x1024)", 0)
    tile_norms: str = _option(
        "shared", "shared: as decoded at once | separate: faster, tones may differ (shared)", words="shared separate"
    )
    window: int | None = _option(None, "denoise in windows of this side, px; 0: at once (docs/large_images.md)", 0)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in _PAIRS and (isinstance(value, tuple | list) or (one.name != "size" and value is not None)):
                if not isinstance(value, tuple | list) or len(value) != 2:
                    raise InputError(f"{one.name}={value!r:.40} is {_PAIRS[one.name]}")
                object.__setattr__(self, one.name, tuple(_checked(one.name, part) for part in value))
            elif value is not None or one.default is not None:
                object.__setattr__(self, one.name, _checked(one.name, value))

    def build_sampler(self) -> "Sampler":
        """Built with the options that differ from the sampler's own; a missing option may have its neutral value."""
        sampler = sampler_by_name(self.sampler)
        neutral = {"eta": 0.0, "temperature": 1.0, "churn": 0.0, "quantize_x0": False}
        chosen = {name: getattr(self, name) for name in neutral if getattr(self, name) is not None}
        other = {name: value for name, value in chosen.items() if value != getattr(sampler, name, neutral[name])}
        return sampler_by_name(self.sampler, **other) if other else sampler

    def guidance(self, scale: float, channels: int) -> "Guidance":
        """Guidance by these settings but for the weak model, for latents of that many channels.

        Settings without effect are refused.
        """
        from ldmlab.diffusion.guidance import Guidance

        found = {name: value for name in GUIDANCE if (value := getattr(self, name))}
        if scale == 1 and found:
            name, value = next(iter(found.items()))
            raise InputError(
                f"{name}={written(name, value)} does nothing at guidance_scale=1 (off); choose another scale."
            )
        if self.guidance_interval is None and self.guidance_interval_unit != "position":
            raise InputError(f"guidance_interval_unit={self.guidance_interval_unit} needs a guidance_interval; add it.")
        if (self.guided_channels or 0) > channels:
            raise InputError(f"guided_channels={self.guided_channels}: the latent has only {channels}; lower it.")
        where = self.guidance_interval, self.guidance_interval_unit
        return Guidance(scale, *where, self.guidance_rescale or 0.0, self.guided_channels)

    def filled(
        self,
        *,
        solver: "Solver",
        levels: int | None,
        inputs: Set[str] | None = None,
        fills_holes: bool = True,
        **known: Any,
    ) -> "ResolvedSettings":
        """With the sampler's defaults and what is `known` of the model.

        solver: the path's, for `auto`. levels: of a discrete schedule; None: of a continuous path.
        inputs: names of those of an image; None: unknown. fills_holes: by a model that was not trained for it.
        """
        if self.sampler == "auto":
            kept = [word for word in solver.sampler.split(":") if vars(self).get(word.partition("=")[0]) is None]
            rule = self.spacing or (solver.spacing if levels else None)  # a continuous path has its own
            auto = replace(self, sampler=":".join(kept), steps=self.steps or solver.steps, spacing=rule)
            return auto.filled(solver=solver, levels=levels, inputs=inputs, fills_holes=fills_holes, **known)
        sampler = self.build_sampler()
        if levels and self.sampler.partition(":")[0] in ("ode", "sde"):
            raise InputError(f"sampler={self.sampler} is for flows, and this model has a discrete schedule; use heun.")
        known["steps"] = self.steps or getattr(sampler, "steps", None) or levels or solver.steps
        paths = (getattr(sampler, "extrapolates", False) and solver.multistep) or solver.spacing  # of a continuous one
        known["spacing"] = self.spacing or (getattr(sampler, "spacing", "linspace") if levels else paths)
        known["eta"] = getattr(sampler, "eta", 0.0)
        if inputs is not None:
            starts, fills = "init_image" in inputs, fills_holes and "mask" in inputs
            if self.strength is not None and not starts:
                raise InputError(f"strength={self.strength} needs an image to start from; give init_image.")
            if self.repeats is not None and not fills:
                raise InputError(
                    f"repeats={self.repeats} is for holes filled by a model that was not trained for it; leave it out."
                )
            known["strength"] = STRENGTH if starts and self.strength is None else self.strength
            known["repeats"] = REPEATS if fills and self.repeats is None else self.repeats
        return ResolvedSettings(**{**asdict(self), **known})

    def as_text(self) -> dict[str, Any]:
        """Plain values for files, the size as HEIGHTxWIDTH; options of images and tiles only where they are used."""
        values = asdict(self)
        absent = [name for name in _SOMETIMES if values[name] in (None, 0)]
        absent += ["tile_norms"] * (not self.tile) + ["guidance_interval_unit"] * (not self.guidance_interval)
        return {k: written(k, v) if k in _PAIRS else v for k, v in values.items() if k not in absent}


class ResolvedSettings(SampleSettings):
    """Checked against a model and its inputs, every default filled in."""


def sampler_by_name(name: str, **options: Any) -> "Sampler":
    """Build samplers/NAME.py's class, or a plugin's class by its full name; an option that it lacks is refused.

    The name may hold options: `sde:form=linear:norm=0.5`.
    """
    from ldmlab.instantiate import instantiate

    name, *words = name.split(":")
    pairs = [*map(named_value, words), *options.items()]
    if len(options := dict(pairs)) < len(pairs):
        raise InputError(f"sampler={':'.join([name, *words])} and its options give one of them twice; give it once.")
    if "." in name:
        return instantiate({"_target_": name, **options}, where="sampler")
    if name not in SAMPLERS:
        raise InputError(f"sampler={name} is unknown; choose one of {', '.join(SAMPLERS)}.")
    target = getattr(importlib.import_module(f"ldmlab.samplers.{name}"), name.title().replace("_", ""))
    known = inspect.signature(target).parameters
    for option in options.keys() - known.keys():
        raise InputError(f"{option}={options[option]}: the sampler {name} has no such setting; leave it out.")
    if words:
        check_types(target, options, "sampler")
    sampler = target(**options)
    if changed := {option: value for option, value in options.items() if value != known[option].default}:
        for _, text, _ in idle(target, changed, "sampler"):
            raise InputError(text)
    return sampler


def parsed(name: str, text: str) -> Any:
    """The value of a setting typed as text; another type is refused."""
    if name == "size":
        sides = text.lower().split("x")
        if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and len(side) < 40 for side in sides):
            raise InputError(f"size={text:.40} is not a size; write HEIGHTxWIDTH, for instance 64x96.")
        return (_checked("size", int(sides[0]), text), _checked("size", int(sides[-1]), text))
    if name == "guidance_interval":
        low, dots, high = text.partition("..")
        if not (low and dots and high):
            raise InputError(f"{name}={text:.40} is {_PAIRS[name]}")
        return tuple(_of_text(name, part) for part in (low, high))
    return _of_text(name, text)


def _of_text(name: str, text: str) -> Any:
    kind = _kind(name)
    try:
        value = {"true": True, "false": False}.get(text.lower(), text) if kind is bool else kind(text)
    except ValueError:
        raise InputError(f"{name}={text:.40} is not {_KINDS[kind]}; {_way_out(name)}") from None
    return _checked(name, value, text)


def variants(settings: SampleSettings, sweep: str | None) -> tuple[str | None, dict[str, SampleSettings]]:
    """`steps=1,2,5` => the name, and settings by the end of their images' file names; without a sweep one of ''."""
    if sweep is None:
        return None, {"": settings}
    name, _, values = sweep.partition("=")
    names = [one.name for one in fields(SampleSettings)]
    if name not in names or not values.strip(","):
        raise InputError(f"sweep={sweep} is not a sweep; write one of {', '.join(names)} with values: steps=1,2,5.")
    found = [parsed(name, text.strip()) for text in values.split(",")]
    ends = (f"_{name}-{written(name, value)}".replace("/", "_") for value in found)
    return name, {end: replace(settings, **{name: value}) for end, value in zip(ends, found, strict=True)}


def written(name: str, value: Any) -> str:
    """As `parsed` reads it."""
    return ("x" if name == "size" else "..").join(map(str, value)) if isinstance(value, tuple) else str(value)


_PAIRS = {  # settings of two numbers
    "size": "not a size; give one side, or height and width, px.",
    "guidance_interval": "not an interval; give two numbers, LOW..HIGH, for instance 0.1..0.8.",
}
_KINDS: dict[Callable[[Any], Any], str] = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
}


def _kind(name: str) -> Callable[[Any], Any]:
    """int, float, str or bool: what a setting's annotation begins with."""
    annotation = SampleSettings.__annotations__[name]
    kinds = [kind for one in get_args(annotation) or (annotation,) for kind in get_args(one) or (one,)]
    return next(kind for kind in _KINDS if kind in kinds)


def _checked(name: str, value: Any, typed: str | None = None) -> Any:
    """A setting's value of the right type within its limits, or an InputError that shows it as `typed`."""
    kind, limits = _kind(name), SampleSettings.__dataclass_fields__[name].metadata
    shown = f"{value!r:.40}" if typed is None else typed[:40]
    if limits["words"] and value not in limits["words"]:
        raise InputError(f"{name}={value} is unknown; choose one of {', '.join(limits['words'])}.")
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise InputError(f"{name}={shown} is not {_KINDS[kind]}; {_way_out(name)}")
        return value
    try:
        number = kind(value)
        fits = not isinstance(value, bool | str) and math.isfinite(number) and (kind is float or number == value)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise InputError(f"{name}={shown} is not {_KINDS[kind]}; {_way_out(name)}")
    least, most = limits["least"], limits["most"]
    if least is not None and not least <= number <= most:
        largest = "2^64 - 1" if most == 2**64 - 1 else most
        within = f"{least} and above" if most == math.inf else f"{least} .. {largest}"
        raise InputError(f"{name}={shown} is outside {within}; {_way_out(name)}")
    return number


def _way_out(name: str) -> str:
    ways = {
        "guidance_scale": "choose 1 (off) or for instance 3.",
        "guidance_interval": "give two numbers, LOW..HIGH, for instance 0.1..0.8.",
        "guidance_rescale": "choose 0 (off) or for instance 0.7.",
        "guided_channels": "choose for instance 3, as DiT, or leave it out.",
        "weak_model": "give a run, a checkpoint or a model folder.",
        "strength": "choose 0.3 for small changes, 0.8 for large ones.",
        "repeats": f"choose 1 (fastest) or {REPEATS} (fits better).",
        "seed": "choose a non-negative integer.",
        "size": "write HEIGHTxWIDTH, for instance 64x96.",
        "steps": "choose for instance 50.",
        "sampler": f"choose one of {', '.join(SAMPLERS)}.",
        "spacing": "choose one of those in docs/samplers.md.",
        "temperature": "choose 1 (the sampler's noise) or a smaller factor.",
        "eta": "choose 0 (no fresh noise) or 1 (as DDPM).",
        "shift": "choose 1 (none) or for instance 3.",
        "churn": "choose 0 (none) or for instance 40.",
        "quantize_x0": "choose one of them.",
    }
    return ways.get(name, "choose 0 (at once) or for instance 512.")
