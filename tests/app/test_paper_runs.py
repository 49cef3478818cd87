"""Every experiment of the paper trains two steps at reduced width on drawn scenes, and its model is used once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paper_experiments import PAPER, composed, first_stage_experiment, of_stage

import ldmlab
from ldmlab.app.wiring import train
from ldmlab.build import load_classifier, load_first_stage
from ldmlab.instantiate import instantiate
from ldmlab.model_files import write_model_folder
from scenes import CLASSES, Scene, write_scenes

FAST = {  # one of a family; the others are slow together
    "paper/first_stage/vq_f4_noattn",
    "paper/compression/imagenet_ldm_1",
    "paper/unconditional/lsun_churches",
    "paper/class/imagenet_ldm_8",
    "paper/class/imagenet_ldm_8_g",
    "paper/text/ldm_kl_8_g",
    "paper/layout/coco_scratch",
    "paper/semantic/landscapes_256",
    "paper/super_resolution/pixel",
    "paper/inpainting/big",
}
SWEEP = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in PAPER]
SIZES = {"ldm_16": 64, "ldm_32": 128, "f16": 64, "f32": 64}  # px; latents that the U-Net can halve twice
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "objects", *"0123456789"]
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scenes and a vocabulary; first stages are added as they are needed."""
    folder = tmp_path_factory.mktemp("paper")
    write_scenes(folder / "train", 6, size=(72, 64))
    write_scenes(folder / "val", 4, size=(72, 64))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return folder


def narrow_first_stage(node: dict[str, Any]) -> dict[str, Any]:
    """The same levels, channels of the latent and attention, in few channels."""
    codes = {"codebook_size": 16} if "codebook_size" in node else {}
    return {**node, "channels": 8, "norm_groups": 4, "num_res_blocks": 1, **codes}


def drawn_first_stage(root: Path, experiment: str) -> Path:
    """A model folder with the experiment's first stage, of drawn weights."""
    folder = root / experiment.replace("/", "-")
    if not folder.exists():
        node = narrow_first_stage(composed(experiment)["first_stage"])
        torch.manual_seed(0)
        module = instantiate(node, where="first_stage")
        spec = {"kind": "first_stage", "image_size": 64, "first_stage": node}
        write_model_folder(folder, spec, {"first_stage": module.state_dict()})
    return folder


def reduced(name: str, root: Path) -> dict[str, Any]:
    """The experiment on the scenes, with narrow networks and two steps; all else as it is."""
    config = composed(name)
    size = next((px for part, px in SIZES.items() if part in name), 32)
    config["data"] |= {"train": f"{root}/train", "val": f"{root}/val", "image_size": size, "workers": 0}
    config["trainer"] |= {"max_steps": 2, "micro_batch": 2, "global_batch": None, "precision": "32-true"}
    config["trainer"] |= {"log_every": 1, "validate_every": 2, "checkpoint_every": 2}
    config["logger"] = {}
    config["run"]["dir"] = str(root / "runs" / name)
    if config["stage"]["name"] == "autoencoder":
        config["first_stage"] = narrow_first_stage(config["first_stage"])
        config["loss"] |= {"lpips_weight": 0.0}  # its weights are not here
        config["loss"]["adversary"]["discriminator"]["channels"] = 8
        return config
    first_stage = first_stage_experiment(name)
    config["from_run"] = None if first_stage is None else str(drawn_first_stage(root, first_stage))
    config["stage"]["val_draws"] = 1
    narrow = {"model_channels": 32, "num_res_blocks": 1}
    if config["stage"]["name"] == "classifier":
        config["classifier"] |= narrow
        return config
    config["backbone"] |= narrow | ({"head_channels": 16} if "head_channels" in config["backbone"] else {})
    config["stage"] |= {"panel_steps": 2, "panel_count": 2}
    config["conditioner"] = {key: narrow_conditioner(node, root) for key, node in config["conditioner"].items()}
    if "semantic" in config["conditioner"]:
        config["task"]["crop"]["short_side"] = 48
        config["task"]["classes"] = CLASSES + 1
    return config


TASKS = ("layout/coco_scratch", "semantic/landscapes_256", "super_resolution/bicubic", "inpainting/attention")


def on_pixels(config: dict[str, Any]) -> dict[str, Any]:
    """As `first_stage=identity` in place of `from_run=...`."""
    return config | {"from_run": None, "first_stage": {"_target_": "ldmlab.first_stages.identity.Identity"}}


def narrow_conditioner(node: dict[str, Any], root: Path) -> dict[str, Any]:
    """Shallow transformers, and a text tower of drawn weights for published ones."""
    if "pretrained" in node:
        return {**node, "name": None, "pretrained": None, "config": TINY_CLIP}
    changes = {"depth": 1, "width": 32, "vocab": f"{root}/vocab.txt", "classes": CLASSES + 1}
    return {**node, **{key: value for key, value in changes.items() if key in node}}


def asked(reads: frozenset[str], size: int) -> dict[str, Any]:
    """One scene's fields."""
    scene = Scene(100, size, size)
    fields = {
        "caption": scene.caption,
        "class_id": 1,
        "boxes": scene.boxes,
        "image": np.asarray(scene.image),
        "mask": np.tri(size, dtype=np.uint8),
        "segmentation": scene.labels,
        "low_resolution": np.asarray(scene.image)[::4, ::4],
    }
    return {name: [fields[name]] for name in reads}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_one_option_makes_a_task_a_pixel_baseline(name: str, root: Path) -> None:
    config = on_pixels(reduced(f"paper/{name}", root))
    config["run"]["dir"] += "-pixels"
    train(config)
    model, size = ldmlab.load(config["run"]["dir"]), config["data"]["image_size"]
    assert model.diffusion.first_stage.downsampling == 1
    assert model.sample(**asked(model.reads, size), steps=1).shape == (1, size, size, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEP)
def test_an_experiment_trains_and_serves(name: str, root: Path) -> None:
    config = reduced(name, root)
    train(config)
    run, size = Path(config["run"]["dir"]), config["data"]["image_size"]
    if name in of_stage("autoencoder"):
        loaded = load_first_stage(run)
        images = loaded.module.decode(loaded.module.encode(torch.zeros(1, 3, size, size)).mean)
        assert images.shape == (1, 3, size, size)
        assert torch.isfinite(images).all()
    elif name in of_stage("classifier"):
        assert load_classifier(run).spec["kind"] == "classifier"
    else:
        model = ldmlab.load(run)
        trained = config["stage"]["guidance_scale"] > 1 and model.diffusion.guidance_trained
        fields = asked(model.reads, size) or {"count": 1}
        images = model.sample(**fields, steps=2, guidance_scale=config["stage"]["guidance_scale"] if trained else 1.0)
        assert images.shape == (1, size, size, 3)
