"""DiT's pipeline in diffusers and our DiT: the same networks and images, read and written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import HOME, Spec, describe, kl, weights
from safetensors.torch import load_file, save_file

import ldmlab
from ldmlab.app.cli import dispatch
from ldmlab.contracts import Conditioning
from ldmlab.interop import diffusers
from ldmlab.model_files import write_model_folder
from modern_cases import assert_near
from refusals import refusal

peer = pytest.importorskip("diffusers")
NET = {
    **{"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2},
    **{"sample_size": 8, "num_embeds_ada_norm": 1000, "norm_eps": 1e-5},
}
VAE = {
    **{"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4},
    **{"up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "sample_size": 16},
}
LABELS = {"0": "tench, Tinca tinca", "1": "goldfish"}


def randomised(module: Any, seed: int = 0) -> Any:
    """No layer is zero, and the embedders of all blocks are equal, as in published weights."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for block in module.transformer_blocks[1:] if isinstance(module, peer.DiTTransformer2DModel) else []:
        block.norm1.emb.load_state_dict(module.transformer_blocks[0].norm1.emb.state_dict())
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dit") / "pipeline"
    made = peer.DiTPipeline(
        transformer=randomised(peer.DiTTransformer2DModel(**NET)),
        vae=randomised(peer.AutoencoderKL(**VAE)),
        scheduler=peer.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        id2label={int(number): names for number, names in LABELS.items()},
    )
    made.save_pretrained(home)
    return home


@torch.no_grad()
def test_a_pipeline_becomes_a_model_and_a_pipeline_again(folder: Path, tmp_path: Path) -> None:
    assert dispatch(["import", str(folder), str(tmp_path / "model")]) == 0
    model = ldmlab.load(tmp_path / "model", device="cpu")
    theirs = peer.DiTPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([4, 1000])
    vector = model.diffusion.conditioners["class_label"].embedding(y)  # type: ignore[operator, union-attr]
    ours = model.diffusion.backbone(x, t, Conditioning(vector=vector))
    assert_near(ours, theirs.transformer(x, t, class_labels=y).sample, 1e-5)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = theirs(
        [1, 3], guidance_scale=3.0, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    model.diffusion.start = lambda *_: noise  # type: ignore[method-assign]
    found = model.sample(class_id=[1, 3], steps=5, guidance_scale=3.0)
    assert (found.double() / 255 - torch.from_numpy(images)).abs().max() < 1 / 255
    assert model.image_size == (16, 16)
    assert (
        dispatch(
            ["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "again"), "--format", "diffusers"]
        )
        == 0
    )
    again = peer.DiTPipeline.from_pretrained(tmp_path / "again")
    assert again.labels == theirs.labels
    state = again.transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.transformer.state_dict().items())


@pytest.mark.parametrize("kind", ["sharded", "bf16", "fp16", "old"])
def test_layouts_of_files(kind: str, folder: Path, tmp_path: Path) -> None:
    """Parts with an index, half precision, and the class name of the published folders."""
    shutil.copytree(folder, tmp_path / "pipeline")
    home, name = tmp_path / "pipeline" / "transformer", "diffusion_pytorch_model"
    state = load_file(home / f"{name}.safetensors")
    if kind == "old":
        config = json.loads((home / "config.json").read_text())
        extra = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False}
        (home / "config.json").write_text(json.dumps(config | extra | {"_class_name": "Transformer2DModel"}))
    elif kind == "sharded":
        (home / f"{name}.safetensors").unlink()
        peer.DiTTransformer2DModel.from_pretrained(folder / "transformer").save_pretrained(home, max_shard_size="100KB")
        assert (home / f"{name}.safetensors.index.json").is_file()
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
        (home / f"{name}.safetensors").unlink()
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
        save_file(state, home / f"{name}.{kind}.safetensors")
    spec, parts = diffusers.read_folder(tmp_path / "pipeline")
    assert spec["backbone"]["frequency_shift"] == 1
    assert spec["guidance_trained"] is True
    assert torch.equal(parts["denoiser"]["out.weight"], state["proj_out_2.weight"].float())


def test_what_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "pipeline"
    shutil.copytree(folder, home)
    path = home / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    words = ["import", str(home), str(tmp_path / "out")]
    save_file(state | {key: state[key] + 1}, path)
    assert "ldmlab's DiT has one embedder for all" in refusal(lambda: dispatch(words))
    save_file(state | {"pos_embed.pos_embed": torch.ones(1, 16, 32)}, path)
    assert "holds other positions" in refusal(lambda: dispatch(words))
    save_file({name: tensor for name, tensor in state.items() if name != key}, path)
    assert "missing" in refusal(lambda: dispatch(words))
    assert not (tmp_path / "out").exists()


def dit(**more: Any) -> Spec:
    return {
        "_target_": f"{HOME}backbones.dit.DiT",
        **{"in_channels": 4, "out_channels": 4, "width": 32, "depth": 1, "heads": 2, "vector_width": 32},
        **{"frequency_shift": 1, **more},
    }


def labels(**more: Any) -> Spec:
    options = {"classes": 5, "width": 32, "slot": "vector", **more}
    return {"_target_": f"{HOME}conditioners.class_label.ClassEmbedder", **options}


def exported(spec: Spec, tmp_path: Path) -> list[str]:
    write_model_folder(tmp_path / "model", {**spec, "weights": "raw", "step": 1}, weights(spec))
    return ["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "diffusers"]


FLOW = {"prediction": "VelocityPrediction", "schedule": {"_target_": f"{HOME}diffusion.flow_match.FlowMatchPath"}}


@pytest.mark.parametrize(("classes", "options", "pipeline"), [(1000, {}, True), (5, {}, False), (1000, FLOW, False)])
def test_a_model_of_ours(classes: int, options: dict[str, Any], pipeline: bool, tmp_path: Path) -> None:
    """With the norm before the MLPs at our 1e-6, which diffusers' class can hold too."""
    spec = describe(kl(2), dit(), {"label": labels(classes=classes)}, image_size=16, **options)
    assert dispatch(exported(spec, tmp_path)) == 0
    assert (tmp_path / "out" / "model_index.json").is_file() == pipeline
    found = peer.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert found.config.norm_eps == 1e-6
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == ("FlowMatchEulerDiscreteScheduler" if options else "DDIMScheduler")


@pytest.mark.parametrize(("backbone", "conditioners", "why"), [
    (dit(frequency_shift=0), {"label": labels()}, "backbone.frequency_shift=0: DiTTransformer2DModel has"),
    (dit(swiglu=True), {"label": labels()}, "backbone.swiglu=True: DiTTransformer2DModel has"),
    (dit(), {"label": labels(null_row=False, drop=0.0)}, "null_row=false: DiTTransformer2DModel requires"),
    (dit(vector_width=None), {}, "requires a class_label conditioner alone"),
])  # fmt: skip
def test_what_has_no_class_is_refused(backbone: Spec, conditioners: dict[str, Spec], why: str, tmp_path: Path) -> None:
    words = exported(describe(kl(2), backbone, conditioners, image_size=16), tmp_path)
    assert why in refusal(lambda: dispatch(words))
    assert not (tmp_path / "out").exists()
