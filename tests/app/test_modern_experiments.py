"""conf/experiment/modern: what the headers say, the networks at full size, two steps at reduced width."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_experiments import composed, first_stage_experiment, header, rows, settings
from test_paper_runs import VOCABULARY, asked, narrow_conditioner, narrow_first_stage

import ldmlab
from ldmlab.app.commands.plan import USED, planned
from ldmlab.app.compose import group_choices
from ldmlab.app.conditioning import build_conditioners
from ldmlab.app.plans import latent_spec, sized_backbone
from ldmlab.app.wiring import train
from ldmlab.instantiate import instantiate
from ldmlab.model_files import write_model_folder
from ldmlab.report.paper_source import all_tables, paper_tables
from scenes import write_scenes

ROOT = Path(__file__).parents[2]
PHASES = "modern/dc_ae_"  # see test_deep_compression_experiments.py
FIRST_STAGES = ["modern/va_vae_f16c32"]
ALL = [n for n in group_choices("experiment") if n.startswith("modern/") and not n.startswith(PHASES)]
MODERN = [name for name in ALL if name not in FIRST_STAGES]
LATER = {f"{table}/{row['id']}": row for table, found in all_tables().items() for row in found["rows"]}
POSITIONS = 256 * 1152  # a parameter of the official files that is not trained
OFFICIAL = {  # parameters of denoiser and label table, as the authors' programs count them
    "modern/dit_xl_2": 675_129_632,
    "modern/sit_xl_2": 675_129_632,
    "modern/sit_xl_2_repa": 675_129_632,
    "modern/urepa_ldm_4": 400_920_579,
    "modern/lightningdit_xl_1": 675.26e6,  # its log has two digits
    "modern/edm2_s": 280e6,
    "modern/sd3_medium": 2_028_328_000,
}
FAST = {"modern/sit_xl_2"}
SMALL = {
    "DiT": {"width": 32, "depth": 2, "heads": 2},
    "MMDiT": {"width": 32, "depth": 2, "heads": 2, "position_grid": 32},
    "UNet": {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_downsampling": [2]},
    "EDM2UNet": {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "head_channels": 16},
}


@pytest.mark.parametrize("name", ALL)
def test_a_header_is_complete(name: str) -> None:
    told = header(name)
    assert any(line.startswith(f"python train.py experiment={name} ") for line in told["commands"])
    assert told["Settings"] == [settings(composed(name))]
    assert told["Cost"]
    assert told["assumed"]
    assert name in FIRST_STAGES or first_stage_experiment(name) is not None
    scores = " ".join(told["Score"])
    for row in rows(name):
        assert re.search(rf"FID {re.escape(str(LATER[row]['metrics']['fid']))}(?!\d)", scores), row
    (line,) = [x for x in (ROOT / "docs/experiments.md").read_text().splitlines() if x.startswith(f"| `{name}` |")]
    assert all(f"`{row}`" in line for row in rows(name))


def test_rows_of_later_systems_are_no_rows_of_the_paper() -> None:
    named = [row for name in ALL for row in rows(name)]
    assert len(named) == len(set(named))
    assert all(row.startswith("published/") for row in named)
    assert not [name for name in paper_tables() if name.startswith("published/")]
    assert all(row["origin"] for name, row in LATER.items() if name.startswith("published/"))


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """Denoiser and conditioners at full size on the meta device."""
    config = composed(name)
    nodes = config["conditioner"]
    if name == "modern/sd3_medium":  # in place of the encoders: tokens 4,096 wide and a pooled vector of 2,048
        nodes = {"text": {"_target_": "ldmlab.conditioners.class_label.ClassEmbedder", "classes": 1, "width": 4096}}
        pooled = {"_target_": "ldmlab.conditioners.class_label.ClassEmbedder", "classes": 1, "slot": "vector"}
        nodes["pooled"] = {**pooled, "width": 2048}
    with torch.device("meta"):
        first_stage = instantiate(config["first_stage"], where="first_stage")
        latent = latent_spec(first_stage, config["data"]["image_size"])
        conditioners, _ = build_conditioners(nodes, latent)
        node = sized_backbone(config["backbone"], latent, conditioners, config["diffusion"])
        return instantiate(node, where="backbone"), conditioners


@pytest.mark.parametrize("name", MODERN)
def test_a_network_has_the_official_count(name: str) -> None:
    network, conditioners = built(name)
    count = sum(p.numel() for p in network.parameters())
    if "dit" in name or "sit" in name:
        count += POSITIONS + sum(p.numel() for module in conditioners.values() for p in module.parameters())
    assert count == pytest.approx(OFFICIAL[name], rel=2e-3 if name == "modern/edm2_s" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALL, *(n for n in group_choices("experiment") if n.startswith(PHASES))])
def test_a_header_tells_what_the_plan_counts(name: str) -> None:
    config = composed(name)
    found = planned(config, 79.2, 1)
    peak, micro = found["configured_peak_gib"], config["trainer"]["micro_batch"]
    step = found["tflop_a_step"]
    assert header(name)["Plan"] == [f"{peak:.1f} GiB of an 80 GB card at micro_batch {micro}, {step:.3g} TFLOP a step"]
    assert peak <= USED * 79.2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modern")
    write_scenes(folder / "train", 6, size=(72, 64))
    write_scenes(folder / "val", 4, size=(72, 64))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return folder


def reduced(name: str, root: Path) -> dict[str, Any]:
    """The experiment on the scenes with narrow networks and two steps; all else as it is."""
    config = composed(name)
    node, folder = narrow_first_stage(config["first_stage"]), root / name.replace("/", "-")
    torch.manual_seed(0)
    weights = instantiate(node, where="first_stage").state_dict()
    write_model_folder(folder, {"kind": "first_stage", "image_size": 64, "first_stage": node}, {"first_stage": weights})
    config |= {"from_run": str(folder), "logger": {}}
    config["run"]["dir"] = str(root / "runs" / name)
    config["data"] |= {"train": f"{root}/train", "val": f"{root}/val", "image_size": 64, "workers": 0}
    config["trainer"] |= {"max_steps": 2, "micro_batch": 2, "global_batch": None, "precision": "32-true"}
    config["trainer"] |= {"log_every": 1, "validate_every": 2, "checkpoint_every": 2}
    config["stage"] |= {"panel_steps": 2, "panel_count": 2, "val_draws": 1}
    config["backbone"] |= SMALL[config["backbone"]["_target_"].rpartition(".")[2]]
    config["conditioner"] = {key: narrow_conditioner(one, root) for key, one in config["conditioner"].items()}
    if config["encoder"]:  # one that comes along
        clip = {"_target_": "ldmlab.encoders.clip_patches.ClipPatches", "from_run": str(ROOT / "models/emoji/clip")}
        config |= {"encoder": {"clip": clip}, "alignment": {**config["alignment"], "hidden": 16}}
    if "power_averages" in config["callbacks"]:
        config["callbacks"]["power_averages"]["every"] = 1
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in MODERN])
def test_an_experiment_trains_and_serves(name: str, root: Path) -> None:
    config = reduced(name, root)
    train(config)
    model = ldmlab.load(config["run"]["dir"])
    sampler = config["sampler"]["_target_"].rpartition(".")[2].lower()
    scale = config["stage"]["guidance_scale"]
    images = model.sample(**asked(model.reads, 64), steps=2, sampler=sampler, guidance_scale=scale)
    assert images.shape == (1, 64, 64, 3)
