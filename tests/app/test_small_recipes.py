"""The recipes of the small tasks train two steps at reduced width, with a first stage and on pixels."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldmlab
from ldmlab.app import cli
from ldmlab.app.compose import compose, group_choices, plain
from ldmlab.app.wiring import train
from ldmlab.data.scene_shards import SceneSettings, write_scenes
from ldmlab.instantiate import instantiate
from ldmlab.model_files import write_model_folder
from ldmlab.nn.openclip import build_clip

EMOJI = Path(__file__).parents[2] / "data" / "emoji-256"
SIZE = 32
RECIPES = [name for name in group_choices("experiment") if name.startswith("small/")]
DENOISERS = [name for name in RECIPES if name != "small/first_stage"]
SMALL = [
    *("trainer.max_steps=2", "trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.log_every=1"),
    *("trainer.micro_batch=2", "trainer.precision=32-true", "data.workers=0", f"data.image_size={SIZE}"),
]
NARROW = [
    *("backbone.model_channels=32", "backbone.channel_mult=[1,2]", "backbone.attention_downsampling=[2]"),
    *("stage.panel_steps=2", "stage.panel_count=2", "stage.val_draws=1"),
]
TINY = {
    "_target_": "ldmlab.first_stages.kl.KLAutoencoder",
    **{"channels": 8, "channel_mult": [1, 1, 1], "latent_channels": 4, "num_res_blocks": 1, "norm_groups": 4},
}

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 24},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes and a first stage with drawn weights."""
    folder = tmp_path_factory.mktemp("small")
    settings = SceneSettings(str(EMOJI / "train"), size=SIZE)
    write_scenes(folder / "scenes", {"train": 8, "val": 4}, settings, workers=1)
    torch.manual_seed(0)
    module = instantiate(TINY, where="first_stage")
    spec = {"kind": "first_stage", "image_size": SIZE, "first_stage": TINY}
    write_model_folder(folder / "first_stage", spec, {"first_stage": module.state_dict()})
    clip = build_clip(config=TINY_CLIP)
    spec = {"kind": "clip", "image_size": SIZE, "clip": clip.node}
    write_model_folder(folder / "clip", spec, {"clip": clip.model.state_dict()})
    return folder


def run(root: Path, recipe: str, out: str, *options: str) -> Path:
    """The recipe in this process, on few images."""
    emoji = recipe in ("small/class", "small/variations")
    shards = [EMOJI / "val", EMOJI / "val"] if emoji else [root / "scenes/train", root / "scenes/val"]
    data = [f"data.{split}={folder}" for split, folder in zip(("train", "val"), shards, strict=True)]
    train(plain(compose("train", [f"experiment={recipe}", *SMALL, *data, f"run.dir={root / out}", *options])))
    return root / out


def test_there_is_a_recipe_for_every_task() -> None:
    tasks = {"unconditional", "class", "layout", "semantic", "super_resolution", "inpainting", "variations"}
    assert {name.partition("/")[2] for name in DENOISERS} == tasks


def test_the_first_stage_trains(root: Path) -> None:
    folder = run(root, "small/first_stage", "trained_first_stage", "first_stage.channels=16")
    assert json.loads((folder / "finished.json").read_text()) == {"step": 2}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DENOISERS)
@pytest.mark.parametrize("choice", ["latents", pytest.param("pixels", marks=pytest.mark.slow)])
def test_a_task_trains_on_latents_and_by_one_option_on_pixels(root: Path, recipe: str, choice: str) -> None:
    option = "first_stage=identity" if choice == "pixels" else f"from_run={root / 'first_stage'}"
    told = [f"conditioner.image.from_run={root / 'clip'}"] if recipe == "small/variations" else []
    folder = run(root, recipe, f"{choice}-{recipe.partition('/')[2]}", option, *told, *NARROW)
    model = ldmlab.load(folder)
    assert model.diffusion.first_stage.downsampling == (1 if choice == "pixels" else 4)


@pytest.mark.slow
def test_a_variation_of_a_image_of_any_size(root: Path, tmp_path: Path) -> None:
    """The recipe's model from the command line, two images each of two files."""
    told = [f"conditioner.image.from_run={root / 'clip'}", f"from_run={root / 'first_stage'}"]
    folder = run(root, "small/variations", "varied", *told, *NARROW)
    for name, size in (("wide", (50, 30)), ("small", (20, 20))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{name}.png")
    words = ["sample", str(folder), "--task", "variations", str(tmp_path / "wide.png"), str(tmp_path / "small.png")]
    assert cli.dispatch([*words, "--count", "2", "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "000003.png").size == (SIZE, SIZE)


@pytest.mark.slow
def test_a_denoiser_starts_from_one_that_was_told_something_else(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the class recipe does: the network goes on, the conditioner starts anew."""
    stage = f"from_run={root / 'first_stage'}"
    narrow = [*NARROW, stage, "optimizer.learning_rate=1e-9", "backbone.num_res_blocks=1", "backbone.coordinates=false"]
    first = run(root, "small/layout", "before", *narrow)
    second = run(root, "small/class", "after", *narrow, "conditioner.class_label.classes=9", f"init_from={first}")
    assert "of another kind" in capsys.readouterr().err
    before, after = (ldmlab.load(folder).diffusion.backbone.state_dict() for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
