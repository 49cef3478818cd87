"""Runs on a dashboard: refused starts are no runs, distances carry their network's name, damage is one sentence."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "app"))
from test_dashboard import make_run

from ldmlab.app.cli import dispatch
from ldmlab.app.dashboard_page import dashboard
from ldmlab.app.run_records import by_configuration, has_trained, read_runs
from ldmlab.errors import InputError
from ldmlab.report.paper_source import PAPER_FEATURES
from ldmlab.report.render import html, points_csv


def refused(root: Path, kind: str) -> Path:
    """What a start that was refused leaves, by the version."""
    folder = make_run(root, 4, 7, name=f"refused-{kind.replace(' ', '-')}")
    for name in ("metrics.csv", "finished.json"):
        (folder / name).unlink()
    if kind == "head of a table":
        (folder / "metrics.csv").write_text("step,val/psnr\n")
    if kind == "empty table":
        (folder / "metrics.csv").write_text("")
    if kind == "empty checkpoints":
        (folder / "checkpoints").mkdir()
    if kind == "no model.yaml":
        (folder / "model.yaml").unlink()
    if kind == "damaged config":
        (folder / "config.yaml").write_text(":")
    return folder


KINDS = ("no table", "head of a table", "empty table", "empty checkpoints", "no model.yaml", "damaged config")


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_start_is_no_run(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path, 4, 0)
    folder = refused(tmp_path, kind)
    assert [record.path for record in read_runs([tmp_path])] == [run]
    assert [record.path for record in read_runs([run, folder])] == [run]
    assert "1 run of" in dashboard(read_runs([tmp_path])).lead
    with pytest.raises(InputError, match="holds no run that trained a step"):
        dispatch(["dashboard", str(folder), "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_a_run_with_a_checkpoint_alone_has_trained(tmp_path: Path) -> None:
    folder = refused(tmp_path, "empty checkpoints")
    (folder / "checkpoints" / "step_00000002.ckpt").write_bytes(b"")
    assert has_trained(folder)


def evaluated(run: Path, features: str | None, where: str = "") -> None:
    folder = run / "evaluation" / where
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"format_version": 1, "scores": {"fid": {"value": 2.0}, "precision": {"value": 0.25}}}
    content["scores"]["gap"] = {"value": 3.0, "title": "Mean gap"}
    content |= {} if features is None else {"features": {"name": features}}
    (folder / "metrics.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (PAPER_FEATURES, "FID"),
        ("clip run mine", "Fréchet distance"),
        (None, "Fréchet distance"),
        ("open_clip ViT-B-32 openai", "FD-CLIP"),
        ("timm vit_large_patch14_dinov2", "FD-DINOv2"),
    ],
)
def test_a_column_is_called_by_its_network(tmp_path: Path, features: str | None, name: str) -> None:
    run = make_run(tmp_path, 4, 0)
    evaluated(run, features)
    evaluated(run, features, "more")
    page = html(dashboard(read_runs([tmp_path])))
    for title in (name, f"{name}, more", "Precision", "Mean gap"):
        assert f"<th>{title}</th>" in page
    assert "<td>25.0%</td>" in page
    assert "<th>fid" not in page


@pytest.mark.parametrize(
    ("target", "name"), [("Inception2015", "FID"), ("clip_of_run", "Fréchet distance"), ("published_clip", "FD-CLIP")]
)
def test_scores_in_training_are_called_by_the_network_of_the_configuration(
    tmp_path: Path, target: str, name: str
) -> None:
    run = make_run(tmp_path, 4, 0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["callbacks"] = {"scores": {"features": {"_target_": f"ldmlab.metrics.features.{target}"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"<th>{name} in training</th>" in html(dashboard(read_runs([tmp_path])))


def test_points_of_the_comparison_are_called_by_their_network(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4, 0)
    by = {"features": {"name": "clip run mine"}}
    point = {"step": 20, "sampler_steps": 2, "scores": {"fid": {"value": 7.0}}, "scored_by": by}
    (run / "tradeoff.json").write_text(json.dumps({"format_version": 1, "max_steps": 20, "points": [point]}))
    assert "<th>Fréchet distance, 2 sampler steps</th>" in html(dashboard(read_runs([tmp_path])))


def test_factors_stand_in_order_on_a_logarithmic_axis(tmp_path: Path) -> None:
    for factor in (8, 4):
        make_run(tmp_path, factor, 0)
    runs = read_runs([tmp_path])
    assert [label.split(",")[0] for label in by_configuration(runs)] == ["f4", "f8"]
    charts = dict(dashboard(runs).charts())
    chart = charts["Over the downsampling factor"]
    assert (chart.log_x, chart.x_ticks) == (True, (4, 8))
    assert ">4</text>" in chart.svg
    assert ">8</text>" in chart.svg
    assert "downsampling factor,8.0" not in points_csv(dashboard(runs).charts()).replace("downsampling factor,8,", "")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "evaluation/metrics.json", "tradeoff.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"{", b"null", b"x: &a [*a]", b"3", b"\0\0"])
def test_damage_is_one_sentence_or_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path, 4, 0)
    evaluated(run, None)
    (run / name).write_bytes(content)
    sentence = ""
    try:
        html(dashboard(read_runs([run]))).encode()
    except InputError as error:
        sentence = str(error)
    assert sentence or name == "metrics.csv"  # a table without columns that are known
    assert not sentence or (str(run) in sentence and "\n" not in sentence)
