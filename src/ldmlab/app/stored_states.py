"""States of frozen encoders that latent shards carry: made by `ldmlab encode`, held against the run that reads them."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldmlab.data.latent_shards import DTYPE, EncodeStates
from ldmlab.data.shard_data import ShardData, stored_states
from ldmlab.errors import InputError


def states_record(modules: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the manifest tells of the states of these conditioners; None without any."""
    for name, module in modules.items():
        if _learns(module):
            raise InputError(
                f"conditioner.{name} learns with the denoiser, so its states are not known before; leave it out of "
                "encode, or freeze it (trainable=false)."
            )
        if not hasattr(module, "made_by"):
            raise InputError(
                f"conditioner={name} has no frozen encoder whose states could be stored; leave it out of encode."
            )
    return {name: _record(module) for name, module in modules.items()} or None


def states_encoder(modules: Mapping[str, Any], mirrored: bool) -> EncodeStates:
    """Runs the conditioners on a batch of images and their fields; those that look at images see both views."""

    @torch.no_grad()
    def encode(images: Tensor, fields: Mapping[str, list[Any]]) -> dict[str, NDArray[np.float32]]:
        made = {}
        for name, module in modules.items():
            views = [images, images.flip(-1)] if mirrored and "reference" in module.reads else [images]
            said = [module({**fields, "reference": view}, _no_latents) for view in views]
            made[name] = torch.stack(said, dim=1).float().cpu().numpy()  # (B, views, L, D)
        return made

    return encode


def check_states(modules: Mapping[str, Any], data: ShardData) -> None:
    """Refuse states that the run's own encoders would not have made."""
    for name in data.stored:
        if _learns(modules[name]):
            raise InputError(
                f"conditioner.{name} learns, but data.latents={data.latents} holds states of a frozen one; freeze it "
                "(trainable=false), or set data.states=false."
            )
        now = _record(modules[name]) if hasattr(modules[name], "made_by") else {}
        for split in ("train", "val"):
            there = stored_states(data.manifest(split, "latents")).get(name, {})
            if differing := sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key)):
                raise InputError(
                    f"data.latents={data.latents} holds states of another conditioner.{name} than this run's "
                    f"({_told(differing[0], there, now)}); encode again, or set data.states=false to run the encoder."
                )


def _told(key: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """layer=last there, penultimate here."""
    return f"{key}={there.get(key)} there, {now.get(key)} here"


def _learns(module: Any) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _record(module: Any) -> dict[str, Any]:
    record = {"reads": sorted(module.reads), "dtype": DTYPE, **module.made_by()}
    return json.loads(json.dumps(record))  # tuples as lists, as they come back from the manifest


def _no_latents(pixels: Tensor) -> Tensor:
    raise AssertionError("a frozen encoder reads no latents")
