"""evaluate.py's scores reach the W&B run of the model, and nothing that W&B does can spoil an evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldmlab.app.dashboard_page import send_scores
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.wandb_logger import WandB

FIRST_STAGE = {
    "_target_": "ldmlab.first_stages.kl.KLAutoencoder", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1,
    "latent_channels": 2, "norm_groups": 4,
}  # fmt: skip


def evaluation(folder: Path, fid: float) -> Path:
    folder.mkdir(parents=True)
    content = {"format_version": 1, "scores": {"fid": {"value": fid}}}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of a first stage that was trained with W&B, offline."""
    made = RunFolder.create(tmp_path, "toy")
    made.begin()
    node = {"_target_": "ldmlab.training.wandb_logger.WandB", "group": "factors"}
    (made.path / "config.yaml").write_text(
        yaml.safe_dump({"stage": {"name": "autoencoder"}, "logger": {"wandb": node}})
    )
    spec = {"format_version": 1, "kind": "first_stage", "image_size": 8, "first_stage": FIRST_STAGE}
    (made.path / "model.yaml").write_text(yaml.safe_dump(spec))
    made.close()
    return made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, dict[str, Any], dict[str, float]]]:
    """What would go to W&B: id, group, settings, values."""
    calls: list[tuple[str, str | None, dict[str, Any], dict[str, float]]] = []

    def take(self: WandB, run: RunFolder, settings: dict[str, Any], values: Mapping[str, float]) -> None:
        calls.append((run.run_id, self.group, settings, dict(values)))

    monkeypatch.setattr(WandB, "send_scores", take)
    return calls


def test_all_evaluations_of_the_run_go_up_under_its_id(run: RunFolder, sent: list[Any], tmp_path: Path) -> None:
    evaluation(run.path / "evaluation" / "reconstruction", 2.5)
    out = evaluation(tmp_path / "elsewhere", 3.5)
    before = (run.path / "provenance.json").read_text()
    send_scores(run.path, out)
    ((run_id, group, settings, values),) = sent
    assert (run_id, group) == (run.run_id, "factors")
    assert (settings["stage"]["name"], settings["downsampling"]) == ("autoencoder", 2)
    assert values == {"evaluation/reconstruction/fid": 2.5, "evaluation/elsewhere/fid": 3.5}
    assert (run.path / "provenance.json").read_text() == before  # scoring is no start of the run


def test_a_job_of_the_comparison_sends_its_last_points_by_sampler_steps(run: RunFolder, sent: list[Any]) -> None:
    evaluation(run.path / "evaluation" / "step_00000020-50-abc", 7.0)
    points = [(10, 50, 9.0), (20, 50, 7.0), (20, 10, 8.0)]
    job = {
        "format_version": 1, "max_steps": 20,
        "points": [{"step": a, "sampler_steps": b, "scores": {"fid": {"value": c}}} for a, b, c in points],
    }  # fmt: skip
    (run.path / "tradeoff.json").write_text(json.dumps(job))
    send_scores(run.path)
    assert sent[0][3] == {"evaluation/tradeoff_50_steps/fid": 7.0, "evaluation/tradeoff_10_steps/fid": 8.0}


@pytest.mark.parametrize("logger", [{}, {"csv": None}, {"wandb": {"_target_": "x", "mode": "offline"}}])
def test_a_run_without_wandb_has_nothing_sent(run: RunFolder, sent: list[Any], logger: dict[str, Any]) -> None:
    out = evaluation(run.path / "evaluation" / "images", 2.5)
    (run.path / "config.yaml").write_text(yaml.safe_dump({"stage": {"name": "autoencoder"}, "logger": logger}))
    send_scores(run.path, out)
    (run.path / "config.yaml").unlink()  # a model folder
    send_scores(run.path, out)
    assert sent == []


def test_a_failure_of_wandb_is_a_line_and_no_error(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluation(run.path / "evaluation" / "images", 2.5)

    def refuse(*_: Any) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(WandB, "send_scores", refuse)
    send_scores(run.path, out)
    assert "W&B did not take the scores (no route to host); they are in" in capsys.readouterr().err


def test_a_run_that_is_still_training_is_left_alone(
    run: RunFolder, sent: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno
    import fcntl

    out = evaluation(run.path / "evaluation" / "images", 2.5)

    def held(*_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "held")

    monkeypatch.setattr(fcntl, "lockf", held)  # a process does not lock itself out
    send_scores(run.path, out)
    assert sent == []
    assert "is still training" in capsys.readouterr().err
