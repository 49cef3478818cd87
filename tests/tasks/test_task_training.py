"""Each task from generated shards: two training steps, then samples of the loaded run, all through the public doors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ldmlab
from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.wiring import train
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import conditions
from ldmlab.evaluation.sources import requests
from ldmlab.inference.model import LoadedModel, generate
from ldmlab.instantiate import instantiate
from ldmlab.model_files import write_model_folder
from scenes import CLASSES, Scene, write_scenes

SIZE = 16
FIRST_STAGE = {
    "_target_": "ldmlab.first_stages.kl.KLAutoencoder",
    **{"channels": 8, "channel_mult": [1, 1, 1], "latent_channels": 2, "num_res_blocks": 1, "norm_groups": 4},
}
STEPS = ["trainer.max_steps=2", "trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.log_every=1"]
SMALL = [
    *("optimizer.learning_rate=0.01", "trainer.averaging_decay=null"),  # two steps that can be seen
    *("trainer.micro_batch=4", "trainer.precision=32-true", "data=shards", "data.workers=0", f"data.image_size={SIZE}"),
    *("backbone.model_channels=32", "backbone.channel_mult=[1,2]", "backbone.num_res_blocks=1"),
    *("stage.panel_steps=2", "stage.panel_count=4", "stage.val_draws=1"),
]
TASKS = {
    "super_resolution": ["conditioner=low_resolution"],
    "inpainting": ["conditioner=[masked_latent,mask]", "task.masks=thin_256", "task.held_out_masks=thin_256"],
    "layout": [
        *("conditioner=layout", "conditioner.layout.depth=1", "conditioner.layout.width=32"),
        f"conditioner.layout.classes={CLASSES}",
    ],
    "semantic": ["conditioner=semantic", "task.crop.short_side=20", f"conditioner.semantic.classes={CLASSES + 1}"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scenes and a first stage with drawn weights."""
    folder = tmp_path_factory.mktemp("tasks")
    write_scenes(folder / "train", 8)
    write_scenes(folder / "val", 5)
    torch.manual_seed(0)
    module = instantiate(FIRST_STAGE, where="first_stage")
    spec = {"kind": "first_stage", "image_size": SIZE, "first_stage": FIRST_STAGE}
    write_model_folder(folder / "first_stage", spec, {"first_stage": module.state_dict()})
    return folder


def run(root: Path, out: str, *options: str) -> Path:
    """`python train.py`, in this process."""
    data = [f"data.train={root}/train", f"data.val={root}/val", f"from_run={root}/first_stage"]
    train(plain(compose("train", [*STEPS, *SMALL, *data, f"run.dir={root}/{out}", *options])))
    return root / out


def trained(root: Path, task: str) -> LoadedModel:
    """The task's run, made once."""
    if not (root / task).exists():
        run(root, task, f"task={task}", *TASKS[task])
    return ldmlab.load(root / task)


def asked(task: str) -> dict[str, Any]:
    """Fields of two images."""
    scenes = [Scene(number, SIZE, SIZE) for number in (100, 101)]
    images = [np.asarray(scene.image) for scene in scenes]
    if task == "super_resolution":
        return {"low_resolution": [image[::4, ::4] for image in images]}
    if task == "inpainting":
        mask = np.zeros((SIZE, SIZE), bool)
        mask[4:9, 3:12] = True
        return {"image": images, "mask": [mask, ~mask]}
    if task == "layout":
        return {"boxes": [scene.boxes for scene in scenes]}
    return {"segmentation": [scene.labels for scene in scenes]}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_and_samples(task: str, root: Path) -> None:
    model = trained(root, task)
    assert type(model.diffusion.task).__module__ == f"ldmlab.tasks.{task}"
    fields = asked(task)
    both = model.sample(**fields, steps=2)
    assert both.shape == (2, SIZE, SIZE, 3)
    second = model.sample(**{name: values[1:] for name, values in fields.items()}, steps=2)
    assert second.shape == (1, SIZE, SIZE, 3)
    changed = {name: values[::-1] for name, values in fields.items()}
    assert not torch.equal(model.sample(**changed, steps=2), both)  # what is given matters
    if task == "inpainting":
        known = ~np.stack(fields["mask"])
        assert np.array_equal(both.numpy()[known], np.stack(fields["image"])[known])  # bit for bit


def test_the_size_follows_what_is_given(root: Path) -> None:
    model = trained(root, "super_resolution")
    small = np.zeros((4, 8, 3), np.uint8)
    assert model.sample(low_resolution=[small], steps=1).shape == (1, 16, 32, 3)
    with pytest.raises(InputError, match=r"are for 16x32 px .* but 16x16 are sampled"):
        model.sample(low_resolution=[small], steps=1, size=16)


def test_a_task_that_is_not_told_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match="conditioner=mask reads mask, which neither"):
        run(root, "none", "conditioner=mask")
    with pytest.raises(InputError, match="task: stage=clip takes no task"):
        train(plain(compose("train", ["stage=clip", "task=inpainting", f"run.dir={root}/clip"])))


def test_images_and_masks_come_from_files(root: Path) -> None:
    trained(root, "inpainting")
    scene = Scene(100, SIZE, SIZE)
    (root / "image.png").write_bytes(scene.files()["png"])
    (root / "mask.png").write_bytes(scene.files()["mask.png"])
    asked_for = {"image": str(root / "image.png"), "mask": str(root / "mask.png")}
    (root / "asked.jsonl").write_text(json.dumps(asked_for))
    words = ["sample", f"{root}/inpainting", "--prompts", f"{root}/asked.jsonl", "--steps", "1"]
    assert cli.dispatch([*words, "--out", f"{root}/out"]) == 0
    made = np.asarray(Image.open(root / "out" / "000000.png"))
    assert np.array_equal(made[:, SIZE // 2 :], np.asarray(scene.image)[:, SIZE // 2 :])
    with pytest.raises(InputError, match="are sampled; resize them"):
        cli.dispatch([*words, "--out", f"{root}/other", "--size", "32"])


@pytest.mark.parametrize("task", ["inpainting", "layout"])
def test_held_out_images_ask_as_people_do(task: str, root: Path) -> None:
    model = trained(root, task)
    config = yaml.safe_load((root / task / "config.yaml").read_text())
    data = instantiate(config["data"], where="data").with_task(model.diffusion.task)
    known = conditions(data, "val", sorted(model.reads))
    protocol = Protocol(name="p", samples=7, reference="val", metrics={}, steps=1)
    asked = requests(protocol, model.reads, known)
    assert len(asked) == 7
    assert model.reads <= asked[6].keys()
    assert repr(asked[0]) == repr(asked[len(known)])
    drawn = torch.cat([part for _, part in generate(model, asked, protocol.settings(), batch_size=4)])
    assert drawn.shape == (7, SIZE, SIZE, 3)
    if task == "inpainting":
        real = [batch["image"] for batch in data.eval_loader("val", 2, kind="images")]
        hole = np.stack([asked[i]["mask"] for i in range(len(known))]) > 0
        known_pixels = torch.cat(real).permute(0, 2, 3, 1).numpy()[~hole]
        assert np.array_equal(drawn.numpy()[: len(known)][~hole], known_pixels)


@pytest.fixture
def words(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scene of a size that f does not divide, with everything on it, as files in the working folder."""
    monkeypatch.chdir(tmp_path)
    scene = Scene(100, 19, 14)
    for name, content in scene.files().items():
        Path(f"scene.{name}").write_bytes(content)
    scene.image.save("small.jpg")
    Path("boxes.json").write_text(json.dumps(scene.boxes))
    Path("outside.json").write_text(json.dumps([{"class_id": 1, "box": [0.5, 0.5, 1.2, 1]}]))
    Path("unknown.json").write_text(json.dumps([{"class_id": CLASSES, "box": [0.5, 0.5, 1, 1]}]))
    Path("many.json").write_text(json.dumps([{"class_id": 1, "box": [0.5, 0.5, 1, 1]}] * 31))
    Path("none.json").write_text("{}")
    Path("broken.json").write_text("{")
    Image.new("L", (16, 16), 200).save("unknown.png")
    Image.new("I;16", (16, 16), 300).save("deep.png")
    return tmp_path


def sample(root: Path, task: str, *words: str) -> np.ndarray:
    """`ldmlab sample --task TASK`; the image."""
    trained(root, task)
    assert cli.dispatch(["sample", f"{root}/{task}", "--task", task, *words, "--steps", "1", "--out", "out"]) == 0
    return np.asarray(Image.open("out/000000.png"))


def test_the_command_fills_holes_at_any_size(root: Path, words: Path) -> None:
    made = sample(root, "inpainting", "scene.png", "--mask", "scene.mask.png")
    given, mask = np.asarray(Image.open("scene.png")), np.asarray(Image.open("scene.mask.png")) > 0
    assert made.shape == (14, 19, 3)
    assert np.array_equal(made[~mask], given[~mask])
    assert not np.array_equal(made[mask], given[mask])


def test_the_command_enlarges_images_of_any_size(root: Path, words: Path) -> None:
    assert sample(root, "super_resolution", "small.jpg").shape == (56, 76, 3)


@pytest.mark.parametrize(
    ("task", "file", "shape"), [("layout", "boxes.json", (SIZE, SIZE, 3)), ("semantic", "scene.seg.png", (14, 19, 3))]
)
def test_boxes_and_label_maps_from_files(task: str, file: str, shape: tuple[int, ...], root: Path, words: Path) -> None:
    assert sample(root, task, file).shape == shape


@pytest.mark.parametrize(
    ("task", "file", "message"),
    [
        ("layout", "outside.json", r"boxes: box \[0.5, 0.5, 1.2, 1\] does not lie in \[0, 1\]"),
        ("layout", "unknown.json", f"boxes: class_id {CLASSES} is not 0 .. {CLASSES - 1}"),
        ("layout", "many.json", r"31 boxes, more than conditioner\.objects=30"),
        ("layout", "none.json", "boxes are a dict, not a list"),
        ("layout", "broken.json", r"boxes=broken\.json cannot be read as JSON"),
        ("layout", "nowhere.json", r"boxes=nowhere\.json cannot be read"),
        ("semantic", "unknown.png", f"segmentation holds 200, but the classes of this model are 0 .. {CLASSES}"),
        ("semantic", "deep.png", "segmentation holds 300, but"),
        ("semantic", "scene.png", "an image of mode RGB, not a map of class numbers"),
        ("super_resolution", "boxes.json", r"low_resolution=boxes\.json cannot be read as an image"),
    ],
)
def test_files_that_mean_nothing_are_refused(task: str, file: str, message: str, root: Path, words: Path) -> None:
    with pytest.raises(InputError, match=message):
        sample(root, task, file)
    assert not Path("out").exists()
