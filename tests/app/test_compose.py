"""Composition: precedence, and errors that name the nearest choice."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldmlab.app.compose import compose, group_choices
from ldmlab.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sede=1", "sede: there is no such option; did you mean seed?"),
        ("trainer.max_step=5", "trainer.max_step: there is no such option; did you mean trainer.max_steps?"),
        ("backbone=unet_smal", "backbone=unet_smal: there is no such file in conf/backbone/; did you mean unet_small?"),
        ("bakbone=unet_small", "bakbone: there is no such option; did you mean backbone?"),
        ("seed==", "the command line"),
    ],
)
def test_a_typo_is_one_sentence_with_the_nearest_name(override: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        compose("train", [override])
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_command_line_beats_debug_beats_experiment_beats_groups() -> None:
    experiment = group_choices("experiment")[0]
    plain, debugged = (
        compose("train", [f"experiment={experiment}"]),
        compose("train", [f"experiment={experiment}", "debug=fast"]),
    )
    assert plain.trainer.max_steps != 8
    assert debugged.trainer.max_steps == 8
    assert compose("train", [f"experiment={experiment}", "debug=fast", "trainer.max_steps=3"]).trainer.max_steps == 3


@pytest.mark.parametrize("door", ["train", "evaluate"])
def test_cfg_job_resolve_prints_the_whole_configuration(door: str) -> None:
    command = [sys.executable, f"{door}.py", "--cfg", "job", "--resolve"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "seed:" in result.stdout
    assert "${" not in result.stdout


def test_the_doors_end_with_exit_code_2_on_hydras_own_errors() -> None:
    command = [sys.executable, "train.py", "stage=difusion"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "ldmlab: stage=difusion: there is no such file in conf/stage/; did you mean diffusion?"
    )
