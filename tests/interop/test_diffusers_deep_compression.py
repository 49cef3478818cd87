"""AutoencoderDC: recorded outputs, other configurations beside diffusers', folders read and written again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldmlab.app.cli import dispatch
from ldmlab.build import load_first_stage
from ldmlab.errors import InputError
from ldmlab.interop.diffusers import as_official, build_first_stage
from ldmlab.interop.diffusers.diffusers_first_stages import configuration, folded
from modern_cases import assert_near, networks, weights_of

CASES = networks("diffusers_dc")
BLOCKS = ["ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock"]
OTHERS: dict[str, dict[str, Any]] = {  # what the recorded networks do not have
    "half size at both ends": {"encoder_layers_per_block": [0, 1, 1, 2], "decoder_layers_per_block": [0, 1, 2, 1]},
    "half size at one end": {"encoder_layers_per_block": [0, 1, 1, 1], "upsample_block_type": "interpolate"},
    "no ends, no blocks at last": {
        **{"encoder_out_shortcut": False, "decoder_in_shortcut": False, "decoder_conv_act_fn": "silu"},
        **{"encoder_layers_per_block": [1, 1, 1, 0], "decoder_act_fns": "gelu", "downsample_block_type": "CONV"},
    },
    "batch norm everywhere, two scales": {
        **{"decoder_norm_types": "batch_norm", "encoder_qkv_multiscales": [[], [], [3, 5], [3]]},
        **{"attention_head_dim": 24, "decoder_act_fns": ["mish", "swish", "relu", "silu"]},
    },
}


def options(**changed: Any) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    shared: dict[str, Any] = {"block_types": BLOCKS, "block_out_channels": [16, 32, 64, 64]}
    shared |= {"layers_per_block": [1, 1, 1, 1], "qkv_multiscales": [[], [], [5], []]}
    found = {f"{side}_{name}": value for side in sides for name, value in shared.items()}
    return {**found, "latent_channels": 16, "attention_head_dim": 8, **changed}


def folder(path: Path, case: str) -> Path:
    path.mkdir()
    config = {**CASES[case]["config"], "_class_name": "AutoencoderDC"}
    (path / "config.json").write_text(json.dumps(config))
    state = weights_of(CASES[case], f"diffusers_{case}")[0]
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    return path


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_recorded_outputs(case: str) -> None:
    state, recorded = weights_of(CASES[case], f"diffusers_{case}")
    model: Any = as_official(CASES[case]["config"], state)
    assert sum(parameter.numel() for parameter in model.parameters()) == CASES[case]["params"]
    assert_near(model.encode(recorded["x"]).latent, recorded["z"], 1e-5)
    assert_near(model.decode(recorded["z"]).sample, recorded["reconstruction"], 1e-5)
    assert_near(model(recorded["x"])[0], recorded["reconstruction"], 1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.official_state().items())


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_configurations(name: str) -> None:
    peer = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = options(**OTHERS[name])
    theirs = peer.AutoencoderDC(**config).eval()
    for key, tensor in theirs.state_dict().items():  # no norm that changes nothing
        if tensor.ndim == 1:
            tensor.copy_(1 + 0.3 * torch.rand_like(tensor) if key.endswith(("weight", "var")) else torch.randn(1) / 9)
    ours: Any = as_official(config, theirs.state_dict())
    for size in ((32, 48), (8, 8)):  # the latter: one position at the coarsest level
        x = torch.rand(2, 3, *size) * 2 - 1
        latent = theirs.encode(x).latent
        assert_near(ours.encode(x).latent, latent, 1e-5)
        assert_near(ours.decode(latent).sample, theirs.decode(latent).sample, 1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_folder_becomes_a_first_stage_and_a_folder_again(case: str, tmp_path: Path) -> None:
    peer = pytest.importorskip("diffusers")
    assert dispatch(["import", str(folder(tmp_path / "ae", case)), str(tmp_path / "model")]) == 0
    recorded = weights_of(CASES[case], f"diffusers_{case}")[1]
    stage = load_first_stage(tmp_path / "model").module
    assert_near(stage.encode(recorded["x"]).mean, recorded["z"], 1e-5)
    export = ["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "diffusers"]
    assert dispatch(export) == 0
    again = peer.AutoencoderDC.from_pretrained(tmp_path / "out")
    assert_near(again.encode(recorded["x"]).latent, recorded["z"], 1e-5)
    assert_near(again.decode(recorded["z"]).sample, recorded["reconstruction"], 1e-5)


def test_what_has_no_counterpart_is_refused() -> None:
    node = {"_target_": "ldmlab.first_stages.deep_compression.DeepCompressionAutoencoder", **options()}
    kind, config = configuration(node, image_size=32, scaling_factor=0.5)
    assert (kind, config["scaling_factor"]) == ("AutoencoderDC", 0.5)
    with pytest.raises(InputError, match="shortcut=false: AutoencoderDC always has shortcuts"):
        configuration({**node, "shortcut": False}, image_size=32, scaling_factor=1.0)
    with pytest.raises(InputError, match="std per channel, and AutoencoderDC one number"):
        folded(node, {}, torch.ones(16), torch.zeros(16))
    with pytest.raises(InputError, match="AutoencoderDC with in_channels=4 is not supported"):
        build_first_stage(options(in_channels=4))
