"""Models of few steps: trained, resumed, sampled in one step, exported; and distilled from a trained run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldmlab
from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.wiring import train
from ldmlab.checkpoints import load_checkpoint
from ldmlab.diffusion.guidance import Guidance
from ldmlab.errors import InputError
from ldmlab.inference.model import LoadedModel
from ldmlab.model_files import read_description
from refusals import refusal

SMALL = ["trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.log_every=1", "trainer.micro_batch=4"]
SMALL += ["trainer.precision=32-true", "data.workers=0", "data=shards", "data.image_size=8", "data.fields=[class_id]"]
SMALL += ["stage=diffusion", "stage.panel_steps=2", "stage.panel_count=2", "first_stage=identity", "sampler=auto"]
UNET = ["backbone.model_channels=32", "backbone.channel_mult=[1]", "backbone=unet_small", "conditioner=class_label"]
UNET += ["conditioner.class_label.classes=2", "conditioner.class_label.width=512"]
EDM2 = ["backbone.model_channels=16", "backbone.channel_mult=[1,2]", "backbone.num_res_blocks=1", "backbone=edm2_xs"]
EDM2 += ["backbone.head_channels=16", "conditioner=class_one_hot", "conditioner.class_label.classes=2"]
DIT = ["backbone=dit_s_2", "backbone.depth=1", "backbone.width=32", "backbone.heads=2", "conditioner=none"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few")
    for number in range(12):
        folder = root / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    words = [str(root / "images"), str(root / "packed"), "--size", "8", "--val", "0.3", "--workers", "1"]
    assert cli.dispatch(["pack", *words, "--layout", "classes"]) == 0
    return root / "packed"


def run(packed: Path, out: Path, steps: int, *more: str, chosen: tuple[str, ...] = ()) -> dict:
    data = [f"data.train={packed}/train", f"data.val={packed}/val", f"run.dir={out}", f"trainer.max_steps={steps}"]
    train(plain(compose("train", [*SMALL, *data, *more])), chosen=chosen)
    return load_checkpoint(out / "checkpoints" / f"step_{steps:08d}.ckpt")


def same(first: dict, second: dict) -> None:
    """Bit-identical weights and averages of two checkpoints."""
    assert first["modules"].keys() == second["modules"].keys()
    for name, tensors in first["modules"].items():
        assert all(torch.equal(tensors[key], second["modules"][name][key]) for key in tensors), name


def differs_by_scale(model: LoadedModel) -> bool:
    """Whether clean estimates do, if only by little after a few steps of training."""
    conditioning, x = model.conditioning(class_id=[0, 1]), torch.randn(2, 3, 8, 8)
    level = model.diffusion.path.grid(2, model.diffusion.path.solver.spacing)[0]
    ends = [model.diffusion.denoiser(conditioning, guidance=Guidance(scale))(x, level) for scale in (1.0, 4.0)]
    return not torch.equal(*ends)


@pytest.mark.slow
def test_mean_flow_from_training_to_an_export(packed: Path, tmp_path: Path) -> None:
    """A U-Net with a class and the guidance scale as inputs."""
    words = ["diffusion=meanflow", "diffusion.guidance=[1,4]", "diffusion.kappa=0.5", *UNET]
    words.append("optimizer.learning_rate=0.01")  # so that four steps show in float32 on every processor
    straight = run(packed, tmp_path / "straight", 4, *words)
    run(packed, tmp_path / "run", 2, *words)
    same(straight, run(packed, tmp_path / "run", 4, *words))
    model = ldmlab.load(tmp_path / "run", device="cpu")
    assert model.diffusion.backbone.numbers.expand.in_features == 2 * 256  # t - r and the scale
    assert differs_by_scale(model)
    images = model.sample(class_id=[0, 1], seed=1)
    named = {"guidance_scale": 3.0, "sampler": "mean_flow", "steps": 1}
    assert torch.equal(model.sample(class_id=[0, 1], seed=1, **named), images)  # the usual scale, in one step
    assert model.sample(class_id=[0, 1], seed=1, steps=3).shape == images.shape
    assert model.sample(class_id=[0, 1], sampler="heun", steps=3).shape == (2, 8, 8, 3)  # a flow like any other
    with pytest.raises(InputError, match=r"guidance_scale=5\.0 is outside 1\.0 \.\. 4\.0"):
        model.sample(class_id=[0], guidance_scale=5.0)
    assert cli.dispatch(["export", "--without-card", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    assert torch.equal(ldmlab.load(tmp_path / "exported", device="cpu").sample(class_id=[0, 1], seed=1), images)
    for form in ("compvis", "diffusers"):
        words = ["export", "--without-card", str(tmp_path / "run"), str(tmp_path / form), "--format", form]
        assert "is a MeanFlow model, of few steps" in refusal(lambda words=words: cli.dispatch(words))  # type: ignore[misc]


@pytest.mark.slow
def test_a_transformer_learns_average_velocities_in_half_precision(packed: Path, tmp_path: Path) -> None:
    run(packed, tmp_path / "run", 2, "diffusion=meanflow", *DIT, "trainer.precision=bf16-mixed")
    assert ldmlab.load(tmp_path / "run", device="cpu").sample(count=2).float().std() > 0
    assert cli.dispatch(["plan", *SMALL, "diffusion=meanflow", *DIT]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["meanflow", "consistency"])
def test_the_network_of_edm2(packed: Path, tmp_path: Path, objective: str) -> None:
    """Its embedding takes numbers beside the noise label; a run that is resumed has the same bits."""
    words = [f"diffusion={objective}", "diffusion.guidance=[1,4]", *EDM2]
    if objective == "consistency":
        run(packed, tmp_path / "teacher", 2, "diffusion=edm", *EDM2)
        words = [*words[:2], f"teacher={tmp_path}/teacher", "diffusion.levels=8"]
    straight = run(packed, tmp_path / "straight", 4, *words)
    run(packed, tmp_path / "run", 2, *words)
    same(straight, run(packed, tmp_path / "run", 4, *words))
    assert straight["modules"]["denoiser"]["numbers.mix.weight"].any()  # zero at the start
    assert ldmlab.load(tmp_path / "run", device="cpu").sample(class_id=[0, 1]).float().std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["linear", "flow", "edm"])
def test_a_trained_run_is_distilled(packed: Path, tmp_path: Path, objective: str) -> None:
    teacher = tmp_path / "teacher"
    run(packed, teacher, 2, f"diffusion={objective}", *UNET)
    words = ["diffusion=consistency", f"teacher={teacher}", "diffusion.levels=8", "diffusion.guidance=[1,4]"]
    words += ["diffusion.target_decay=0.9"] if objective == "flow" else []
    straight = run(packed, tmp_path / "straight", 4, *words)
    run(packed, tmp_path / "run", 2, *words)
    same(straight, run(packed, tmp_path / "run", 4, *words))
    assert ("target" in straight["modules"]) == (objective == "flow")
    assert "teacher" not in straight["modules"]
    spec = [read_description(folder) for folder in (teacher, tmp_path / "run")]
    assert spec[1]["conditioners"] == spec[0]["conditioners"]
    assert spec[1]["diffusion"]["schedule"] == spec[0]["diffusion"]["schedule"]
    model = ldmlab.load(tmp_path / "run", device="cpu")
    images = model.sample(class_id=[0, 1], seed=1, steps=1)
    assert torch.equal(model.sample(class_id=[0, 1], seed=1, steps=1, sampler="consistency"), images)
    assert not torch.equal(model.sample(class_id=[0, 1], seed=1), images)  # four steps
    assert differs_by_scale(model)
    assert cli.dispatch(["export", "--without-card", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    exported = ldmlab.load(tmp_path / "exported", device="cpu")
    assert torch.equal(exported.sample(class_id=[0, 1], seed=1, steps=1), images)
    assert cli.dispatch(["plan", *SMALL, *words]) == 0
    again = refusal(lambda: run(packed, tmp_path / "none", 2, "diffusion=consistency", f"teacher={tmp_path}/run"))
    assert "is a Consistency model, of few steps already" in again
    run(packed, teacher, 4, f"diffusion={objective}", *UNET)  # the teacher changes
    assert "weights of the teacher=" in refusal(lambda: run(packed, tmp_path / "run", 6, *words))


@pytest.mark.slow
def test_what_cannot_go_together_is_refused(packed: Path, tmp_path: Path) -> None:
    def refused(*more: str, chosen: tuple[str, ...] = ()) -> str:
        return refusal(lambda: run(packed, tmp_path / "none", 2, *more, chosen=chosen))

    teacher, student = tmp_path / "teacher", ["diffusion=consistency", f"teacher={tmp_path}/teacher"]
    run(packed, teacher, 2, *UNET, "conditioner.class_label.drop=0.0")
    run(packed, tmp_path / "learned", 2, "diffusion=dit", *DIT)
    assert "name its run or model folder: teacher=RUN" in refused("diffusion=consistency")
    assert "only stage=diffusion with diffusion=consistency" in refused("diffusion=flow", f"teacher={teacher}")
    assert "has a learned variance" in refused("diffusion=consistency", f"teacher={tmp_path}/learned")
    assert "trained without dropped conditions" in refused(*student, "diffusion.guidance=3.0")
    assert "backbone.width comes with teacher=" in refused(*student, chosen=("backbone.width",))
    assert "reads class_id, which neither" in refused(*student, "data.fields=[]")
    assert not (tmp_path / "none").exists()
