"""Files of diffusers' folders: settings with defaults filled in, and weights."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.files import read_text
from ldmlab.interop import imported

SIGNATURES = yaml.safe_load(files("ldmlab.interop.diffusers").joinpath("signatures.yaml").read_text(encoding="utf-8"))
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".non_ema", ".fp32", ".bf16", ".fp16")  # of the same weights, in the order of preference


def read_json(path: Path) -> dict[str, Any]:
    """A file of settings; InputError when it is missing or no JSON object."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the folder again, or give one that diffusers wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy the folder again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; copy the folder again.")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a module's folder: one file or several, safetensors first, else torch files of plain data."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            for ending in ("safetensors", "bin"):
                if files := _files(folder, stem, variant, ending):
                    return {key: tensor for file in files for key, tensor in imported.read_weights(file)[0].items()}
    here = ", ".join(sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")))
    why = f"only {here}, of an unknown variant" if here else "diffusion_pytorch_model.safetensors or the like"
    raise InputError(f"{folder} has no weights that can be read ({why}); copy it again.")


def _files(folder: Path, stem: str, variant: str, ending: str) -> list[Path]:
    """One file, or the parts of one: by an index, whose name depends on the release, or by their numbers."""
    if (whole := folder / f"{stem}{variant}.{ending}").is_file():
        return [whole]
    names = (f"{stem}.{ending}.index{variant}", f"{stem}{variant}.{ending}.index", f"{stem}.{ending}{variant}.index")
    for index in (folder / f"{name}.json" for name in names):
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
                raise InputError(f"{index} has no weight_map of file names; copy the folder again.")
            return [folder / Path(name).name for name in sorted(set(table.values()))]
    stem, variant, number = re.escape(stem), re.escape(variant), r"-(\d+)-of-(\d+)"
    pattern = re.compile(rf"{stem}(?:{variant}{number}|{number}{variant})\.{ending}")
    parts = {path: match for path in sorted(folder.glob("*")) if (match := pattern.fullmatch(path.name))}
    counts = {int(match[2] or match[4]) for match in parts.values()}
    if parts and counts != {len(parts)}:
        raise InputError(f"{folder} has {len(parts)} of {max(counts)} parts of its weights; copy it again.")
    return list(parts)


# Keys that describe the file or the hardware and change no output.
_NEUTRAL = frozenset(
    ("sample_size", "upcast_attention", "force_upcast", "addition_embed_type_num_heads", "num_train_timesteps")
)


def resolved(config: Mapping[str, Any], kind: str, part: str) -> dict[str, Any]:
    """The options of a class that are read; InputError for an unsupported value, of other options too."""
    defaults, only = SIGNATURES[part]["defaults"][kind], SIGNATURES[part]["only"]
    for key, value in config.items():
        if key.startswith("_") or key in _NEUTRAL or (key in defaults and key not in only):
            continue
        allowed = only.get(key, (None, False))
        if _plain(value) not in allowed:
            can = " or ".join(map(str, allowed))
            raise InputError(f"{kind} with {key}={value} is not supported; supported: {can}.")
    return {key: _plain(config.get(key, default)) for key, default in defaults.items()}


def named_class(config: Mapping[str, Any], part: str) -> str | None:
    """The class that a configuration names, None where it names none; InputError for another one."""
    named, supported = config.get("_class_name"), SIGNATURES[part]["defaults"]
    if named is not None and named not in supported:
        raise InputError(f"the {part}'s class {named} is not supported; supported: {', '.join(supported)}.")
    return named


def multiples(kind: str, widths: Sequence[int]) -> list[int]:
    """Widths of levels as multiples of the first."""
    if any(width % widths[0] for width in widths):
        raise InputError(f"{kind} with block_out_channels={widths}: not multiples of the first width; use another one.")
    return [width // widths[0] for width in widths]


def levels_with_attention(
    kind: str,
    options: Mapping[str, Any],
    attention: str,  # how the names of levels with attention begin
    supported: Iterable[str],  # supported names of levels
) -> list[bool]:
    """Which levels have attention, from the finest; the way up must mirror the way down."""
    types = options["down_block_types"], options["up_block_types"]
    for name in [*types[0], *types[1]]:
        if name not in supported:
            raise InputError(f"{kind} with a {name} is not supported; supported: {', '.join(sorted(supported))}.")
    down, up = ([name.startswith(attention) for name in way] for way in types)
    if down != up[::-1]:
        raise InputError(f"{kind} with other attention on the way up ({types[1]}) than down; use a symmetric one.")
    return down


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come from a file."""
    return list(value) if isinstance(value, tuple) else value
