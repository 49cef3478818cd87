"""callbacks=scores in whole runs: the numbers are those of evaluate.py, and the run is the one without them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from walk import SMALL, TINY_CLIP, TINY_STAGE, TINY_UNET, Flow

import ldmlab
from ldmlab.app.cli import dispatch
from ldmlab.app.compose import compose, plain
from ldmlab.app.evaluate import evaluate
from ldmlab.app.wiring import train
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError

ROOT = Path(__file__).parents[2]
KID = "metrics.kid.subset_size=4"
PROTOCOL = ["samples=8", "steps=2", KID]


def scores(flow: Flow, *more: str) -> list[str]:
    """The options of a run that is scored at each of its two steps."""
    chosen = ["callbacks=scores", f"callbacks.scores.features.run={flow.root}/clip", "callbacks.scores.every=1"]
    chosen += [f"callbacks.scores.protocol.{option}" for option in PROTOCOL]
    return [*chosen, "callbacks.scores.keep_reference=false", *more]


def weights(run: Path) -> dict[str, Any]:
    content = load_checkpoint(run / "checkpoints" / "step_00000002.ckpt")
    return {name: content[name] for name in ("modules", "averaged", "optimizers", "rng")}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def record(run: Path, step: int = 2) -> dict[str, Any]:
    text = (run / "in_training" / f"step_{step:08d}" / "metrics.json").read_text()
    return json.loads(text)  # type: ignore[no-any-return]


def evaluated(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """evaluate.py's scores of a checkpoint."""
    words = [f"model={model}/checkpoints/step_00000002.ckpt", "features=clip_run", f"out={out}", "device=cpu", *options]
    evaluate(plain(compose("evaluate", words)))
    return json.loads((out / "metrics.json").read_text())["scores"]  # type: ignore[no-any-return]


def twice(flow: Flow, stage: str, name: str) -> tuple[Path, Path]:
    """The walk's stage with and without scores, both in one new process, as a person's are."""
    code = "import sys; from pathlib import Path; from walk import Flow; import torch; torch.set_num_threads(1)\n"
    code += f"run = Flow(Path({str(flow.root)!r})).{stage}\n"
    code += f"run(out='bare_{name}')\nrun(*{scores(flow)!r}, out='scored_{name}')"
    path = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return flow.root / f"bare_{name}", flow.root / f"scored_{name}"


@pytest.fixture(scope="module")
def pair(flow: Flow) -> tuple[Path, Path]:
    """The walk's denoiser again, without scores and scored at each step."""
    return twice(flow, "denoiser", "model")


@pytest.fixture(scope="module")
def scored(pair: tuple[Path, Path]) -> Path:
    return pair[1]


@pytest.mark.slow
def test_a_denoiser_is_scored_as_evaluate_does_and_trains_as_without(
    flow: Flow, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    bare, scored = pair
    assert equal(weights(scored), weights(bare))
    words = [f"features.run={flow.root}/clip", "protocol=in_training", *(f"protocol.{option}" for option in PROTOCOL)]
    expected = evaluated(scored, tmp_path / "whole", *words)
    found = record(scored)
    assert found["in_training"] == {"step": 2, "samples": 8}
    for name in ("fid", "kid"):
        assert found["scores"][name]["value"] == pytest.approx(expected[name]["value"], rel=1e-5)
    rows = list(csv.DictReader((scored / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[1]["in_training/fid"]) == pytest.approx(expected["fid"]["value"], rel=1e-5)
    (best,) = (scored / "checkpoints").glob("best*")
    step = min((1, 2), key=lambda step: record(scored, step)["scores"]["fid"]["value"])
    assert best.name.startswith(f"best_step_{step:08d}_fid_")


@pytest.mark.slow
def test_a_first_stage_is_scored_by_its_reconstructions(flow: Flow, tmp_path: Path) -> None:
    bare, run = twice(flow, "first_stage", "stage")
    assert equal(weights(run), weights(bare))
    words = [f"features.run={flow.root}/clip", "protocol=reconstruction", "protocol.reference_limit=8"]
    expected = evaluated(run, tmp_path / "whole", *words, f"protocol.{KID}")
    assert record(run)["scores"]["fid"]["value"] == pytest.approx(expected["fid"]["value"], rel=1e-4)
    assert next((run / "checkpoints").glob("best*")).name.split("_")[3] == "fid"


@pytest.mark.slow
def test_two_processes_score_as_one_does(flow: Flow, tmp_path: Path) -> None:
    once = [*scores(flow), "trainer.max_steps=1", "optimizer.learning_rate=1e-9"]
    flow.first_stage(*once, out="scored_alone")
    small = [option for option in SMALL if not option.startswith("trainer.micro_batch")]
    options = ["experiment=mine/first_stage", *small, *flow.data, *TINY_STAGE, *once, "trainer.micro_batch=4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "train.py"), *options, f"run.dir={tmp_path / 'together'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    alone, together = (record(run, 1) for run in (flow.root / "scored_alone", tmp_path / "together"))
    assert together["in_training"] == alone["in_training"]
    for name in ("fid", "kid"):
        assert together["scores"][name]["value"] == pytest.approx(alone["scores"][name]["value"], rel=1e-3), name


@pytest.mark.slow
def test_a_sharded_run_is_validated_scored_resumed_loaded_and_exported(flow: Flow, tmp_path: Path) -> None:
    """Scores and samples are those of its last checkpoint in one process."""
    small = [option for option in SMALL if not option.startswith("trainer.micro_batch")]
    given = [f"data.latents={flow.root}/latents", f"conditioner.text.from_run={flow.root}/clip", *TINY_UNET]
    options = ["experiment=mine/text_to_image", *small, *flow.data, *given, *scores(flow), "trainer.micro_batch=4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "train.py"), *options, "trainer=fsdp", "trainer.accelerator=cpu"]
    for steps in (1, 2):
        words = [*command, f"run.dir={tmp_path / 'run'}", f"trainer.max_steps={steps}", "callbacks.panels.every=1"]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert "resuming from step 1" in result.stdout + result.stderr
    words = [f"features.run={flow.root}/clip", "protocol=in_training", *(f"protocol.{option}" for option in PROTOCOL)]
    expected = evaluated(tmp_path / "run", tmp_path / "scored", *words)
    assert record(tmp_path / "run")["scores"]["fid"]["value"] == pytest.approx(expected["fid"]["value"], rel=1e-3)
    assert dispatch(["export", "--without-card", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    run, model = (ldmlab.load(tmp_path / name, device="cpu") for name in ("run", "model"))
    ask = {"caption": ["red circle"], "steps": 2, "seed": 3}
    assert torch.equal(run.sample(**ask), model.sample(**ask))


@pytest.mark.slow
def test_scores_of_a_training_never_stand_beside_full_ones(scored: Path, tmp_path: Path) -> None:
    folder = scored / "in_training" / "step_00000002"
    assert dispatch(["report", str(folder)]) == 0  # a page of its own it has
    assert "scored while training, on 8 samples" in (folder / "report.md").read_text()
    for words in (["--format", "md"], ["--out", str(tmp_path / "page")]):
        with pytest.raises(InputError, match=r"was scored while training, on 8 samples"):
            dispatch(["report", str(folder), str(folder.parent / "step_00000001"), *words])
    assert not (tmp_path / "page").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "+PLACE.protocol.neighbours=2",
            r"callbacks\.scores\.protocol\.neighbours=2 is for evaluate\.py alone",
        ),
        (
            "PLACE.protocol.metrics.kid.subset_size=9",
            r"callbacks\.scores\.protocol\.metrics\.kid\.subset_size=9 is more than the 8 generated images at hand",
        ),
        ("PLACE.protocol.steps=3", r"steps=3"),
        ("PLACE.precision=float8", r"precision=float8 is unknown"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_step(flow: Flow, option: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        flow.denoiser(*scores(flow), option.replace("PLACE", "callbacks.scores"), out="refused")
    assert not list(flow.root.glob("refused/checkpoints"))


@pytest.mark.slow
def test_a_stage_that_makes_no_images_is_refused(flow: Flow, tmp_path: Path) -> None:
    options = ["experiment=mine/clip", *SMALL, *flow.data, *TINY_CLIP, *scores(flow), f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(InputError, match="stage=clip makes no images to score; use callbacks=default"):
        train(plain(compose("train", options)))
