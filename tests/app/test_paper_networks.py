"""The networks of the paper's experiments at full size, without weights: they build, and their sizes are right."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_experiments import PAPER, composed, first_stage_experiment, of_stage, released
from torch import nn

from ldmlab.app.conditioning import build_conditioners
from ldmlab.app.plans import latent_spec, sized_backbone
from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis.compvis_conditioners import arguments

COUNTS = json.loads((Path(__file__).parents[1] / "assets" / "official_counts.json").read_text())


@cache
def first_stage(name: str | None) -> nn.Module:
    """Of the experiment that trains it; None: pixels."""
    with torch.device("meta"):
        if name is None:
            return instantiate({"_target_": "ldmlab.first_stages.identity.Identity"}, where="first_stage")
        return instantiate(composed(name)["first_stage"], where="first_stage")


@cache
def counts(name: str) -> dict[str, int]:
    """Parameters of the whole model on the meta device, put together as wiring does, by the official names."""
    config, first = composed(name), first_stage(first_stage_experiment(name))
    latent = latent_spec(first, config["data"]["image_size"])
    nodes = {key: complete(node) for key, node in config["conditioner"].items()}
    with torch.device("meta"):
        conditioners, _ = build_conditioners(nodes, latent)
    return {
        "unet": unet_count(json.dumps(sized_backbone(config["backbone"], latent, conditioners))),
        "first_stage": count(first),
        "conditioner": sum(count(module) for module in conditioners.values()),
    }


@cache
def unet_count(node: str) -> int:
    """Experiments share networks, and building one takes seconds."""
    with torch.device("meta"):
        return count(instantiate(json.loads(node), where="backbone"))


def count(module: nn.Module) -> int:
    """Numbers to train or frozen."""
    return sum(p.numel() for p in module.parameters())


def complete(node: dict[str, Any]) -> dict[str, Any]:
    """With what official files carry beside what is run; published towers from their configuration, not their file."""
    if "pretrained" in node:
        official = {"ViT-L-14": "FrozenCLIPEmbedder", "ViT-H-14": "FrozenOpenCLIPEmbedder"}
        return {**arguments(f"ldm.modules.encoders.modules.{official[node['name']]}", {}), "layer": node["layer"]}
    return {**node, "unused_head": True} if "unused_head" in node else node


@pytest.mark.parametrize("name", of_stage("diffusion"))
def test_a_denoiser_builds_at_full_size(name: str) -> None:
    assert counts(name)["unet"] / 1e6 == pytest.approx(UNETS[name.removeprefix("paper/")], abs=0.0051)


@pytest.mark.parametrize("layout", COUNTS)
def test_a_released_model_has_the_official_counts(layout: str) -> None:
    name = released()[layout]
    if name.startswith("paper/first_stage/"):
        assert {"first_stage": count(first_stage(name))} == COUNTS[layout]
    else:
        assert counts(name) == {"conditioner": 0, **COUNTS[layout]}


@pytest.mark.parametrize("name", of_stage("autoencoder"))
def test_a_first_stage_builds_with_its_factor_and_channels(name: str) -> None:
    module = first_stage(name)
    _, factor, *more = name.rpartition("/")[2].split("_")
    assert module.downsampling == int(factor[1:])
    codes = {option[1:]: option[0] for option in more if option != "noattn"}
    node = composed(name)["first_stage"]
    for number, kind in codes.items():
        assert node["latent_channels" if kind == "c" else "codebook_size"] == int(number)


def test_the_classifier_makes_up_the_printed_total() -> None:
    (name,) = of_stage("classifier")
    config = composed(name)
    with torch.device("meta"):
        module = instantiate(config["classifier"], where="classifier", latent_channels=4)
    total = count(module) + counts("paper/class/imagenet_ldm_8")["unet"]
    assert total / 1e6 == pytest.approx(506, abs=1.0)


def test_super_resolution_is_counted_with_its_first_stage() -> None:
    for name, printed in (("bicubic", 169.0), ("big", 552.0)):
        found = counts(f"paper/super_resolution/{name}")
        assert (found["unet"] + found["first_stage"]) / 1e6 == pytest.approx(printed, rel=0.01)


def test_the_text_and_layout_encoders_have_their_sizes() -> None:
    sizes = {
        "text/ldm_kl_8": 542.9 + 39.1,  # the second for the head that nothing runs
        "text/conceptual_captions": 186.2,
        "layout/openimages_256": 58.86,
        "layout/coco_scratch": 58.86,
    }
    for name, millions in sizes.items():
        assert counts(f"paper/{name}")["conditioner"] / 1e6 == pytest.approx(millions, abs=0.06)


def test_every_experiment_is_looked_at() -> None:
    assert {f"paper/{name}" for name in UNETS} == set(of_stage("diffusion"))
    assert set(PAPER) == {*of_stage("diffusion"), *of_stage("autoencoder"), *of_stage("classifier")}


# Millions of parameters of the U-Net, counted layer by layer from the published widths; those marked are ours.
UNETS = {
    "compression/imagenet_ldm_1": 396.84,
    "compression/imagenet_ldm_2": 390.89,
    "compression/imagenet_ldm_4": 400.92,
    "compression/imagenet_ldm_8": 394.98,
    "compression/imagenet_ldm_16": 395.00,
    "compression/imagenet_ldm_32": 395.11,
    "compression/celebahq_ldm_1": 270.46,
    "compression/celebahq_ldm_2": 264.51,
    "compression/celebahq_ldm_4": 274.06,
    "compression/celebahq_ldm_8": 257.73,
    "compression/celebahq_ldm_16": 257.75,
    "compression/celebahq_ldm_32": 257.86,
    "unconditional/celebahq": 274.06,
    "unconditional/ffhq": 274.06,
    "unconditional/lsun_churches": 294.97,
    "unconditional/lsun_bedrooms": 274.06,
    "class/imagenet_ldm_8": 394.98,
    "class/imagenet_ldm_4": 400.92,
    "class/imagenet_ldm_4_g": 400.92,
    "text/ldm_kl_8": 872.30,
    "text/ldm_kl_8_g": 872.30,
    "text/conceptual_captions": 403.62,
    "text/sd1": 859.52,
    "text/sd2": 865.91,
    "text/sd2_768": 865.91,
    "layout/openimages_256": 246.28,
    "layout/openimages_512": 246.28,
    "layout/coco_scratch": 312.24,
    "layout/coco_finetuned": 246.28,
    "semantic/landscapes_256": 215.23,
    "semantic/landscapes_512": 215.23,
    "super_resolution/bicubic": 113.62,
    "super_resolution/bicubic_longer": 113.62,
    "super_resolution/big": 500.71,  # ours
    "super_resolution/pixel": 113.68,  # ours
    "super_resolution/bsr": 113.62,
    "inpainting/attention": 215.23,
    "inpainting/no_attention": 215.23,
    "inpainting/big": 387.25,
    "inpainting/big_finetuned": 387.25,
    "inpainting/efficiency_ldm_1": 215.23,
    "inpainting/efficiency_kl_4": 215.23,
}
