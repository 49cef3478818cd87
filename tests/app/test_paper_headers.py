"""Every LDM row of the paper's tables and every released model has an experiment that says so, with its score."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paper_experiments import PAPER, composed, first_stage_experiment, header, of_stage, released, rows, settings

from ldmlab.app.commands.plan import USED, check_first_stage, planned
from ldmlab.report.paper_source import paper_tables

ROOT = Path(__file__).parents[2]
COUNTS = json.loads((ROOT / "tests" / "assets" / "official_counts.json").read_text())
SCORES = ("fid", "r_fid", "fid_2k_epoch6", "preference_score_percent")
BASELINES = {"sr/imagenet-x4/pixel-dm-plus15", "user-study/sr-imagenet/pixel-dm-f1"}  # trained by the authors too


def published() -> dict[str, dict[str, Any]]:
    """The rows of the paper's own models, as table/row."""
    every = {f"{table}/{row['id']}": row for table, content in paper_tables().items() for row in content["rows"]}
    return {name: row for name, row in every.items() if row["is_ldm"] or name in BASELINES}


def test_every_row_of_the_paper_has_an_experiment() -> None:
    named = [row for name in PAPER for row in rows(name)]
    assert sorted(named) == sorted(set(named))
    assert set(named) == set(published())


@pytest.mark.parametrize("name", PAPER)
def test_a_header_tells_the_printed_score_of_its_rows(name: str) -> None:
    told = " ".join(header(name)["Score"])
    for row in rows(name):
        entry = published()[row]
        for key in SCORES:
            if key in entry["metrics"]:
                printed = str(entry.get("printed", {}).get(key, entry["metrics"][key]))
                assert re.search(rf"(?<![\d.]){re.escape(printed)}(?!\d)", told), f"{row}: {key} {printed}"


@pytest.mark.parametrize("name", PAPER)
def test_a_header_is_complete(name: str) -> None:
    told = header(name)
    assert any(f"{line} ".startswith(f"python train.py experiment={name} ") for line in told["commands"])
    assert told["Settings"] == [settings(composed(name))]
    assert told["Cost"]
    assert told["Score"]
    if not name.startswith("paper/first_stage/"):
        assert first_stage_experiment(name) in (None, *of_stage("autoencoder"))


def test_every_released_model_has_an_experiment() -> None:
    assert set(released()) == set(COUNTS)


@pytest.mark.parametrize("name", PAPER)
def test_the_documentation_lists_the_experiment(name: str) -> None:
    lines = (ROOT / "docs" / "experiments.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| `{name.removeprefix('paper/')}` |")]
    for row in rows(name):
        assert f"`{row}`" in line
    for zoo in header(name)["Zoo"]:
        assert zoo.split(" ")[0] in line


PLANNED = {"paper/first_stage/vq_f4_noattn", "paper/class/imagenet_ldm_4", "paper/super_resolution/pixel"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in PLANNED else pytest.mark.slow) for n in PAPER])
def test_a_header_tells_what_the_plan_counts(name: str) -> None:
    config = composed(name)
    check_first_stage(config, [f"experiment={name}"])
    found = planned(config, 79.2, 1)
    peak, micro = found["configured_peak_gib"], config["trainer"]["micro_batch"]
    step = found["tflop_a_step"]
    assert header(name)["Plan"] == [f"{peak:.1f} GiB of an 80 GB card at micro_batch {micro}, {step:.3g} TFLOP a step"]
    assert peak <= USED * 79.2


@pytest.mark.parametrize("name", of_stage("diffusion"))
def test_the_settings_are_those_of_the_paper(name: str) -> None:
    config, key = composed(name), name.removeprefix("paper/")
    trainer, schedule = config["trainer"], config["diffusion"]["schedule"]
    batch, rate, steps, betas, loss, scale = SETTINGS[key]
    assert trainer["global_batch"] == batch
    assert batch % trainer["micro_batch"] == 0
    assert config["optimizer"]["learning_rate"] == pytest.approx(rate)
    assert config["optimizer"]["lr_scaling"] == "none"
    assert trainer["max_steps"] == steps
    assert trainer["averaging_decay"] == 0.9999
    assert (schedule["name"], schedule["start"], schedule["end"], schedule["steps"]) == ("scaled_linear", *betas, 1000)
    assert config["diffusion"]["loss"] == loss
    assert config["stage"]["latent_scale"] == scale


FACES, SCENES, LAYOUTS, TEXT = (0.0015, 0.0195), (0.0015, 0.0155), (0.0015, 0.0205), (0.00085, 0.012)
EPOCH, PLACES = 1_281_167, 1_803_460  # images of ImageNet and of Places365-Standard
SETTINGS: dict[str, tuple[int, float, int, tuple[float, float], str, float | str]] = {
    # batch, rate, steps, betas, loss, latent scale
    "compression/imagenet_ldm_1": (7, 4.9e-5, 2_000_000, FACES, "l2", "measured"),
    "compression/imagenet_ldm_2": (9, 6.3e-5, 2_000_000, FACES, "l2", 1.0),
    "compression/imagenet_ldm_4": (40, 8e-5, 2_000_000, FACES, "l2", 1.0),
    "compression/imagenet_ldm_8": (64, 6.4e-5, 2_000_000, FACES, "l2", 1.0),
    "compression/imagenet_ldm_16": (112, 4.5e-5, 2_000_000, FACES, "l2", 1.0),
    "compression/imagenet_ldm_32": (112, 4.5e-5, 2_000_000, FACES, "l2", 1.0),
    "compression/celebahq_ldm_1": (9, 9e-5, 500_000, FACES, "l2", "measured"),
    "compression/celebahq_ldm_2": (11, 1.1e-4, 500_000, FACES, "l2", 1.0),
    "compression/celebahq_ldm_4": (48, 9.6e-5, 500_000, FACES, "l2", 1.0),
    "compression/celebahq_ldm_8": (96, 9.6e-5, 500_000, FACES, "l2", 1.0),
    "compression/celebahq_ldm_16": (128, 1.3e-4, 500_000, FACES, "l2", 1.0),
    "compression/celebahq_ldm_32": (128, 1.3e-4, 500_000, FACES, "l2", 1.0),
    "unconditional/celebahq": (48, 9.6e-5, 410_000, FACES, "l2", 1.0),
    "unconditional/ffhq": (42, 8.4e-5, 635_000, FACES, "l2", 1.0),
    "unconditional/lsun_churches": (96, 5e-5, 500_000, SCENES, "l1", "measured"),
    "unconditional/lsun_bedrooms": (48, 9.6e-5, 1_900_000, FACES, "l2", 1.0),
    "class/imagenet_ldm_8": (64, 6.4e-5, 2_900_000, FACES, "l2", 1.0),
    "class/imagenet_ldm_4": (1200, 1e-4, 178_000, FACES, "l2", 1.0),
    "class/imagenet_ldm_4_g": (1200, 1e-4, 178_000, FACES, "l2", 1.0),
    "text/ldm_kl_8": (680, 1e-4, 390_000, TEXT, "l2", 0.18215),
    "text/ldm_kl_8_g": (680, 1e-4, 390_000, TEXT, "l2", 0.18215),
    "text/conceptual_captions": (28, 28 * 2e-6, 500_000, FACES, "l2", 1.0),
    "text/sd1": (2048, 1e-4, 194_000, TEXT, "l2", 0.18215),
    "text/sd2": (2048, 1e-4, 550_000, TEXT, "l2", 0.18215),
    "text/sd2_768": (2048, 1e-4, 150_000, TEXT, "l2", 0.18215),
    "layout/openimages_256": (24, 4.8e-5, 4_400_000, LAYOUTS, "l1", 1.0),
    "layout/openimages_512": (24, 4.8e-5, 400_000, LAYOUTS, "l1", 1.0),
    "layout/coco_scratch": (48, 4.8e-5, 170_000, LAYOUTS, "l1", 1.0),
    "layout/coco_finetuned": (24, 4.8e-5, 170_000, LAYOUTS, "l1", 1.0),
    "semantic/landscapes_256": (48, 4.8e-5, 360_000, LAYOUTS, "l1", 1.0),
    "semantic/landscapes_512": (8, 8e-6, 100_000, LAYOUTS, "l1", 1.0),
    "super_resolution/bicubic": (64, 6.4e-5, 860_000, SCENES, "l2", 1.0),
    "super_resolution/bicubic_longer": (64, 6.4e-5, round(15 * EPOCH / 64), SCENES, "l2", 1.0),
    "super_resolution/big": (64, 6.4e-5, 860_000, SCENES, "l2", 1.0),
    "super_resolution/pixel": (64, 6.4e-5, 860_000 + round(15 * EPOCH / 64), SCENES, "l2", "measured"),
    "super_resolution/bsr": (64, 6.4e-5, 860_000, SCENES, "l2", 1.0),
    "inpainting/attention": (128, 1.28e-4, 360_000, LAYOUTS, "l1", 1.0),
    "inpainting/no_attention": (128, 1.28e-4, 360_000, LAYOUTS, "l1", 1.0),
    "inpainting/big": (128, 1.28e-5, 50_000, LAYOUTS, "l1", 1.0),
    "inpainting/big_finetuned": (128, 1.28e-5, round(PLACES / 2 / 128), LAYOUTS, "l1", 1.0),
    "inpainting/efficiency_ldm_1": (128, 1.28e-4, round(6 * PLACES / 128), LAYOUTS, "l1", "measured"),
    "inpainting/efficiency_kl_4": (128, 1.28e-4, round(6 * PLACES / 128), LAYOUTS, "l1", "measured"),
}
