"""`ldmlab import` of a diffusers folder: a module of its own becomes a model folder of ours."""

import json
from pathlib import Path

import pytest
import torch
from official_files import ASSETS
from safetensors.torch import load_file, save_file

from drawn_weights import TOLERANCE, drawn
from ldmlab.app.cli import dispatch
from ldmlab.build import load_first_stage
from ldmlab.errors import InputError


def folder(path: Path) -> Path:
    case = json.loads((ASSETS / "diffusers/index.json").read_text())["autoencoder_kl"]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(case["config"] | {"_class_name": case["kind"]}))
    save_file(drawn(case), path / "diffusion_pytorch_model.safetensors")
    return path


def test_a_first_stage(tmp_path: Path) -> None:
    assert dispatch(["import", str(folder(tmp_path / "vae")), str(tmp_path / "model")]) == 0
    stage = load_first_stage(tmp_path / "model").module
    recorded = load_file(ASSETS / "diffusers/autoencoder_kl.safetensors")
    with torch.no_grad():
        posterior = stage.encode(recorded["x"])
        made = {"moments": posterior.moments(), "out": stage.decode(posterior.mean)}
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, recorded[name], atol=TOLERANCE, rtol=0)


def test_options_of_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--prediction=v"):
        dispatch(["import", str(folder(tmp_path / "vae")), str(tmp_path / "model"), "--prediction", "v"])
    assert not (tmp_path / "model").exists()
