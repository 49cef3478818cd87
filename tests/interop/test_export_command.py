"""`ldmlab export`: every format, nothing at OUT on any fault, and one sentence for what cannot be done."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exported_models import Spec, clip_text, describe, kl, model, spatial, unet, vq, weights

from ldmlab import model_files
from ldmlab.app import cli, evaluate
from ldmlab.app.cli import dispatch
from ldmlab.build import load
from ldmlab.disks import locked
from ldmlab.errors import InputError
from ldmlab.interop import verify
from ldmlab.interop.diffusers import diffusers_build
from ldmlab.interop.diffusers.diffusers_export import plan
from ldmlab.model_files import write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, as training and `import` leave it."""
    home = tmp_path_factory.mktemp("model")
    spec = model("unconditional", home)
    write_model_folder(home, {**spec, "weights": "averaged", "step": 7}, weights(spec))
    return home


def export(*words: object) -> int:
    return cli.dispatch(["export", "--without-card", *map(str, words)])


def refused(folder: Path, out: Path, *words: object) -> str:
    with pytest.raises(InputError) as caught:
        export(folder, out, *words)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*")), "something was left beside OUT"
    return str(caught.value)


@pytest.mark.parametrize("name", [(), ("--format", "safetensors")])
def test_our_own_format(name: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "out", *name) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.yaml", "README.md", "first_stage.safetensors", "denoiser.safetensors"}
    assert "ldmlab.load" in (tmp_path / "out" / "README.md").read_text()
    mine, theirs = (load(path, device="cpu").sample(steps=2) for path in (folder, tmp_path / "out"))
    assert torch.equal(mine, theirs)


def test_half_the_size(folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "out", "--precision", "float16") == 0
    whole, half = ((path / "denoiser.safetensors").stat().st_size for path in (folder, tmp_path / "out"))
    assert half < 0.6 * whole
    mine, theirs = (load(path, device="cpu") for path in (folder, tmp_path / "out"))
    pairs = zip(mine.diffusion.parameters(), theirs.diffusion.parameters(), strict=True)
    assert all(theirs.dtype == torch.float32 and torch.equal(mine.half().float(), theirs) for mine, theirs in pairs)
    assert "ldmlab's own format" in refused(folder, tmp_path / "x", "--precision", "float16", "--format", "diffusers")
    assert "choose one of float32, float16" in refused(folder, tmp_path / "x", "--precision", "half")


@pytest.mark.parametrize("kind", [kl, vq])
def test_a_decoder_tuned_later(kind: Any, tmp_path: Path) -> None:
    """Its first stage takes the place of the model's where both have the same latents, and no other does."""
    spec = {**model("unconditional", tmp_path), "first_stage": kind()}
    parts = weights(spec)
    write_model_folder(tmp_path / "model", spec, parts)
    first_stage = {"kind": "first_stage", "image_size": spec["image_size"], "first_stage": spec["first_stage"]}
    halves = {key: tensor.half().float() for key, tensor in parts["first_stage"].items()}
    tuned = {key: tensor + 0.1 if key.startswith("decoder") else tensor for key, tensor in halves.items()}
    other = {key: tensor * 1.1 if key.startswith("encoder") else tensor for key, tensor in tuned.items()}
    for name, state in (("tuned", tuned), ("other", other)):
        write_model_folder(tmp_path / name, first_stage, {"first_stage": state})
    assert export(tmp_path / "model", tmp_path / "out", "--first-stage", tmp_path / "tuned") == 0
    found = model_files.read_model(tmp_path / "out").parts
    assert all(torch.equal(found["first_stage"][key], tensor) for key, tensor in tuned.items())
    assert all(torch.equal(found["denoiser"][key], tensor) for key, tensor in parts["denoiser"].items())
    assert "first stage of `tuned`" in (tmp_path / "out" / "README.md").read_text()
    message = refused(tmp_path / "model", tmp_path / "x", "--first-stage", tmp_path / "other")
    assert "its latents are others" in message
    assert "stage.trained=[decoder]" in message
    message = refused(tmp_path / "tuned", tmp_path / "x", "--first-stage", tmp_path / "tuned")
    assert "is of kind first_stage, which decodes no latents" in message


def test_pixels_need_no_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model("pixels", tmp_path)
    write_model_folder(tmp_path / "model", spec, weights(spec))
    monkeypatch.chdir(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "out", "--first-stage", ".") == 0
    assert "first stage of `model`" in (tmp_path / "out" / "README.md").read_text()


def test_half_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    spec = model("unconditional", tmp_path)
    parts = weights(spec)
    name = next(iter(parts["denoiser"]))
    parts["denoiser"][name].view(-1)[0] = 7e4
    write_model_folder(tmp_path / "large", {**spec, "weights": "averaged", "step": 7}, parts)
    assert f"above 65504 ({name})" in refused(tmp_path / "large", tmp_path / "x", "--precision", "float16")


def test_a_shipped_model_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_files, "MODELS", tmp_path / "models")
    assert cli.dispatch(["models"]) == 0
    assert "nothing" in capsys.readouterr().out
    export(folder, tmp_path / "models" / "tiny")
    capsys.readouterr()
    assert cli.dispatch(["models"]) == 0
    assert re.search(r"tiny +latent diffusion, 32 px, \d+ MiB", capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load("tiny", device="cpu").sample(steps=2), load(folder, device="cpu").sample(steps=2))
    assert evaluate.run_folder(Path("tiny")) == tmp_path / "models" / "tiny"
    (tmp_path / "tiny").mkdir()  # a folder of one's own comes first
    with pytest.raises(InputError, match=r"tiny has no model\.yaml"):
        load("tiny", device="cpu")
    with pytest.raises(InputError, match="`ldmlab models` lists"):
        load("nosuch", device="cpu")


def test_compvis(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder, tmp_path / "out", "--format", "compvis") == 0
    content = torch.load(tmp_path / "out" / "model.ckpt", weights_only=True)
    assert "model.diffusion_model.input_blocks.0.0.weight" in content["state_dict"]
    assert content["global_step"] == 7
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["model"]["target"].startswith("ldm.")
    assert "denoiser: largest difference" in capsys.readouterr().out


def test_diffusers(folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "out", "--format", "diffusers") == 0
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert "LDMPipeline.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_back_through_import(form: str, folder: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    export(folder, out, "--format", form)
    source = [out] if form == "diffusers" else [out / "model.ckpt", "--config", out / "config.yaml"]
    assert cli.dispatch(["import", *map(str, [source[0], back, *source[1:]])]) == 0
    mine, theirs = (load(path, device="cpu").sample(steps=2) for path in (folder, back))
    assert torch.equal(mine, theirs)


def first_stage(node: Spec, tmp_path: Path) -> Path:
    """A first stage alone, as a model folder."""
    parts = {"first_stage": weights(describe(node, unet(node["latent_channels"])))["first_stage"]}
    write_model_folder(tmp_path / "stage", {"kind": "first_stage", "image_size": 32, "first_stage": node}, parts)
    return tmp_path / "stage"


@pytest.mark.parametrize("form", ["compvis", "diffusers"])
@pytest.mark.parametrize("node", [kl(3), vq(2), vq(2, codebook_decay=0.99)], ids=["kl", "vq", "vq-means"])
def test_a_first_stage_alone(form: str, node: Spec, tmp_path: Path) -> None:
    assert export(first_stage(node, tmp_path), tmp_path / "out", "--format", form) == 0
    assert (tmp_path / "out" / {"compvis": "model.ckpt", "diffusers": "config.json"}[form]).is_file()


@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_cosine_codes_are_ours_alone(form: str, tmp_path: Path) -> None:
    message = refused(first_stage(vq(2, cosine=True), tmp_path), tmp_path / "out", "--format", form)
    assert "cosine=true exists only in ldmlab" in message


def test_a_difference_writes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = diffusers_build._filled

    def spoiled(module: Any, state: Any) -> Any:
        return fill(module, {key: t * 1.01 if key.startswith("conv_out") else t for key, t in state.items()})

    monkeypatch.setattr(diffusers_build, "_filled", spoiled)
    message = refused(folder, tmp_path / "out", "--format", "diffusers")
    assert "the denoiser differs by" in message
    assert "nothing was written" in message


def test_without_diffusers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused(folder, tmp_path / "out", "--format", "diffusers")


def test_unknown_format(folder: Path, tmp_path: Path) -> None:
    message = refused(folder, tmp_path / "out", "--format", "onnx")
    assert "--format=onnx is unknown; choose one of ldmlab, safetensors, compvis, diffusers" in message


def test_out_is_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        export(folder, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


WRONG = [
    (describe(kl(3), unet(4, heads=2, attention_downsampling=[1, 2])), "heads of one width"),
    (describe(kl(3), unet(4, head_channels=16, channel_mult=[2, 2])), "channel_mult"),
    (describe(kl(3, bottleneck_channels=8), unet(4, head_channels=16)), "bottleneck_channels=8"),
    (describe(vq(), unet(3, head_channels=16), std=[1.0, 2.0, 3.0]), "std per channel"),
    (
        describe(
            kl(3),
            unet(4, context_width=32, residual_resampling=True, attention_downsampling=[1]),
            {"text": clip_text()},
        ),
        "residual_resampling=True with cross-attention",
    ),
    (describe(kl(3), unet(4, context_width=32), {"text": clip_text(layer="pooled")}), "layer=pooled"),
]


@pytest.mark.parametrize(("spec", "why"), WRONG, ids=[why for _, why in WRONG])
def test_what_diffusers_cannot_hold(spec: Spec, why: str, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", {**spec, "weights": "raw", "step": 1}, weights(spec))
    message = refused(tmp_path / "model", tmp_path / "out", "--format", "diffusers")
    assert why in message
    assert "--format" in message


def test_why_there_is_no_pipeline(tmp_path: Path) -> None:
    text = model("ldm_text", tmp_path)["conditioners"]
    assert "not f=4" in plan(describe(kl(3), unet(4, context_width=32), text)).why
    low = {"low": spatial("low_resolution", "LowResolution")}
    assert "3 channels" in plan(describe(kl(3), unet(4, 3), low)).why
    assert "takes ClassEmbedder" in plan(model("class_tokens", tmp_path)).why


def test_numbers_that_are_none_are_a_difference() -> None:
    bad = torch.tensor([float("nan")])
    with pytest.raises(InputError, match="differs by nan"):
        verify.check_close("network", bad, bad)


def test_an_export_beside_another_into_the_same_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".out.lock", "busy"),
        pytest.raises(InputError, match=r"out=\S+out is being written by another command"),
    ):
        dispatch(["export", "--without-card", str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert dispatch(["export", "--without-card", str(folder), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []


@pytest.mark.parametrize("out", ["a file/out", "a file", "x" * 300, "full"])
def test_places_that_no_folder_can_be_made_at(folder: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "a file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("text")
    with pytest.raises(InputError, match="out="):
        dispatch(["export", "--without-card", str(folder), str(tmp_path / out)])
    assert (tmp_path / "full" / "kept").read_text() == "text"
