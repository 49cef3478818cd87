"""DiT, SiT, LightningDiT and EDM2 files with a first stage become models that give the official outputs."""

import json
import os
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ldmlab
from ldmlab.app import cli
from ldmlab.contracts import Conditioning
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.model_files import write_model_folder
from modern_cases import networks, weights_of
from refusals import refusal

CASES = networks("transformers") | networks("edm2") | networks("edm")
STAGE = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}


def weights(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The case's state dict, and its recorded tensors."""
    return weights_of(CASES[name], name)


def first_stage(folder: Path, channels: int) -> Path:
    """A model folder with a small first stage."""
    torch.manual_seed(0)
    node = {"_target_": "ldmlab.first_stages.kl.KLAutoencoder", **STAGE, "latent_channels": channels}
    stage = KLAutoencoder(**STAGE, latent_channels=channels)  # type: ignore[arg-type]
    spec = {"kind": "first_stage", "image_size": 32, "first_stage": node}
    write_model_folder(folder, spec, {"first_stage": stage.state_dict()})
    return folder


def imported(tmp_path: Path, name: str, *more: str) -> Any:
    """A file as each program writes it, imported."""
    case, (state, _) = CASES[name], weights(name)
    channels = case["config"].get("in_channels", case["config"].get("img_channels"))
    source = tmp_path / ("model.safetensors" if case["kind"] == "edm2" else "model.pt")
    if case["kind"] == "edm2":
        save_file(state, source)
    elif case["kind"] == "dit":
        torch.save(state, source)
    else:
        other = {f"module.{key}": torch.zeros_like(tensor) for key, tensor in state.items()}
        torch.save({"ema": state, "model": other, "args": Namespace(seed=1)}, source)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(case["config"]))
    words = ["--format", case["kind"], "--config", str(config), "--first-stage"]
    words += [str(first_stage(tmp_path / "stage", channels)), *more]
    assert cli.dispatch(["import", str(source), str(tmp_path / "out"), *words]) == 0
    return ldmlab.load(tmp_path / "out")


NAMES = ["dit_p2_sigma", "dit_p1_nodrop", "sit_p2_sigma", "ldit_released", "repa_sit_two_encoders", "edm2_class"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_model_gives_the_recorded_output(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, recorded = weights(name)
    case, more = CASES[name], []
    if case["kind"] == "lightningdit":
        channels = case["config"]["in_channels"]
        numbers = torch.arange(1, channels + 1, dtype=torch.float32).reshape(1, -1, 1, 1)
        torch.save({"mean": numbers, "std": 2 * numbers}, tmp_path / "stats.pt")
        more = ["--statistics", str(tmp_path / "stats.pt")]
    model = imported(tmp_path, name, *more)
    left = {"repa": "projectors.* (12 tensors)", "edm2": "logvar_* (3 tensors)"}.get(case["kind"])
    note = f"note: {left} serve training alone and were left out" if left else "note:"
    assert (note in capsys.readouterr().out) == (left is not None)
    diffusion = model.diffusion
    if case["kind"] == "edm2":
        sigma, data = recorded["sigma"], case["config"]["sigma_data"]
        x, t = recorded["x"] / (sigma**2 + data**2).sqrt()[:, None, None, None], sigma.log() / 4
        y, out = recorded["labels"].argmax(1), recorded["raw"]
    else:
        x, t, y, out = (recorded[key] for key in ("x", "t", "y", "out"))
    known = y < diffusion.conditioners["class_label"].classes
    vector = diffusion.conditioners["class_label"]({"class_id": y.where(known, 0)}, diffusion.encode)
    ours = diffusion.backbone(x, t, Conditioning(vector=vector))[known]
    assert float((ours - out[known]).abs().max() / out.abs().max().clamp_min(1)) < 1e-5
    scale = diffusion.latent_scale
    if more:
        assert scale.std.flatten().tolist() == [2.0 * i for i in range(1, len(scale.std.flatten()) + 1)]
    images = model.sample(class_id=[1], steps=2, seed=0)
    assert images.shape == (1, *[case["config"].get("input_size", case["config"].get("img_resolution")) * 2] * 2, 3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    state, _ = weights("dit_p4_plain")
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"ema": 1}))
    (tmp_path / "torn.pkl").write_bytes(pickle.dumps({"ema": 1})[:-4])
    state_of_edm, _ = weights("edm_adm")
    torch.save(state_of_edm, tmp_path / "edm.pt")
    stage = str(first_stage(tmp_path / "stage", 4))

    def refused(source: str, *words: str) -> str:
        sentence = refusal(lambda: cli.dispatch(["import", str(tmp_path / source), str(tmp_path / "out"), *words]))
        assert not (tmp_path / "out").exists()
        return sentence

    assert "give its first stage by --first-stage DIR" in refused("model.pt", "--format", "dit")
    assert "--first-stage and --statistics are for denoisers" in refused("model.pt", "--first-stage", stage)
    edm2 = ["--format", "edm2", "--first-stage", stage]
    assert "holds no averaged network (ema)" in refused("edm2.pkl", *edm2)
    assert "cannot be read as a network's pickle (it is a pickle)" in refused("torn.pkl", *edm2)
    assert "holds no raw weights" in refused("edm2.pkl", *edm2, "--weights", "raw")
    assert "give its first stage by --first-stage DIR" in refused("edm.pt", "--format", "edm")  # of 4 channels
    assert "give num_heads in a --config file" in refused("model.pt", "--format", "dit", "--first-stage", stage)
    assert "so it is no network of this --format" in refused("model.pt", "--format", "edm2", "--first-stage", stage)
    assert "format=pixart is unknown" in refused("model.pt", "--format", "pixart", "--first-stage", stage)
    other = str(first_stage(tmp_path / "other", 3))
    (tmp_path / "heads.yaml").write_text("num_heads: 4\n")
    heads = ["--format", "dit", "--config", str(tmp_path / "heads.yaml"), "--first-stage"]
    assert "has 3 latent channels" in refused("model.pt", *heads, other)
    assert "--format dit decides that" in refused("model.pt", *heads, stage, "--prediction", "v")
    assert "has its own scale of latents" in refused("model.pt", *heads, stage, "--statistics", str(tmp_path))
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no tensors by name" in refused("list.pt", *heads, stage)
    os.mkfifo(tmp_path / "pipe.pt")
    assert "cannot be read as plain tensors (not a regular file)" in refused("pipe.pt", *heads, stage)
