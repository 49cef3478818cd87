"""A DiT with a flow on the shipped images, by the commands alone: trained, resumed, sampled, scored, exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_small_recipes import EMOJI, SMALL, TINY, TINY_CLIP

from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.evaluate import evaluate
from ldmlab.app.wiring import train
from ldmlab.checkpoints import load_checkpoint
from ldmlab.contracts import Conditioning
from ldmlab.evaluation.flops import flops_of
from ldmlab.inference.sample_settings import SAMPLERS
from ldmlab.instantiate import instantiate
from ldmlab.model_files import write_model_folder
from ldmlab.nn.openclip import build_clip
from refusals import refusal

NARROW = ["backbone.width=32", "backbone.depth=2", "backbone.heads=2", "stage.panel_steps=2", "stage.panel_count=2"]
SHIPPED = [f"data.train={EMOJI}/val", f"data.val={EMOJI}/val"]  # the smaller split serves as both
SCORED = ["protocol.samples=4", "protocol.steps=2", "+protocol.reference_limit=8", "protocol.neighbours=0"]
BY_TOLERANCE = {"dpm_adaptive", "ode"}  # choose their steps, so that --steps is refused or is that of fixed methods


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage and a CLIP of drawn weights, latents of the shipped images, a model of two steps."""
    folder = tmp_path_factory.mktemp("transformer")
    torch.manual_seed(0)
    module, clip = instantiate(TINY, where="first_stage"), build_clip(config=TINY_CLIP)
    spec = {"kind": "first_stage", "image_size": 32, "first_stage": TINY}
    write_model_folder(folder / "first_stage", spec, {"first_stage": module.state_dict()})
    spec = {"kind": "clip", "image_size": 32, "clip": clip.node}
    write_model_folder(folder / "clip", spec, {"clip": clip.model.state_dict()})
    words = [*SHIPPED, "data=emoji", "data.image_size=32", "data.workers=0", f"from_run={folder}/first_stage"]
    assert cli.dispatch(["encode", *words, f"out={folder}/latents"]) == 0
    trained(folder, "run", 2)
    return folder


def trained(root: Path, name: str, steps: int) -> dict:
    """The last checkpoint of experiment=equal_flops/dit_flow, narrow and without its scores."""
    words = [
        *SMALL,
        *NARROW,
        *SHIPPED,
        "logger=csv",
        "callbacks=quiet",
        f"trainer.max_steps={steps}",
        f"run.dir={root / name}",
    ]
    words += [f"data.latents={root}/latents", f"conditioner.text.from_run={root}/clip", "backbone=dit_demo"]
    train(plain(compose("train", ["experiment=demo/cpu_text_to_image", "diffusion=flow", "sampler=auto", *words])))
    return load_checkpoint(root / name / "checkpoints" / f"step_{steps:08d}.ckpt")


def sampled(root: Path, out: str, *words: str, model: str = "run") -> np.ndarray:
    given = [str(root / model), "red apple", "--seed", "3", "--device", "cpu", "--out", str(root / out)]
    assert cli.dispatch(["sample", *given, *words]) == 0
    return np.asarray(Image.open(root / out / "000000.png"))


@pytest.mark.slow
def test_it_resumes_to_the_bit(root: Path) -> None:
    trained(root, "stopped", 2)
    resumed, straight = trained(root, "stopped", 4), trained(root, "straight", 4)
    for part in ("modules", "averaged"):
        for name, found in straight[part].items():
            tensors = found.get("weights", found)
            again = resumed[part][name].get("weights", resumed[part][name])
            assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items()), f"{part}.{name}"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [*SAMPLERS, "sde:form=linear", "ode:method=heun3"])
def test_every_sampler_draws_from_it(root: Path, sampler: str) -> None:
    steps = [] if sampler in BY_TOLERANCE else ["--steps", "3"]
    image = sampled(root, f"by_{sampler.replace(':', '_')}", "--sampler", sampler, "--guidance-scale", "2", *steps)
    assert image.shape == (32, 32, 3)
    assert image.std() > 0


@pytest.mark.slow
def test_what_a_flow_has_no_meaning_for_is_refused(root: Path) -> None:
    for words, reason in (
        (["--spacing", "official"], "is a rule for the paper's discrete schedules"),
        (["--sampler", "ode", "--trajectory"], "has no steps for --trajectory"),
        (["--sampler", "euler", "--eta", "0.5"], "eta"),
    ):
        given = ["sample", str(root / "run"), "red apple", "--steps", "2", "--out", str(root / "none"), *words]
        assert reason in refusal(lambda given=given: cli.dispatch(given))  # type: ignore[misc]
        assert not (root / "none").exists()


@pytest.mark.slow
def test_it_is_scored_and_enters_no_table_of_the_paper(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"model={root}/run", "protocol=demo_emoji", "features=clip_run", f"features.run={root}/clip", *SCORED]
    options += ["protocol.sampler=auto", "~protocol.evaluators", "device=cpu", "keep_reference=false", "wandb=false"]
    evaluate(plain(compose("evaluate", options)))
    result = json.loads((root / "run/evaluation/demo_emoji/metrics.json").read_text())
    assert result["sampling"]["sampler"] == "euler"  # what auto is on a flow
    assert result["model"]["backbone"] == "DiT"
    assert result["model"]["process"] == "LinearPath"
    assert {"fid", "kid"} <= result["scores"].keys()
    assert "none of the paper's systems" in result["paper"]["barred"][0]
    capsys.readouterr()
    assert cli.dispatch(["report", str(root / "run/evaluation/demo_emoji"), "--format", "md"]) == 0
    assert "run is left out: DiT on LinearPath is none of the paper's systems" in capsys.readouterr().out


@pytest.mark.slow
def test_an_export_draws_the_same(root: Path) -> None:
    assert cli.dispatch(["export", "--without-card", str(root / "run"), str(root / "exported")]) == 0
    both = [sampled(root, f"of_{name}", "--steps", "3", model=name) for name in ("run", "exported")]
    assert (both[0] == both[1]).all()


@pytest.mark.slow
def test_the_pair_of_the_comparison_takes_equal_flops() -> None:
    """docs/transformers_and_flows.md: of the denoisers, whose captions come from one frozen encoder."""
    spent = []
    for name in ("unet_paper", "dit_flow"):
        config = plain(compose("train", [f"experiment=equal_flops/{name}"]))
        with torch.device("meta"):
            sizes = {"in_channels": 4, "out_channels": 4, "context_width": 128, "vector_width": None}
            network = instantiate({**config["backbone"], **sizes}, where="backbone")
            told = Conditioning(tokens=torch.empty(1, 32, 128))
            x, t = torch.empty(1, 4, 8, 8), torch.empty(1)
        image = flops_of(lambda: network(x, t, told).sum().backward())  # noqa: B023
        spent.append(image * config["trainer"]["max_steps"] * config["trainer"]["micro_batch"])
    assert spent[0] == pytest.approx(spent[1], rel=0.02)  # the kernel of attention decides how its products are counted
