"""AutoencoderKL of SD3 and Flux: 16 channels, no convolutions around the latent, a shift; read, run, written again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drawn_weights import drawn
from ldmlab.app.cli import dispatch
from ldmlab.build import load_first_stage
from ldmlab.errors import InputError
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.interop.diffusers import as_official
from modern_cases import assert_near

ASSETS = Path(__file__).parents[1] / "assets/reference/modern"
CASE: dict[str, Any] = json.loads((ASSETS / "diffusers_kl.json").read_text())
RECORDED = load_file(ASSETS / "diffusers_kl_16ch.safetensors")
FACTOR, SHIFT = CASE["config"]["scaling_factor"], CASE["config"]["shift_factor"]


def folder(path: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CASE["config"] | {"_class_name": "AutoencoderKL"} | changed))
    variant = {torch.float32: "", torch.bfloat16: ".bf16", torch.float16: ".fp16"}[dtype]
    state = {name: tensor.to(dtype) for name, tensor in drawn(CASE).items()}
    save_file(state, path / f"diffusion_pytorch_model{variant}.safetensors")
    return path


@pytest.mark.slow
@torch.no_grad()
def test_the_recorded_outputs() -> None:
    model: Any = as_official(CASE["config"], drawn(CASE))
    assert sum(parameter.numel() for parameter in model.parameters()) == CASE["params"]
    spread = model.encode(RECORDED["x"]).latent_dist
    assert_near(spread.mean, RECORDED["mean"], 1e-5)
    assert_near(spread.logvar, RECORDED["logvar"], 1e-5)
    assert_near((spread.mode() - SHIFT) * FACTOR, RECORDED["latents"], 1e-5)
    assert_near(model.decode(RECORDED["latents"] / FACTOR + SHIFT).sample, RECORDED["reconstruction"], 1e-5)
    assert_near(model(RECORDED["x"])[0], RECORDED["reconstruction"], 1e-5)
    assert all(torch.equal(tensor, drawn(CASE)[name]) for name, tensor in model.official_state().items())
    drawn_twice = [spread.sample(torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn_twice)
    assert_near(spread.std.square(), spread.var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_folder_becomes_a_first_stage_and_a_folder_again(tmp_path: Path, dtype: torch.dtype) -> None:
    peer = pytest.importorskip("diffusers")
    assert dispatch(["import", str(folder(tmp_path / "vae", dtype)), str(tmp_path / "model")]) == 0
    stage = load_first_stage(tmp_path / "model").module
    assert not [name for name, _ in stage.named_parameters() if name.startswith(("to_moments", "from_latent"))]
    if dtype == torch.float32:
        assert_near(stage.encode(RECORDED["x"]).mean, RECORDED["mean"], 1e-5)
    assert (
        dispatch(["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "diffusers"])
        == 0
    )
    again = peer.AutoencoderKL.from_pretrained(tmp_path / "out")
    assert not again.config.use_quant_conv
    assert not again.config.use_post_quant_conv
    assert_near(again.encode(RECORDED["x"]).latent_dist.mean, stage.encode(RECORDED["x"]).mean, 1e-5)


@torch.no_grad()
def test_a_convolution_on_one_side_alone() -> None:
    peer = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = CASE["config"] | {"use_post_quant_conv": True}
    theirs = peer.AutoencoderKL(**config).eval()
    ours: Any = as_official(config, theirs.state_dict())
    x = RECORDED["x"]
    assert_near(ours.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean, 1e-5)
    assert_near(ours(x).sample, theirs(x).sample, 1e-5)


def test_what_has_no_counterpart_is_refused(tmp_path: Path) -> None:
    assert dispatch(["import", str(folder(tmp_path / "vae")), str(tmp_path / "model")]) == 0
    with pytest.raises(InputError, match=r"'latent_projection': False.* has no official counterpart"):
        dispatch(["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "compvis"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="bottleneck_channels=8 needs a projection to latent_channels=16"):
        KLAutoencoder(channel_mult=[1], latent_channels=16, bottleneck_channels=8, latent_projection=False)
    with pytest.raises(InputError, match="1 unexpected"):
        as_official(CASE["config"], drawn(CASE) | {"more.weight": torch.zeros(1)})


def test_the_log_variance_begins_where_the_option_says() -> None:
    biases = []
    for start in (0.0, -6.0):
        torch.manual_seed(0)
        stage = KLAutoencoder(
            channel_mult=[1], channels=32, latent_channels=16, latent_projection=False, initial_logvar=start
        )
        biases.append(stage.encoder.output.bias.detach())
    assert_near(biases[1] - biases[0], torch.tensor([0.0] * 16 + [-6.0] * 16), 1e-6)
