"""Recorded runs of the modern official programs (tests/assets/reference/modern) and the networks that stood in."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from drawn_weights import drawn

ASSETS = Path(__file__).parent / "assets" / "reference" / "modern"


def recorded(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of PROGRAM/CASE."""
    return load_file(ASSETS / f"{case}.safetensors"), json.loads((ASSETS / f"{case}.json").read_text())["cases"]


def networks(file: str) -> dict[str, dict[str, Any]]:
    """The recorded networks of FILE.json by name: configuration, names of tensors, and more."""
    return json.loads((ASSETS / f"{file}.json").read_text())


def weights_of(case: dict[str, Any], file: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict of a recorded network, and the recorded tensors of FILE.safetensors."""
    tensors = load_file(ASSETS / f"{file}.safetensors")
    return drawn(case) | {key: tensors[f"kept.{key}"] for key in case["kept"]}, tensors


def drawn_noise(name: str, *shape: int) -> Tensor:
    """The standard normal numbers that a recorded run drew under that name."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32))


def field(x: Tensor, s: Tensor | float, c: Tensor | float | None = None) -> Tensor:
    """The smooth stand-in for a network."""
    s, c = (v.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) if isinstance(v, Tensor) else v for v in (s, c))
    out = 0.8 * torch.tanh(x * (0.5 + s)) + 0.1 * (torch.sin(10 * s) if isinstance(s, Tensor) else math.sin(10 * s))
    return out if c is None else out + 0.2 * c * torch.cos(x)


def preconditioned(x: Tensor, sigma: Tensor, c: Tensor | None = None) -> Tensor:
    """D(x, sigma), EDM's stand-in for a denoiser, sigma_data 0.5."""
    sd = 0.5
    s = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    q = s**2 + sd**2
    inner = field(x / q.sqrt(), sigma.log() / 4, c)
    return sd**2 / q * x + s * sd / q.sqrt() * inner


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 5e-5) -> None:
    """max |a - b| <= tolerance max(1, max |b|): the tolerance that float32 programs are compared with."""
    assert found.shape == expected.shape
    off = float((found.detach().double() - expected.detach().double()).abs().max())
    assert off <= tolerance * max(1.0, float(expected.detach().abs().max())), off
