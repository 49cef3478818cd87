"""Objectives of conf/diffusion other than the paper's: trained, stopped and resumed, sampled, shown, exported."""

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
from ldmlab.errors import InputError
from ldmlab.inference.likelihood import bits_per_dimension
from ldmlab.inference.sample_settings import SAMPLERS
from refusals import refusal

SMALL = ["trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.log_every=1", "trainer.micro_batch=4"]
SMALL += ["trainer.precision=32-true", "data.workers=0", "first_stage=identity", "data=shards", "data.image_size=8"]
SMALL += ["data.fields=[]", "conditioner=none", "stage=diffusion", "stage.panel_steps=2", "stage.panel_count=2"]
SMALL += ["backbone.model_channels=32", "backbone.channel_mult=[1]", "sampler=auto"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("objectives")
    (root / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    words = [str(root / "images"), str(root / "packed"), "--size", "8", "--val", "0.3", "--workers", "1"]
    assert cli.dispatch(["pack", *words]) == 0
    return root / "packed"


def run(packed: Path, out: Path, objective: str, steps: int, *more: str) -> dict:
    data = [f"data.train={packed}/train", f"data.val={packed}/val", f"run.dir={out}", f"trainer.max_steps={steps}"]
    train(plain(compose("train", [*SMALL, *data, f"diffusion={objective}", *more])))
    return load_checkpoint(out / "checkpoints" / f"step_{steps:08d}.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["flow", "edm", "dit", "lightningdit"])
def test_from_training_to_an_export(packed: Path, tmp_path: Path, objective: str) -> None:
    straight = run(packed, tmp_path / "straight", objective, 4)
    run(packed, tmp_path / "run", objective, 2)
    resumed = run(packed, tmp_path / "run", objective, 4)
    for name, tensors in straight["modules"].items():
        assert all(bool((tensors[key] == resumed["modules"][name][key]).all()) for key in tensors), name
    assert ("objective" in straight["modules"]) == (objective == "edm")  # its learned weights resume too
    model = ldmlab.load(tmp_path / "run", device="cpu")
    images = model.sample(count=2, steps=4, seed=1)
    assert images.shape == (2, 8, 8, 3)
    again = model.sample(count=2, steps=4, seed=1, init_image=[images[0], images[1]], strength=0.7)
    assert again.shape == images.shape
    out = tmp_path / "exported"
    assert cli.dispatch(["export", "--without-card", str(tmp_path / "run"), str(out)]) == 0
    assert bool((ldmlab.load(out, device="cpu").sample(count=2, steps=4, seed=1) == images).all())
    picture = tmp_path / "picture.png"
    Image.fromarray(images[0].numpy()).save(picture)
    assert cli.dispatch(["noise", str(out), str(picture), "--out", str(tmp_path / "noise.png")]) == 0


@pytest.mark.slow
def test_what_does_not_fit_is_refused(packed: Path, tmp_path: Path) -> None:
    def refused(*more: str, objective: str = "flow") -> str:
        return refusal(lambda: run(packed, tmp_path / "none", objective, 2, *more))

    velocity = "diffusion.prediction={_target_: ldmlab.diffusion.parameterization.VelocityPrediction}"
    assert "undefined on a discrete schedule" in refused(velocity, objective="scaled_linear")
    assert "diffusion.loss=l2 never trains the variance" in refused("diffusion.loss=l2", objective="dit")
    assert "variational loss needs prediction=Learned" in refused(
        "diffusion.loss={_target_: ldmlab.diffusion.diffusion_loss.VariationalLoss}"
    )
    weighting = "+diffusion.weighting={_target_: ldmlab.diffusion.weighting.FlowWeighting}"
    assert "FlowWeighting weighs velocities of a flow" in refused(weighting, objective="scaled_linear")
    assert "shift=0.0" in refused("diffusion.schedule.shift=0.0")
    assert "diffusion.prediction=null" in refused("diffusion.prediction=null")
    assert "offset_noise=-1.0" in refused("diffusion.offset_noise=-1.0")
    assert "channels=0 learns nothing" in refused("diffusion.weighting.channels=0", objective="edm")
    for option in ("vector_balance=2.0", "resample_filter=[0,0]", "clip=-1.0"):
        words = ["backbone=edm2_xs", "first_stage=identity", "data.image_size=8", f"backbone.{option}"]
        assert "within 0 .. 1" in refusal(lambda words=words: cli.dispatch(["plan", *words]))  # type: ignore[misc]
    small = [word for word in SMALL if not word.startswith("backbone.")]
    data = [f"data.train={packed}/train", f"data.val={packed}/val", f"run.dir={tmp_path / 'none'}"]
    for name, option in (("dit_s_2", "patch_size=3"), ("edm2_xs", "channel_mult=[1,1,1,1,1]")):
        config = plain(compose("train", [*small, *data, f"backbone={name}", f"backbone.{option}"]))
        assert "data.image_size=8 is not a multiple of" in refusal(lambda config=config: train(config))  # type: ignore[misc]
    assert "diffusion.time_sampling.std=0.0" in refused("diffusion.time_sampling.std=0.0")
    assert "has no __call__()" in refused("diffusion.loss={_target_: collections.UserDict}")
    assert not (tmp_path / "none").exists()


def test_a_transformer_on_a_flow(packed: Path, tmp_path: Path) -> None:
    """Every sampler that fits, guided by an image; formats of schedules alone are refused in a sentence."""
    dit = ["backbone=dit_s_2", "backbone.depth=1", "backbone.width=32", "backbone.heads=2"]
    small = [word for word in SMALL if not word.startswith("backbone.")]
    data = [f"data.train={packed}/train", f"data.val={packed}/val", f"run.dir={tmp_path / 'run'}"]
    train(plain(compose("train", [*small, *data, "trainer.max_steps=2", "diffusion=flow", *dit])))
    model = ldmlab.load(tmp_path / "run", device="cpu")
    ends = {}
    for sampler in ["auto", *SAMPLERS]:
        ends[sampler] = model.sample(count=1, steps=4, seed=1, sampler=sampler)
        assert ends[sampler].float().std() > 0
    assert torch.equal(ends["auto"], ends["euler"])
    for sampler in ("ode", "dpm_adaptive"):  # whose steps would depend on the batch
        both = model.sample(count=2, steps=4, seed=1, sampler=sampler)
        assert torch.equal(both[:1], ends[sampler])
    words = ["sample", str(tmp_path / "run"), "--steps", "4", "--seed", "1", "--device", "cpu", "--sampler", "ode"]
    assert cli.dispatch([*words, "--out", str(tmp_path / "by_ode")]) == 0  # its steps are its own
    assert (np.asarray(Image.open(tmp_path / "by_ode" / "000000.png")) == ends["ode"][0].numpy()).all()
    words = [*words, "--trajectory", "--out", str(tmp_path / "shown")]
    assert "--sampler ode has no steps for --trajectory" in refusal(lambda: cli.dispatch(words))
    assert not (tmp_path / "shown").exists()
    with pytest.raises(InputError, match="spacing=official is a rule for the paper's discrete schedules"):
        model.sample(count=1, steps=4, spacing="official")
    picture = tmp_path / "picture.png"
    Image.fromarray(ends["auto"][0].numpy()).save(picture)
    words = [
        str(tmp_path / "run"),
        "--count",
        "1",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "guided"),
        "--device",
        "cpu",
    ]
    assert cli.dispatch(["sample", *words, "--guider", "squared", "--guider-image", str(picture)]) == 0
    for form in ("compvis", "diffusers"):
        words = ["export", "--without-card", str(tmp_path / "run"), str(tmp_path / form), "--format", form]
        assert "--format ldmlab" in refusal(lambda words=words: cli.dispatch(words))  # type: ignore[misc]
        assert not (tmp_path / form).exists()


@pytest.mark.slow
def test_bits_of_a_trained_flow(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number for each image, the same in any batch up to the solver's tolerance; schedules are refused."""
    run(packed, tmp_path / "run", "flow", 2)
    model = ldmlab.load(tmp_path / "run", device="cpu")
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = bits_per_dimension(model, latents, steps=4)
    alone = bits_per_dimension(model, latents[1:], index=torch.tensor([1]), steps=4)
    assert together.shape == (2,)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    run(packed, tmp_path / "schedule", "linear", 2)
    monkeypatch.chdir(tmp_path)
    for sampler in ("ode", "sde:form=linear"):
        words = ["sample", str(tmp_path / "schedule"), "--device", "cpu", "--sampler", sampler]
        assert f"--sampler {sampler} is for flows" in refusal(lambda words=words: cli.dispatch(words))  # type: ignore[misc]
    assert not (tmp_path / "outputs").exists()
    with pytest.raises(InputError, match="undefined on a discrete schedule"):
        bits_per_dimension(ldmlab.load(tmp_path / "schedule", device="cpu"), latents)
