"""Every sampler through the whole model: its own settings, a network told times with a fraction, any company."""

import pytest
import torch

from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SAMPLERS, SampleSettings, sampler_by_name
from sampling_models import tiny_model


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model()


OF_SCHEDULES = [name for name in SAMPLERS if name not in ("ode", "sde")]  # which are for flows


@pytest.mark.parametrize("name", OF_SCHEDULES)
def test_a_image_is_the_same_in_any_company(model: LoadedModel, name: str) -> None:
    options = {"steps": 5, "guidance_scale": 2.0, "sampler": name}
    together = model.sample(class_id=[1, 2, 3], batch_size=3, **options)  # type: ignore[arg-type]
    apart = model.sample(class_id=[1, 2, 3], batch_size=1, **options)  # type: ignore[arg-type]
    assert together.shape == (3, 16, 16, 3)
    assert float((together.int() - apart.int()).abs().max()) <= 1
    assert len({image.numpy().tobytes() for image in together}) == 3


@pytest.mark.parametrize("name", OF_SCHEDULES)
def test_settings_say_what_the_sampler_does(model: LoadedModel, name: str) -> None:
    settings = model.resolved(SampleSettings(sampler=name))
    sampler = sampler_by_name(name)
    assert settings.eta == getattr(sampler, "eta", 0.0)
    assert settings.spacing == sampler.spacing  # type: ignore[attr-defined]
    assert settings.steps == (sampler.steps or 1000)  # type: ignore[attr-defined]
    assert type(settings.build_sampler()) is type(sampler)


def test_an_eta_that_is_asked_for_is_used(model: LoadedModel) -> None:
    options = {"class_id": [1], "steps": 5, "spacing": "karras"}
    euler = model.sample(sampler="euler", **options)  # type: ignore[arg-type]
    quiet = model.sample(sampler="euler_ancestral", eta=0.0, **options)  # type: ignore[arg-type]
    assert torch.equal(quiet, euler)
    assert not torch.equal(model.sample(sampler="euler_ancestral", **options), euler)  # type: ignore[arg-type]
    assert model.resolved(SampleSettings(sampler="euler_ancestral", eta=0.5)).eta == 0.5
