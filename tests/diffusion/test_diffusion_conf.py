"""Every file of conf/diffusion and conf/sampler builds what it says."""

from pathlib import Path

import pytest
import yaml

from ldmlab.diffusion.latent_scale import LatentScale
from ldmlab.first_stages.identity import Identity
from ldmlab.instantiate import instantiate
from ldmlab.samplers import sampler_by_name, sampler_names

CONF = Path(__file__).parents[2] / "conf"


class NoBackbone(Identity):
    accepts: frozenset[str] = frozenset()


@pytest.mark.parametrize("path", sorted((CONF / "diffusion").glob("*.yaml")), ids=lambda path: path.stem)
def test_diffusion(path: Path) -> None:
    parts = {"first_stage": Identity(), "latent_scale": LatentScale(), "backbone": NoBackbone(), "conditioners": {}}
    model = instantiate(yaml.safe_load(path.read_text()), where="diffusion", **parts, guidance_trained=True)
    assert model.schedule.name == path.stem


@pytest.mark.parametrize("path", sorted((CONF / "sampler").glob("*.yaml")), ids=lambda path: path.stem)
def test_sampler(path: Path) -> None:
    assert type(instantiate(yaml.safe_load(path.read_text()), where="sampler")) is type(sampler_by_name(path.stem))


def test_every_sampler_has_a_file() -> None:
    assert sampler_names() == sorted(path.stem for path in (CONF / "sampler").glob("*.yaml"))
