"""Runs side by side: configurations, means over seeds, the line over factors; the same charts as a view at W&B."""

import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from walk import SMALL, TINY_STAGE, Flow

from ldmlab.app.cli import dispatch
from ldmlab.app.compose import compose, plain
from ldmlab.app.dashboard_page import dashboard, mean_curve
from ldmlab.app.evaluate import curves
from ldmlab.app.run_records import by_configuration, comparison_fields, read_runs
from ldmlab.app.wiring import train
from ldmlab.errors import InputError
from ldmlab.model_files import describe
from ldmlab.report.render import html
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.wandb_logger import WandB

PSNR = {4: 24.0, 8: 21.0}  # by factor


def first_stage(factor: int) -> dict[str, Any]:
    levels = factor.bit_length()
    return {
        "_target_": "ldmlab.first_stages.vq.VQModel",
        **{"channel_mult": [1] * levels, "channels": 8, "num_res_blocks": 1, "norm_groups": 4},
        **{"latent_channels": factor, "codebook_size": 32},
    }


def make_run(root: Path, factor: int, seed: int, *, name: str = "sweep", px: int = 64) -> Path:
    """A finished run folder without weights: nothing here reads them."""
    folder = root / f"{name}-f{factor}-{seed}"
    config = {
        "stage": {"name": "autoencoder"}, "run": {"name": name, "dir": None, "group": name}, "seed": seed,
        "trainer": {"max_steps": 20},
    }  # fmt: skip
    spec = {"format_version": 1, "kind": "first_stage", "image_size": 64, "first_stage": first_stage(factor)}
    (folder / "samples" / "held_out").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "model.yaml").write_text(yaml.safe_dump(spec))
    rows = [f"{step},{PSNR[factor] + seed + step / 10},{step},{400 / step}" for step in (10, 20)]
    head = "step,val/psnr,val/latent_min/0,in_training/fid"
    (folder / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    (folder / "finished.json").write_text("{}")
    noise = np.random.default_rng(seed).integers(0, 256, (px, px, 3), dtype=np.uint8)
    for step in (10, 20):
        Image.fromarray(noise).save(folder / "samples" / "held_out" / f"step_{step:08d}.png")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for factor in (4, 8):
        for seed in (0, 1):
            make_run(tmp_path, factor, seed)
    score = {"format_version": 1, "scores": {"fid": {"value": 12.5}}}
    (tmp_path / "sweep-f4-0" / "evaluation").mkdir()
    (tmp_path / "sweep-f4-0" / "evaluation" / "metrics.json").write_text(json.dumps(score))
    return tmp_path


def test_fields_by_which_runs_are_compared() -> None:
    spec = {"kind": "first_stage", "image_size": 64, "first_stage": first_stage(8)}
    found = comparison_fields(spec)
    assert found.pop("parameters") > 1000
    assert found == {
        "downsampling": 8, "first_stage_kind": "vq", "latent_channels": 8, "codebook_size": 32, "image_size": 64,
        "conditioned_on": None,
    }  # fmt: skip


def test_seeds_of_one_configuration_come_together(sweep: Path) -> None:
    runs = read_runs([sweep, sweep / "sweep-f4-0"])
    assert len(runs) == 4
    labels = by_configuration(runs)
    assert [re.match(r"f\d+, \d channels, [\d,]+ parameters", label) is not None for label in labels] == [True, True]
    assert [sorted(run.seed for run in members) for members in labels.values()] == [[0, 1], [0, 1]]
    assert mean_curve(next(iter(labels.values())), "val/psnr") == [(10.0, 25.5), (20.0, 26.5)]


def test_the_page_has_every_configuration_chart_and_image(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "page" / "dashboard.html"
    assert dispatch(["dashboard", str(sweep), "--out", str(out), "--title", "Factors <4>"]) == 0
    page = out.read_text()
    for factor in (4, 8):
        values = [PSNR[factor] + seed + 2 for seed in (0, 1)]
        assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2g}" in page
    assert "<td>12.50</td>" in page
    assert "<th>Fréchet distance in training</th>" in page
    assert "<th>Fréchet distance</th>" in page  # of evaluate.py, apart from it
    assert (out.parent / "dashboard_points.csv").read_text().count("\n") > 8
    assert "Factors &lt;4&gt;" in page
    assert "Over the downsampling factor" in page
    assert page.count("data:image/webp;base64,") == 4
    assert page.count("step 20") == 4
    assert not re.search(r"(src|href)=\"?https?:", page)


@pytest.mark.slow
def test_forty_runs_stay_under_five_megabytes(tmp_path: Path) -> None:
    for seed in range(20):
        for factor in (4, 8):
            make_run(tmp_path, factor, seed, px=256)
            more = tmp_path / f"sweep-f{factor}-{seed}" / "samples" / "more"
            more.mkdir()
            Image.open(more.parent / "held_out" / "step_00000020.png").save(more / "step_00000020.png")
    page = html(dashboard(read_runs([tmp_path])))
    assert page.count("data:image/webp;base64,") == 80
    assert len(page.encode()) < 5_000_000


def test_a_view_at_wandb_has_the_same_charts(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb_workspaces.workspaces import internal

    sent: list[dict[str, Any]] = []

    def answer(api: Any, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        sent.append(variables)
        return {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}}}

    monkeypatch.setattr(internal, "execute_graphql", answer)
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr("wandb_workspaces.workspaces.interface.get_app_url", lambda api: "https://wandb.example")
    assert dispatch(["dashboard", str(sweep), "--wandb", "me/lab", "--title", "Factors"]) == 0
    assert (sent[0]["entityName"], sent[0]["projectName"], sent[0]["displayName"]) == ("me", "lab", "Factors")
    spec = json.loads(sent[0]["spec"])["section"]
    sections = {section["name"]: section["panels"] for section in spec["panelBankConfig"]["sections"]}
    assert sections.keys() == {"First stages", "Newest images"}
    kinds = [(panel["viewType"], panel["config"].get("metrics")) for panel in sections["First stages"]]
    assert kinds == [
        ("Run History Line Plot", ["val/psnr"]), ("Run History Line Plot", ["in_training/fid"]),
        ("Bar Chart", ["evaluation/fid"]), *[("Scatter Plot", None)] * 3,
    ]  # fmt: skip
    over_factors = [p["config"]["yAxis"] for p in sections["First stages"] if p["viewType"] == "Scatter Plot"]
    assert over_factors == ["summary:val/psnr", "summary:in_training/fid", "summary:evaluation/fid"]
    (runs,) = spec["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["jobType", "downsampling.value", "first_stage_kind.value"]
    assert "sweep" in json.dumps(runs["filters"])
    assert "config:codebook_size" in json.dumps(runs["runFeed"])


def test_without_account_or_package_one_sentence_says_the_way_out(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse() -> None:
        raise wandb.errors.UsageError("No API key configured.\nMore words.")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(InputError, match=r"did not save the view \(No API key configured.\); log in with"):
        dispatch(["dashboard", str(sweep), "--wandb", "me/lab"])
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(InputError, match="pip install wandb-workspaces"):
        dispatch(["dashboard", str(sweep), "--wandb", "me/lab"])
    with pytest.raises(InputError, match="must be ENTITY/PROJECT"):
        dispatch(["dashboard", str(sweep), "--wandb", "lab"])


@pytest.mark.slow
def test_a_run_tells_wandb_what_it_is_compared_by_and_the_page_shows_it(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    def opens(self: WandB, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        opened.append({**settings, "given_group": self.group})
        super(WandB, self).__init__(offline=True, save_dir=run.path)

    monkeypatch.setattr(WandB, "open", opens)
    for name in ("log_metrics", "log_image"):
        monkeypatch.setattr(WandB, name, lambda *_, **__: None)
    small = [option for option in SMALL if not option.startswith("logger")]
    options = [*small, *flow.data, *TINY_STAGE, "logger=wandb", f"run.dir={tmp_path / 'run'}", "run.group=factors"]
    train(plain(compose("train", ["experiment=mine/first_stage", *options])))
    (settings,) = opened
    assert settings["given_group"] == "factors"
    assert (settings["stage"]["name"], settings["downsampling"]) == ("autoencoder", 4)
    assert (settings["first_stage_kind"], settings["parameters"] > 1000) == ("kl", True)
    (record,) = read_runs([tmp_path / "run"])
    assert (record.group, record.step, record.finished) == ("factors", 2, True)
    assert record.fields.items() <= settings.items()
    assert "val/psnr" in html(dashboard([record]))


def test_a_folder_without_runs_and_a_damaged_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        dispatch(["dashboard", str(tmp_path), "--out", str(tmp_path / "page.html")])
    (make_run(tmp_path, 4, 0) / "config.yaml").write_text("stage: {}")
    with pytest.raises(InputError, match=r"config\.yaml cannot be read as a run's"):
        dispatch(["dashboard", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("fault", ["pipe", "bytes"])
def test_numbers_that_cannot_be_read_are_named_and_nothing_waits(tmp_path: Path, fault: str) -> None:
    metrics = make_run(tmp_path, 4, 0) / "metrics.csv"
    metrics.unlink()
    if fault == "pipe":
        os.mkfifo(metrics)
    else:
        metrics.write_bytes(b"\xff\n\xff\n")
    with pytest.raises(InputError, match=r"metrics\.csv cannot be read .*; restore or delete it"):
        dispatch(["dashboard", str(tmp_path), "--out", str(tmp_path / "page.html")])
    if fault == "bytes":  # a page of scores would fail at it after the last image
        with pytest.raises(InputError, match=r"metrics\.csv cannot be read"):
            curves(metrics.parent)


def test_the_damaged_file_of_a_run_is_the_one_that_is_named(tmp_path: Path) -> None:
    (make_run(tmp_path, 4, 0) / "model.yaml").write_text("[")
    with pytest.raises(InputError, match=r"^\S*/model\.yaml cannot be read.*, or leave this run out\.$"):
        dispatch(["dashboard", str(tmp_path), "--out", str(tmp_path / "page.html")])


def test_a_run_copied_without_its_checkpoints_is_no_model(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4, 0)
    for words in (["average", str(run), "--length", "0.1"], ["sample", str(run), "a"]):
        with pytest.raises(InputError, match="is a run without its folder checkpoints"):
            dispatch(words)
    assert describe(run)["kind"] == "first_stage"  # a card is written without them
