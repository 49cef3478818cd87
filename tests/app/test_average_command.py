"""Averages of any length from a run: as a model, as weights of samples, as a curve of scores."""

import csv
from pathlib import Path

import pytest
from walk import Flow

import ldmlab
from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.evaluate import evaluate
from ldmlab.model_files import read_model
from refusals import refusal


@pytest.fixture(scope="module")
def run(flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with a snapshot of two lengths after each."""
    out = tmp_path_factory.mktemp("averages") / "run"
    more = ["callbacks=power_averages", "callbacks.power_averages.every=1", "trainer.max_steps=4", "trainer.keep=9"]
    flow.denoiser(*more, "optimizer.learning_rate=1e-3", f"run.dir={out}")
    return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights=.*snapshots")
def test_a_length_is_a_model_of_its_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["average", str(run), "--length", "0.10"]) == 0
    made = run / "averages/length_0.1-step_00000004"
    assert f"{made}: average of length 0.1 at step 4, from 8 snapshots of lengths 0.05, 0.1" in capsys.readouterr().out
    model = ldmlab.load(made)
    assert model.info["weights"] == "average of length 0.1"
    assert ldmlab.load(run, weights=0.1).info["fingerprint"] == model.info["fingerprint"]
    earlier = run / "checkpoints/step_00000002.ckpt"
    assert cli.dispatch(["average", str(earlier), str(tmp_path / "early"), "--length", "0.05"]) == 0
    assert read_model(tmp_path / "early").step == 2
    assert ldmlab.load(tmp_path / "early").info["fingerprint"] != model.info["fingerprint"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights=.*snapshots")
def test_scores_over_lengths(flow: Flow, run: Path, tmp_path: Path) -> None:
    small = ["protocol.samples=8", "protocol.steps=1", "protocol.neighbours=2", "protocol.metrics.kid.subset_size=4"]
    options = [f"model={run}", "features=clip_run", f"features.run={flow.root}/clip", f"out={tmp_path / 'out'}"]
    words = [*options, *small, "protocol=images", "device=cpu", "wandb=false", "weights=[0.05,0.15]"]
    evaluate(plain(compose("evaluate", words)))
    rows = list(csv.DictReader((tmp_path / "out/lengths.csv").open()))
    assert [row["length"] for row in rows] == ["0.05", "0.15"]
    assert rows[0]["kid"] != rows[1]["kid"]
    assert "<svg" in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/length_0.15/report.html").is_file()


@pytest.mark.slow
def test_what_has_no_snapshots_is_refused(flow: Flow, run: Path) -> None:
    def refused(*words: str) -> str:
        return refusal(lambda: cli.dispatch(list(words)))

    assert "has no snapshots of averages up to step 2" in refused("average", f"{flow.root}/model", "--length", "0.1")
    assert "--length=0.9 is not the length of an average" in refused("average", str(run), "--length", "0.9")
    wrong = refused("sample", str(run), "a", "--weights", "best")
    assert wrong == "--weights best is unknown; choose averaged, raw, or the length of an average such as 0.10."
