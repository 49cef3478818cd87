"""Every file of conf/diffusion and conf/sampler builds what it says."""

import pytest

from conf_files import conf_names, conf_node
from ldmlab.app.compose import compose, plain
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.schedule import NAMES
from ldmlab.diffusion.time_sampling import ModeTimes
from ldmlab.first_stages.identity import Identity
from ldmlab.inference.sample_settings import SAMPLERS, sampler_by_name
from ldmlab.instantiate import instantiate


class NoBackbone(Identity):
    accepts: frozenset[str] = frozenset({"numbers"})


@pytest.mark.parametrize("name", conf_names("diffusion"))
def test_diffusion(name: str) -> None:
    parts = {"first_stage": Identity(), "latent_scale": LatentScale(), "backbone": NoBackbone(), "conditioners": {}}
    flow = conf_node("diffusion", "flow")
    teacher = {part: flow[part] for part in ("schedule", "prediction")}  # for consistency, which has none of its own
    node = {**teacher, **conf_node("diffusion", name)}
    model = instantiate(node, where="diffusion", **parts, guidance_trained=True)
    if name.startswith("paper_") or name in NAMES:
        assert model.schedule.name == ("scaled_linear" if name.startswith("paper_") else name)
    else:  # a recipe with a path or a loss of its own, which samples with what its path names
        grid = model.path.grid(model.path.solver.steps)
        assert len(grid) == model.path.solver.steps + 1
        noise_to_signal = [level.sigma / level.alpha if level.alpha else float("inf") for level in grid]
        assert noise_to_signal == sorted(noise_to_signal, reverse=True)


@pytest.mark.parametrize("name", conf_names("diffusion"))
def test_options_of_the_page_can_be_given_by_name(name: str) -> None:
    """Offset noise of every objective but those of few steps, zero terminal SNR of every discrete schedule."""
    node = conf_node("diffusion", name)
    assert ("offset_noise" in node) == node["_target_"].endswith("LatentDiffusion")
    if node.get("schedule", {}).get("_target_", "").endswith("schedule.Schedule"):
        assert node["schedule"]["zero_terminal_snr"] is False


def test_another_class_takes_the_place_of_a_file_s() -> None:
    """As docs/objectives.md writes it: options of the class before do not stay."""
    words = "diffusion.time_sampling", "{_target_: ldmlab.diffusion.time_sampling.ModeTimes}"
    given = ["data=shards", "data.train=x", "data.val=x", "data.image_size=8", "diffusion=flow"]
    node = plain(compose("train", [*given, f"~{words[0]}", f"+{words[0]}={words[1]}"]))["diffusion"]["time_sampling"]
    assert isinstance(instantiate(node, where="time_sampling"), ModeTimes)


@pytest.mark.parametrize("name", conf_names("sampler"))
def test_sampler(name: str) -> None:
    sampler = instantiate(conf_node("sampler", name), where="sampler")
    assert name == "auto" or type(sampler) is type(sampler_by_name(name.removesuffix("_eta1")))


def test_every_sampler_has_a_file() -> None:
    assert conf_names("sampler", "ddim_eta1", "auto") == SAMPLERS
