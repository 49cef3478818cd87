"""Composition: precedence, and errors that name the nearest choice."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldmlab.app.cli import dispatch
from ldmlab.app.commands.config import origins
from ldmlab.app.compose import check_words, compose, group_choices
from ldmlab.app.hydra_main import hydra_main
from ldmlab.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sede=1", "sede: there is no such option; did you mean seed?"),
        ("trainer.max_step=5", "trainer.max_step: there is no such option; did you mean trainer.max_steps?"),
        ("backbone=unet_smal", "backbone=unet_smal: there is no such file in conf/backbone/; did you mean unet_small?"),
        ("bakbone=unet_small", "bakbone: there is no such option; did you mean backbone?"),
    ],
)
def test_a_typo_is_one_sentence_with_the_nearest_name(override: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        compose("train", [override])
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_an_option_that_no_file_states_is_told_how_to_be_added() -> None:
    with pytest.raises(InputError) as caught:
        compose("evaluate", ["protocol.max_bad=0.5"])
    way = "no file has this option, but its part takes it; write +protocol.max_bad=VALUE."
    assert str(caught.value) == f"protocol.max_bad: {way}"
    assert compose("evaluate", ["+protocol.max_bad=0.5"]).protocol.max_bad == 0.5


@pytest.mark.slow
def test_command_line_beats_debug_beats_experiment_beats_groups() -> None:
    experiment = group_choices("experiment")[0]
    plain, debugged = (
        compose("train", [f"experiment={experiment}"]),
        compose("train", [f"experiment={experiment}", "debug=fast"]),
    )
    assert plain.trainer.max_steps != 8
    assert debugged.trainer.max_steps == 8
    assert compose("train", [f"experiment={experiment}", "debug=fast", "trainer.max_steps=3"]).trainer.max_steps == 3


def test_every_option_names_the_file_that_set_it() -> None:
    given = ["experiment=demo/cpu_clip", "debug=fast", "seed=7", "+optimizer.fused=true"]
    found = {origin.key: origin for origin in origins("train", given)}
    assert found["trainer.max_steps"][1:] == (8, "conf/debug/fast.yaml")
    assert found["data.image_size"][1:] == (32, "conf/experiment/demo/cpu_clip.yaml")
    assert found["run.dir"].file == "conf/train.yaml"
    assert found["data.mix"].file == "conf/data/emoji.yaml"
    assert found["seed"][1:] == (7, "the command line")
    assert found["optimizer.fused"].file == "the command line"
    assert all(origin.file for origin in found.values())


def test_the_config_command_prints_values_with_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["config", "train", "stage=clip", "--only", "stage"]) == 0
    assert capsys.readouterr().out.split() == ["stage.name", "=", "clip", "#", "conf/stage/clip.yaml"]
    with pytest.raises(InputError, match="no option begins so"):
        dispatch(["config", "train", "--only", "nothing"])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_cfg_job_resolve_prints_the_whole_configuration(program: str) -> None:
    command = [sys.executable, f"{program}.py", "--cfg", "job", "--resolve"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "seed:" in result.stdout
    assert "${" not in result.stdout


def test_programs_end_with_exit_code_2_on_hydras_own_errors() -> None:
    command = [sys.executable, "train.py", "stage=difusion"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "ldmlab: stage=difusion: there is no such file in conf/stage/; did you mean diffusion?"
    )


@pytest.mark.parametrize(
    ("words", "several", "expected"),
    [
        (["seed=range(1,0)"], True, "seed=range(1,0) lists no value"),
        (["run.dir=x", "seed=1,2"], True, "run.dir=x is one folder for several runs"),
    ],
)
def test_several_runs(words: list[str], several: bool, expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        check_words(words, several=several)


def test_a_group_without_a_file() -> None:
    with pytest.raises(InputError, match="trainer=null: a group takes the name of a file"):
        compose("train", ["trainer=null"])


def test_flags_between_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "mine.yaml").write_text("_target_: a.B\n")
    monkeypatch.setattr(sys, "argv", ["train", "seed=3", "--config-dir", str(tmp_path), "backbone=mine"])
    seen: list[Any] = []
    hydra_main("train", seen.append)
    assert (seen[0].seed, seen[0].backbone["_target_"]) == (3, "a.B")
