"""`ldmlab card`: what is filled in from a run, what a person must write, and what is given away with neither."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from walk import Flow

from ldmlab import distributed
from ldmlab.app.card_facts import collect
from ldmlab.app.cli import dispatch
from ldmlab.build import load
from ldmlab.model_files import CONFIG
from refusals import refusal

WRITTEN = {
    "intended_use": "Tests of this very program.",
    "limits": ["Two steps of training.", "16 px."],
    "risks": "None that we know.",
    "licence": "MIT",
    "attribution": "Images: a stranger's folder",
}
SCORE = {"value": 0.125, "spread": None, "marks": []}
EVALUATION = {  # what `evaluate` writes, as far as a card reads it
    "format_version": 2,
    "scores": {"kid": SCORE},
    "model": {"path": "/home/someone/runs/model", "weights": "averaged"},
    "protocol": {"name": "images"},
    "sampling": {"images": 8, "steps": 2, "sampler": "ddim", "guidance_scale": 1.0, "hardware": "CPU"},
    "reference": {"folder": "/data/val", "images": 11, "split": "val", "image_size": 16, "manifest_hash": "ab" * 32},
    "features": {"name": "clip", "weights_hash": "cd"},
    "neighbours": {"copies": None, "bar": None, "pairs": [{"sample": "a.png"}]},
}

SHARES = {"copies": 0.25, "held_out_copies": 0.125, "extracted": 0.5}
AUDIT = {  # what `audit` writes, as far as a card reads it
    "advice": ["stop at step 1"],
    "audits": [{"label": "model-step_2", **{name: {"value": value} for name, value in SHARES.items()}}],
}


@pytest.fixture
def run(flow: Flow, tmp_path: Path) -> Path:
    """A copy of the denoiser's run, with one evaluation."""
    shutil.copytree(flow.root / "model", tmp_path / "run")
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "metrics.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "run" / "audit").mkdir()
    (tmp_path / "run" / "audit" / "audit.json").write_text(json.dumps(AUDIT))
    return tmp_path / "run"


def section(readme: Path, title: str) -> str:
    return readme.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_a_card_is_filled_from_the_run_its_parts_and_the_person(
    run: Path, flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = run / "README.md"
    assert dispatch(["card", str(run), str(flow.root / "first_stage")]) == 0
    assert "fill in intended_use, limits, risks, licence, attribution" in capsys.readouterr().out
    assert "Not stated yet" in section(readme, "Limits")
    (run / "card.yaml").write_text(yaml.safe_dump(WRITTEN))
    assert dispatch(["card", str(run)]) == 0  # the first stage's facts are kept
    assert "fill in" not in capsys.readouterr().out
    assert "Two steps of training.\n\n16 px." in section(readme, "Limits")
    manifest = json.loads((flow.packed / "train" / "manifest.json").read_text())
    images = sum(shard["samples"] for shard in manifest["shards"])
    assert f"| first stage: train | {images} | {manifest['source']} |" in section(readme, "Data")
    weights = sum(p.numel() for p in load(run, device="cpu").diffusion.backbone.parameters())
    assert f"| denoiser | {weights:,} | 2 | 16 |" in section(readme, "Cost")  # 2 steps of 8 images
    assert "| optimizer.learning_rate | 0.001 |" in section(readme, "Training of the denoiser")
    assert "0.125" in section(readme, "Scores: model by images")
    assert "No held-out set" in section(readme, "Memorisation")
    assert "| model-step_2 | 25.0% | 12.5% | 50.0% |" in section(readme, "Memorisation")
    assert "stop at step 1" in section(readme, "Memorisation")
    assert "/home" not in readme.read_text() + (run / "card.json").read_text()
    assert str(flow.root) not in readme.read_text() + (run / "card.json").read_text()


def test_the_run_with_whose_weights_a_part_began_is_in_the_card(run: Path, flow: Flow, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(flow.root / "first_stage", second)
    config = yaml.safe_load((second / CONFIG).read_text())
    checkpoint = next((flow.root / "first_stage" / "checkpoints").glob("step_*.ckpt"))
    (second / CONFIG).write_text(yaml.safe_dump({**config, "init_from": str(checkpoint)}))
    assert dispatch(["card", str(run), str(second)]) == 0
    readme = run / "README.md"
    assert f"| began with the weights of | {checkpoint.name} |" in section(readme, "Training of the first stage")
    torch_version = f"| torch | {torch.__version__.partition('+')[0]}"
    assert torch_version in section(readme, "Training of the first stage, 1 before")
    assert "| first stage, 1 before |" in section(readme, "Cost")
    assert distributed.hardware() in section(readme, "Cost")  # the processor by its name
    assert distributed.hardware() != "CPU" or not Path("/proc/cpuinfo").exists()


def test_so_is_the_run_that_made_the_model_folder_with_whose_weights_a_part_began(
    run: Path, flow: Flow, tmp_path: Path
) -> None:
    assert dispatch(["card", str(run), str(flow.root / "first_stage")]) == 0
    (run / "card.yaml").write_text(yaml.safe_dump(WRITTEN))
    assert dispatch(["export", str(run), str(tmp_path / "model")]) == 0
    for name in ("first_stage", "model"):
        began = flow.root / name if name == "first_stage" else run
        shutil.copytree(began, tmp_path / f"second_{name}")
        config = yaml.safe_load((began / CONFIG).read_text())
        changed = yaml.safe_dump({**config, "init_from": str(tmp_path / "model")})
        (tmp_path / f"second_{name}" / CONFIG).write_text(changed)
    assert dispatch(["card", str(tmp_path / "second_model"), str(tmp_path / "second_first_stage")]) == 0
    cost = section(tmp_path / "second_model" / "README.md", "Cost")
    for part in ("denoiser", "first stage"):
        assert f"| {part} |" in cost
        assert f"| {part}, 1 before |" in cost
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "second_model" / "card.json").unlink()
    assert dispatch(["card", str(tmp_path / "second_model")]) == 0
    assert "1 before" not in section(tmp_path / "second_model" / "README.md", "Cost")


def test_the_card_prints_the_data_sheet_that_the_run_recorded(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    data["train"]["sheet"] = {"hash": "ab" * 32, "licences": {"MIT": 40, "CC BY 4.0": 13}, "sources": {"us": 53}}
    (run / "data.json").write_text(json.dumps(data))
    assert dispatch(["card", str(run)]) == 0
    found = section(run / "README.md", "Data")
    assert "abababababab" in found
    assert "| CC BY 4.0 | 13 |" in found


def test_a_model_is_given_away_with_a_card_or_by_a_word(run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), str(tmp_path / "out")]
    sentence = refusal(lambda: dispatch(words))
    assert "leaves intended_use, limits, risks, licence, attribution empty" in sentence
    assert "--without-card" in sentence
    (run / "card.yaml").write_text(yaml.safe_dump({**WRITTEN, "risks": " "}))
    assert "leaves risks empty" in refusal(lambda: dispatch(words))
    assert not (tmp_path / "out").exists()
    assert dispatch([*words, "--without-card"]) == 0
    assert "has no model card" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "data.json").read_bytes() == (run / "data.json").read_bytes()


def test_an_exported_folder_keeps_its_card(run: Path, tmp_path: Path) -> None:
    (run / "card.yaml").write_text(yaml.safe_dump(WRITTEN))
    assert dispatch(["export", str(run), str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "README.md").read_text()
    assert "exported by ldmlab: averaged weights of step 2" in before
    assert collect(tmp_path / "out") == collect(run)
    shutil.rmtree(run)
    assert dispatch(["card", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("limit: x", "limit, which is no field of a model card; did you mean limits?"),
        ("limits: 3", "limits=3 is no text and no list of texts"),
        ("limits: [3]", "is no text and no list of texts"),
        ("limits: {a: b}", "is no text and no list of texts"),
        ("limits: [", "cannot be read"),
    ],
)
def test_a_card_that_cannot_be_read(content: str, sentence: str, run: Path) -> None:
    (run / "card.yaml").write_text(content)
    assert sentence in refusal(lambda: dispatch(["card", str(run)]))
    assert not (run / "README.md").exists()


def test_a_folder_with_nothing_for_a_card(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no run, no metrics.json" in refusal(lambda: dispatch(["card", str(run), str(tmp_path / "empty")]))
    assert "model.yaml" in refusal(lambda: dispatch(["card", str(tmp_path / "empty")]))
    (run / "card.json").write_text("[]")
    assert "is damaged" in refusal(lambda: dispatch(["card", str(run)]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("card.json", '{"runs": null}'),
        ("card.json", '{"runs": {"clip": {}}}'),
        ("card.json", '{"audit": NaN}'),
        ("data.json", "[]"),
        ("data.json", '{"train": {}}'),
        ("provenance.json", '{"packages": 3}'),
        ("metrics.csv", "step,images\ninf,3\n"),
        ("config.yaml", "trainer: 3"),
        ("audit/audit.json", '{"audits": [{}], "advice": []}'),
        ("evaluation/metrics.json", '{"format_version": 2, "scores": {}}'),
    ],
)
def test_damaged_facts_are_named_and_nothing_is_written(name: str, content: str, run: Path) -> None:
    (run / name).write_text(content)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert str(run) in refusal(lambda: dispatch(["card", str(run)]))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_names_of_others_are_no_markup_and_own_sections_stay(run: Path) -> None:
    spec = yaml.safe_load((run / "model.yaml").read_text())
    spec["conditioners"] = {"<script>x": {}}
    del spec["guidance_trained"]
    (run / "model.yaml").write_text(yaml.safe_dump(spec))
    assert dispatch(["card", str(run)]) == 0
    head = (run / "README.md").read_text().partition("\n## ")[0]
    assert "\\<script>x; classifier-free guidance: unknown" in head
    (run / "README.md").write_text("# Mine\n\n## How it was made\n\nBy hand.\n")
    for _ in range(2):
        assert dispatch(["card", str(run)]) == 0
        text = (run / "README.md").read_text()
        assert text.startswith("# Mine\n\n## How it was made\n\nBy hand.\n\n## Intended use\n")
        assert text.count("## Intended use") == 1


def test_an_export_carries_no_file_that_a_link_points_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine alone")
    (run / "data.json").unlink()
    (run / "data.json").symlink_to(tmp_path / "secret")
    assert "is a link" in refusal(lambda: dispatch(["export", str(run), str(tmp_path / "out"), "--without-card"]))
    assert not (tmp_path / "out").exists()
