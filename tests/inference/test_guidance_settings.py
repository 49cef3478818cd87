"""Where and how much is guided, and by which model: settings of sampling, what they cost, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import VPrediction
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.inference.grids import read_settings
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SampleSettings, parsed, variants
from sampling_models import sample_command, tiny_model

EVERY = ["ddim", "heun", "dpmpp_2m", "unipc", "plms", "euler_ancestral", "restart", "dpmpp_2s_ancestral"]


def sampled(made: LoadedModel, **options: Any) -> Tensor:
    told = {"class_id": [1, 2]} if made.reads else {"count": 2}
    return made.sample(**told, **{"steps": 5, "seed": 3, "guidance_scale": 2.5, **options})


def other(model: LoadedModel, amount: float = 0.05) -> LoadedModel:
    """A model of the same kind with other weights."""
    weak = tiny_model("class_id" if model.reads else None)
    torch.manual_seed(5)
    for parameter in weak.diffusion.backbone.parameters():
        parameter += amount * torch.randn_like(parameter)
    return weak


@pytest.mark.parametrize("sampler", EVERY)
def test_the_whole_interval_is_plain_guidance_bit_for_bit(sampler: str) -> None:
    """In positions and in sigmas; half of it is something else."""
    made, spacing = tiny_model(), "linspace" if sampler in ("plms", "ddim") else None
    plain = sampled(made, sampler=sampler, spacing=spacing)
    for interval, unit in (((0, 1), "position"), ((0.0, 1e9), "sigma")):
        options = {"guidance_interval": interval, "guidance_interval_unit": unit, "spacing": spacing}
        assert torch.equal(sampled(made, sampler=sampler, **options), plain)
    half = sampled(made, sampler=sampler, spacing=spacing, guidance_interval=(0.0, 0.5))
    assert not torch.equal(half, plain)


def test_what_is_not_guided_costs_one_evaluation() -> None:
    made, batches = tiny_model(), []
    made.diffusion.backbone.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    options = {"steps": 11, "sampler": "ddim", "spacing": "linspace"}  # times 999, 899.1, ..., 0
    sampled(made, guidance_interval=(0.25, 0.75), **options)
    assert batches == [2, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2]
    batches.clear()
    sampled(made, guidance_interval=(0.25, 0.75), guidance_scale=0.0, **options)
    assert batches == [2, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2]
    batches.clear()
    ratio = [level.sigma / level.alpha for level in made.grid(made.resolved(SampleSettings(**options)))]  # type: ignore
    sampled(made, guidance_interval=(ratio[4], ratio[2]), guidance_interval_unit="sigma", **options)
    assert batches == [2, 2, 4, 4, 4, *[2] * 6]  # both bounds are inside


def test_a_further_evaluation_of_a_step_is_guided_as_the_first() -> None:
    made, batches = tiny_model(), []
    made.diffusion.backbone.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    sampled(made, guidance_interval=(0.25, 0.75), steps=5, sampler="heun", spacing="linspace")
    assert batches == [2, 2, 4, 4, 4, 4, 4, 4, 2]  # times 999 (two), 749.25 (two), 499.5 (two), 249.75 (two), 0


def test_channels_that_are_not_guided_are_those_with_conditions() -> None:
    made = tiny_model()
    batch = made.batch([{"class_id": 1}, {"class_id": 2}], 0)
    conditions, null = made.diffusion.conditioning(batch), made.diffusion.null(batch)
    x, level = torch.randn(2, 2, 8, 8), made.diffusion.path.level(300)
    settings = SampleSettings(guided_channels=1)
    with torch.no_grad():
        plain = made.diffusion.denoiser(conditions)(x, level)
        guided = made.diffusion.denoiser(conditions, null, settings.guidance(3.0, 2))(x, level)
        first = made.diffusion.denoiser(conditions, null, SampleSettings().guidance(3.0, 2))(x, level)
    torch.testing.assert_close(guided[:, 1], plain[:, 1], atol=1e-5, rtol=0)  # batches of two and of four
    assert torch.equal(guided[:, 0], first[:, 0])
    assert not torch.allclose(guided[:, 0], plain[:, 0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["class_id", None])
@pytest.mark.parametrize("window", [None, 8])
def test_a_weak_model_guides_with_and_without_conditions(told: str | None, window: int | None) -> None:
    """The guided output is weak + s (output - weak), also in windows; the model itself as weak one changes nothing."""
    made = tiny_model(told)
    weak = other(made)
    made.with_weak_model("early", weak).with_weak_model("itself", tiny_model(told))
    options = {"window": window, "size": 16, "sampler": "euler", "steps": 4}
    plain = sampled(made, guidance_scale=1, **options).float()
    assert (sampled(made, weak_model="itself", **options) - plain).abs().max() <= 1  # rounded to eight bits
    guided = sampled(made, weak_model="early", **options).float()
    assert (guided - plain).abs().mean() > 1
    x, level = torch.randn(2, 2, 8, 8), made.diffusion.path.level(300)
    batch = made.batch([{"class_id": 1}, {"class_id": 2}] if told else [{}, {}], 0)
    guidance = made._guidance(SampleSettings(guidance_scale=2.5, weak_model="early"))
    with torch.no_grad():
        ours, theirs = (one.diffusion.denoiser(one.diffusion.conditioning(batch))(x, level) for one in (made, weak))
        found = made.diffusion.denoiser(*(one.diffusion.conditioning(batch) for one in (made, weak)), guidance)(
            x, level
        )
    torch.testing.assert_close(found, theirs + 2.5 * (ours - theirs), atol=1e-5, rtol=1e-5)


def test_a_weak_model_may_know_fewer_conditions_and_need_not_be_trained_for_guidance() -> None:
    made, without = tiny_model("class_id", guidance_trained=False), tiny_model(None)
    without.diffusion.first_stage = made.diffusion.first_stage
    made.with_weak_model("without", without)
    assert made.resolved(SampleSettings(weak_model="without"), [{"class_id": 1}]).guidance_scale == 2.0
    assert made.info["weak_models"]["without"]["fingerprint"] == "0123456789abcdef"
    assert sampled(made, weak_model="without").shape == (2, 16, 16, 3)
    with pytest.raises(InputError, match="weak_model=classes takes class_id, which the model does not"):
        without.with_weak_model("classes", made)


def changed(**parts: Any) -> LoadedModel:
    made = tiny_model()
    for name, part in parts.items():
        setattr(made.diffusion, name, part)
    return made


def stage_of_another() -> nn.Module:
    stage = copy.deepcopy(tiny_model().diffusion.first_stage)
    next(stage.parameters()).add_(1.0)
    return stage


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"latent_scale": LatentScale(2.0)}, "latent scale"),
        ({"path": Schedule("cosine")}, "noise schedule"),
        ({"prediction": VPrediction()}, "prediction"),
        ({"first_stage": stage_of_another(), "path": Schedule("linear")}, "first stage and noise schedule"),
    ],
)
def test_a_weak_model_of_something_else_is_refused(parts: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=f"weak_model=w has another {what} than the model; give an earlier checkpoint"):
        tiny_model().with_weak_model("w", changed(**parts))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_interval": (0.8, 0.1)}, r"guidance_interval=0.8..0.1 is no interval of position; give two"),
        ({"guidance_interval": (0.1, 1.5)}, "is no interval of position"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5 is not an interval; give two numbers"),
        ({"guidance_interval": (0.1, "1")}, "guidance_interval='1' is not a finite number"),
        ({"guidance_interval": (0.1, float("inf"))}, "guidance_interval=inf is not a finite number"),
        ({"guidance_interval_unit": "sigma"}, "guidance_interval_unit=sigma needs a guidance_interval; add it"),
        ({"guidance_interval_unit": "time"}, "guidance_interval_unit=time is unknown; choose one of position, sigma"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 is outside 0 .. 1"),
        ({"guided_channels": 0}, "guided_channels=0 is outside 1 and above"),
        ({"guided_channels": 3}, "guided_channels=3: the latent has only 2; lower it"),
        ({"guidance_interval": (0.1, 0.8), "guidance_scale": 1}, r"guidance_interval=0.1..0.8 does nothing at guid"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1}, "guidance_rescale=0.5 does nothing at guidance_scale=1"),
        ({"weak_model": "runs/none", "guidance_scale": 1}, "weak_model=runs/none does nothing at guidance_scale=1"),
        ({"weak_model": "runs/none"}, "weak_model=runs/none cannot be loaded here; add it by model.with_weak_model"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        sampled(tiny_model(), **options)


def test_a_weak_model_takes_the_place_of_a_negative_prompt() -> None:
    made = tiny_model("caption").with_weak_model("early", tiny_model("caption"))
    with pytest.raises(InputError, match="weak_model=early makes no use of negative_prompt; leave out one of them"):
        made.sample(caption=["a"], negative_prompt=["b"], weak_model="early", steps=2)


def test_rescaling_keeps_the_deviation_of_the_output() -> None:
    """With 1 that of the noise predicted with the condition, whatever the scale; with 0.5 half of the way."""
    made = tiny_model()
    batch = made.batch([{"class_id": 1}, {"class_id": 2}], 0)
    conditions, null = made.diffusion.conditioning(batch), made.diffusion.null(batch)
    x, level, spreads = torch.randn(2, 2, 8, 8), made.diffusion.path.level(300), []
    for scale, rescale in ((1.0, None), (9.0, None), (9.0, 0.5), (9.0, 1.0)):
        settings = SampleSettings(guidance_rescale=rescale)
        with torch.no_grad():
            clean = made.diffusion.denoiser(conditions, null, settings.guidance(scale, 2))(x, level)
        spreads.append(((x - level.alpha * clean) / level.sigma).flatten(1).std(1))
    torch.testing.assert_close(spreads[3], spreads[0])
    torch.testing.assert_close(spreads[2], (spreads[0] + spreads[1]) / 2)
    assert (spreads[1] > 1.02 * spreads[0]).all()


def test_the_command_takes_records_and_sweeps_them(tmp_path: Path) -> None:
    words = ["runs/tiny", "1", "--steps", "4", "--guidance-scale", "2", "--guidance-rescale", "0.5"]
    sample_command(
        [*words, "--guidance-interval", "0.1..0.8", "--guided-channels", "1", "--out", str(tmp_path / "one")]
    )
    recorded = read_settings(tmp_path / "one" / "000000.png")
    found = {"guidance_interval": "0.1..0.8", "guidance_rescale": "0.5", "guided_channels": "1"}
    assert {**found, "guidance_interval_unit": "position"}.items() <= recorded.items()
    assert parsed("guidance_interval", recorded["guidance_interval"]) == (0.1, 0.8)
    sample_command([*words, "--sweep", "guidance_interval=0..1,0.2..0.6", "--out", str(tmp_path / "swept")])
    names = {file.name for file in (tmp_path / "swept").iterdir()}
    assert {"000000_guidance_interval-0.0..1.0.png", "000000_guidance_interval-0.2..0.6.png"} <= names
    assert "weak_model" not in recorded
    assert list(variants(SampleSettings(), "weak_model=runs/a,runs/b@raw")[1]) == [
        "_weak_model-runs_a", "_weak_model-runs_b@raw"
    ]  # fmt: skip
    for words, sentence in (
        (["--guidance-interval", "0.5"], "--guidance-interval 0.5 is not an interval"),
        (["--guidance-interval", "0.5..x"], "--guidance-interval x is not a finite number"),
        (["--weak-model", "runs/none"], "--weak-model runs/none cannot be loaded here"),
    ):
        with pytest.raises(InputError, match=sentence):
            sample_command(["runs/tiny", "1", *words, "--out", str(tmp_path / "no")])
