"""Networks read from diffusers' files give diffusers' outputs, also after a way there and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drawn_weights import TOLERANCE, drawn
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop import diffusers

ASSETS = Path(__file__).parents[1] / "assets/reference/diffusers"
CASES = json.loads((ASSETS / "index.json").read_text())
UNETS = [name for name, case in CASES.items() if case["kind"] == "UNet2DConditionModel"]


def close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    case, state = load_file(ASSETS / f"{name}.safetensors"), drawn(CASES[name])
    config = CASES[name]["config"]
    unet = diffusers.build_unet(config, state)
    out = unet(case["x"], case["t"], Conditioning(tokens=case["context"]))
    close(out, case["out"])
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    assert sum(p.numel() for p in unet.parameters()) == CASES[name]["params"]


def test_autoencoder() -> None:
    case, config = load_file(ASSETS / "autoencoder_kl.safetensors"), CASES["autoencoder_kl"]["config"]
    stage = diffusers.build_first_stage(config, drawn(CASES["autoencoder_kl"]))
    posterior = stage.encode(case["x"])  # type: ignore[operator]
    close(posterior.moments(), case["moments"])
    out = stage.decode(posterior.mean)  # type: ignore[operator]
    close(out, case["out"])
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in stage.parameters())


@pytest.mark.parametrize("name", UNETS)
def test_faulty_weights_are_listed(name: str) -> None:
    state = drawn(CASES[name])
    state.pop("conv_in.bias")
    state["more.weight"] = state["conv_out.weight"]
    state["conv_out.bias"] = torch.zeros(5)
    message = r"1 missing \(conv_in.bias\).*1 unexpected \(more.weight\).*conv_out.bias \[5\]"
    with pytest.raises(InputError, match=message):
        diffusers.build_unet(CASES[name]["config"], state)
