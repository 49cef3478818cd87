"""Our first stages give the official programs' outputs and have the released models' sizes and key names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conf_files import conf_node
from drawn_weights import TOLERANCE, drawn
from ldmlab.first_stages.kl import kl_to_standard_normal
from ldmlab.interop.compvis import compvis_networks as compvis
from ldmlab.interop.compvis.compvis_networks import first_stage_part

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests/assets/reference/compvis"
CASES = json.loads((ASSETS / "autoencoders.json").read_text())
RELEASED = json.loads((ASSETS / "first_stage_layouts.json").read_text())
PREFIX = "first_stage_model."


def reference(name: str) -> tuple[Any, dict[str, Tensor]]:
    case = CASES[name]
    target = {"autoencoder_kl": "AutoencoderKL", "autoencoder_vq": "VQModel"}[name]
    arguments = compvis.first_stage_arguments(target, case["config"])
    stage = first_stage_part(arguments).filled(drawn(case, PREFIX))
    assert type(stage).__name__ == {"AutoencoderKL": "KLAutoencoder"}.get(target, target)
    assert sum(p.numel() for p in stage.parameters()) == case["params"]
    return stage.eval(), load_file(ASSETS / f"{name}.safetensors")


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_kl_outputs() -> None:
    stage, expected = reference("autoencoder_kl")
    posterior = stage.encode(expected["x"])
    close(posterior.mean, expected["mean"])
    close(posterior.logvar, expected["logvar"])
    torch.testing.assert_close(kl_to_standard_normal(posterior), expected["kl"], atol=0, rtol=1e-5)
    close(stage.decode(posterior.mean), expected["reconstruction"])
    given = stage.reconstruct(expected["x"], torch.zeros_like(posterior.mean))
    close(given.images, expected["reconstruction"])
    torch.testing.assert_close(given.penalties["kl"], expected["kl"].mean())


@torch.no_grad()
def test_vq_outputs() -> None:
    stage, expected = reference("autoencoder_vq")
    latents = stage.encode(expected["x"])
    close(latents.mean, expected["z"])
    assert latents.logvar is None
    quantised = stage.quantiser(latents.mean)
    assert torch.equal(quantised.codes, expected["indices"])
    close(quantised.latents, expected["quantized"])
    close(stage.decode(latents.mean), expected["reconstruction"])
    given = stage.reconstruct(expected["x"], torch.zeros(()))
    close(given.images, expected["reconstruction"])
    close(given.penalties["codebook"][None], expected["codebook_loss"])


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_and_names(name: str) -> None:
    released = RELEASED[name]
    options = conf_node("first_stage", name)
    official = compvis.first_stage_arguments(released["target"], released["config"])
    assert options | {"bottleneck_channels": official["bottleneck_channels"]} == official | {
        key: options[key] for key in options.keys() - official.keys()
    }
    part = first_stage_part(options)
    assert sum(p.numel() for p in part.module.parameters()) == released["params"]
    keys = {key.removeprefix(PREFIX): shape for key, shape in released["keys"].items()}
    exported = part.expected
    assert {k: list(v.shape) for k, v in exported.items()} == {k: s for k, s in keys.items() if k in exported}
    assert all(key.startswith("loss.") for key in keys.keys() - exported.keys())
