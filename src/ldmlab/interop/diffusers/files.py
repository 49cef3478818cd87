"""Configurations and weights in the folders that diffusers and transformers write."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop import weights_file

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".non_ema", ".fp16")  # of the same weights, in the order of preference


def read_json(path: Path) -> dict[str, Any]:
    """A file of settings; InputError when it is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the folder again, or give one that diffusers wrote.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy the folder again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; copy the folder again.")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a module's folder: one file or several with an index, safetensors first, else a safe pickle."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            for ending in ("safetensors", "bin"):
                file = folder / f"{stem}{variant}.{ending}"
                if file.is_file():
                    return _tensors(file)
                index = folder / f"{stem}.{ending}.index{variant}.json"
                if index.is_file():
                    files = sorted(set(read_json(index)["weight_map"].values()))
                    return {key: tensor for name in files for key, tensor in _tensors(folder / Path(name).name).items()}
    raise InputError(f"{folder} has no weights (diffusion_pytorch_model.safetensors or the like); copy it again.")


def _tensors(file: Path) -> dict[str, Tensor]:
    return weights_file.read_weights(file)[0]
