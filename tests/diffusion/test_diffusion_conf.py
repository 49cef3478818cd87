"""Every file of conf/diffusion and conf/sampler builds what it says."""

import pytest

from conf_files import conf_names, conf_node
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.first_stages.identity import Identity
from ldmlab.inference.sample_settings import SAMPLERS, sampler_by_name
from ldmlab.instantiate import instantiate


class NoBackbone(Identity):
    accepts: frozenset[str] = frozenset()


@pytest.mark.parametrize("name", conf_names("diffusion"))
def test_diffusion(name: str) -> None:
    parts = {"first_stage": Identity(), "latent_scale": LatentScale(), "backbone": NoBackbone(), "conditioners": {}}
    model = instantiate(conf_node("diffusion", name), where="diffusion", **parts, guidance_trained=True)
    assert model.schedule.name == ("scaled_linear" if name.startswith("paper_") else name)


@pytest.mark.parametrize("name", conf_names("sampler"))
def test_sampler(name: str) -> None:
    sampler = instantiate(conf_node("sampler", name), where="sampler")
    assert type(sampler) is type(sampler_by_name(name.removesuffix("_eta1")))


def test_every_sampler_has_a_file() -> None:
    assert conf_names("sampler", "ddim_eta1") == SAMPLERS
