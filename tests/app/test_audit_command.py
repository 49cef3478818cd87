"""The audit from the command line: what it refuses, and an image planted many times in a training set is named."""

import json
import sys
from pathlib import Path

import pytest

from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.wiring import train
from ldmlab.errors import InputError

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from blobs import SIZE, write_blobs

PLANTED, COPIES = 5, 40
OPTIONS = (
    *("trainer.precision=32-true", "trainer.micro_batch=16", "trainer.log_every=50", "logger=csv", "data.workers=0"),
    *("trainer.keep=9", "trainer.averaging_decay=0.9", "lr_schedule.final=1", "data.fields=[class_id]"),
    *("first_stage=identity", "conditioner=class_label", "conditioner.class_label.classes=64"),
    *("conditioner.class_label.width=32", "backbone.model_channels=32", "backbone.channel_mult=[1,2]"),
    *("backbone.attention_downsampling=[]", "stage.panel_steps=2", "stage.panel_count=4", "stage.val_draws=1"),
)


def trained(root: Path, steps: int, every: int) -> Path:
    """A class-conditional model of 30 blobs, one of which lies there 41 times."""
    write_blobs(root / "train", [*range(30), *[PLANTED] * COPIES])
    write_blobs(root / "val", range(1000, 1100))
    data = [f"data.train={root}/train", f"data.val={root}/val", f"data.image_size={SIZE}", f"run.dir={root}/run"]
    often = [f"trainer.max_steps={steps}", f"trainer.checkpoint_every={every}", f"trainer.validate_every={steps}"]
    train(plain(compose("train", ["experiment=mine/text_to_image", *data, *often, *OPTIONS])))
    return root / "run"


@pytest.mark.slow
def test_a_planted_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_REFERENCES", str(tmp_path / "references"))
    run = trained(tmp_path, 600, 200)
    words = ["audit", str(run), "--checkpoints", "--steps", "20", "--samples", "6", "--guidance-scale", "1"]
    assert cli.dispatch([*words, "features.side=16"]) == 0
    result = json.loads((run / "audit" / "audit.json").read_text())
    assert [one["model"]["step"] for one in result["audits"]] == [200, 400, 600]
    last = result["audits"][-1]
    named = next(one for one in last["candidate_list"] if one["caption"] == str(PLANTED))
    assert named["extracted"]
    assert named["duplicates"] == COPIES + 1
    assert last["training"]["images"] == 30 + COPIES
    before = (run / "audit" / "report.html").read_text()
    assert cli.dispatch([*words, "features.side=16"]) == 0  # finished models are read
    assert (run / "audit" / "report.html").read_text() == before
    with pytest.raises(InputError, match="holds an audit with --seed 0"):
        cli.dispatch([*words, "features.side=16", "--seed", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--samples", "65"], "--samples 65 is more than 64"),
        (["run", "--samples", "1"], "--samples 1 must be at least 2"),
        (["run", "--clique", "9"], "--clique 9 is more than --samples 8"),
        (["features.side=8"], "needs a MODEL"),
        (["run", "--features", "pixel"], "pixel"),
        (["run", "--checkpoints"], "run has no checkpoints"),
        (["run", "--quantile", "2"], "--quantile 2.0"),
        (["run", "--steps", "0"], "--steps 0 is outside"),
        (["mistyped"], "mistyped is neither a folder nor a checkpoint"),
        (["mistyped", "--out", "new"], "mistyped is neither a folder nor a checkpoint"),
    ],
)
def test_bad_options_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        cli.dispatch(["audit", *words])
    assert not list(tmp_path.iterdir())


def test_an_audit_that_could_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    for steps in ("1", "2"):  # nor is the second one held to the first one's settings
        with pytest.raises(InputError, match="records no data it was trained on"):
            cli.dispatch(["audit", "emoji", "--steps", steps, "--device", "cpu", "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is no audit"):
        cli.dispatch(["audit", "run", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
