"""States of frozen encoders beside the moments of latent shards: KEY.NAME.states.npy, float16, (views, L, D).

NAME is the conditioner's; views is 1 where the encoder reads no image (captions), else that of the moments.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldmlab.data.decode import stored_view
from ldmlab.data.reader import Files
from ldmlab.errors import InputError

DTYPE = "float16"
EncodeStates = Callable[[Tensor, Mapping[str, list[Any]]], dict[str, NDArray[np.float32]]]
# uint8 (B, 3, H, W) and the fields of the samples => by conditioner (B, views, L, D)


def state_files(key: str, states: Mapping[str, NDArray[np.float32]]) -> Files:
    """The files of one sample from its states (views, L, D)."""
    files = {}
    for name, values in states.items():
        with np.errstate(over="ignore"):
            stored = values.astype(DTYPE)
        if not np.isfinite(stored).all():
            raise InputError(
                f"encode: the states of conditioner.{name} for {key} do not fit {DTYPE} (largest "
                f"{np.abs(values).max():g}); leave conditioner.{name} out, so that it runs while training."
            )
        npy = io.BytesIO()
        np.save(npy, stored, allow_pickle=False)
        files[_ending(name)] = npy.getvalue()
    return files


def decode_states(files: Files, name: str, view: int) -> NDArray[Any]:
    """What conditioner `name` says of one view, float16 (L, D)."""
    return stored_view(files[_ending(name)], view, axes=3, one_serves=True).copy()


def _ending(name: str) -> str:
    return f"{name.lower()}.states.npy"
