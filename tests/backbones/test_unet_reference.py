"""The U-Net gives the official program's outputs and has the released models' tensors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conf_files import conf_node
from drawn_weights import TOLERANCE, drawn
from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning
from ldmlab.interop.compvis import compvis_networks as compvis
from ldmlab.interop.compvis.compvis_networks import unet_part
from ldmlab.interop.renaming import Part

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests/assets/reference/compvis"
CASES = json.loads((ASSETS / "unets.json").read_text())
LAYOUTS = json.loads((ASSETS / "unet_layouts.json").read_text())
PREFIX = "model.diffusion_model."


def part_of(params: dict[str, Any]) -> Part:
    return unet_part({"_target_": "ldmlab.backbones.unet.UNet", **compvis.unet_arguments(params)})


def official(name: str) -> tuple[Any, dict[str, Tensor], Part]:
    """The case's network, its official tensors and the names."""
    state, part = drawn(CASES[name], PREFIX), part_of(CASES[name]["config"])
    return part.filled(state).eval(), state, part


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs(name: str) -> None:
    unet, _, _ = official(name)
    case = load_file(ASSETS / f"{name}.safetensors")
    conditioning = Conditioning(tokens=case.get("context"))
    for given in (conditioning, unet.prepare(conditioning)):
        torch.testing.assert_close(unet(case["x"], case["t"], given), case["out"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_names_there_and_back(name: str) -> None:
    unet, state, part = official(name)
    back = part.to_foreign(unet.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert sum(p.numel() for p in unet.parameters()) == CASES[name]["params"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_released_layouts(name: str) -> None:
    layout = LAYOUTS[name]
    part = part_of(layout["config"])
    assert sum(t.numel() for t in part.module.state_dict().values()) == layout["params"]
    mine = part.expected
    text = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(mine.items()))
    assert len(mine) == layout["tensors"]
    assert hashlib.sha256(text.encode()).hexdigest() == layout["sha256"]


SIZES = [  # conf/backbone file, in and out channels, width of the tokens, millions of parameters (paper or computed)
    ("celebahq_f4", 3, 3, None, 274.06),
    ("churches_f8", 4, 4, None, 294.97),
    ("imagenet_f8", 4, 4, 512, 394.98),
    ("imagenet_f4", 3, 3, 512, 400.92),
    ("text_f8", 4, 4, 1280, 872.30),
    ("text_f8", 4, 4, 768, 859.52),
    ("text_sd2", 4, 4, 1024, 865.91),
    ("text_f4", 3, 3, 640, 403.62),
    ("layout_f4", 3, 3, 512, 246.28),
    ("semantic_f4", 6, 3, None, 215.23),
    ("superres_f4", 6, 3, None, 113.62),
    ("inpainting_f4", 7, 3, None, 387.25),
    *[(f"sweep_imagenet_f{f}", c, c, 512, m) for f, c, m in (
        (1, 3, 396.84), (2, 2, 390.89), (4, 3, 400.92), (8, 4, 394.98), (16, 8, 395.00), (32, 32, 395.11),
    )],
    *[(f"sweep_celebahq_f{f}", c, c, None, m) for f, c, m in (
        (1, 3, 270.46), (2, 2, 264.51), (8, 4, 257.73), (16, 8, 257.75), (32, 32, 257.86),
    )],
]  # fmt: skip


@pytest.mark.parametrize(("name", "channels_in", "channels_out", "width", "millions"), SIZES)
def test_sizes_of_the_papers_networks(
    name: str, channels_in: int, channels_out: int, width: int | None, millions: float
) -> None:
    node: dict[str, Any] = conf_node("backbone", f"unet_{name}")
    assert node.pop("_target_") == "ldmlab.backbones.unet.UNet"
    with torch.device("meta"):
        unet = UNet(channels_in, channels_out, context_width=width, **node)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 2) == millions
