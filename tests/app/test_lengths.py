"""Evaluations of averages of several lengths are refused before the first, and never mixed with those of others."""

from pathlib import Path
from typing import Any

import pytest

from ldmlab.app.lengths import PLAN, begin_lengths, lengths_in
from refusals import refusal


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000004.ckpt").touch()
    return tmp_path / "run"


def options(*lengths: float, **more: Any) -> dict[str, Any]:
    return {"model": "run", "weights": [*lengths], "protocol": {"samples": 8}, "batch_size": 4, **more}


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ((), "weights=[] names no weights"),
        ((0.05, 0.9), "weights=0.9 is not the length of an average"),
        ((0.05, -0.1), "weights=-0.1 is not"),
        ((0.05, 0.10, 0.05), "weights=[0.05, 0.1, 0.05] names a length twice"),
        ((0.05, 0.0500000001), "names a length twice"),  # their folders have one name
    ],
)
def test_lengths_are_checked_before_the_first_is_scored(
    lengths: tuple[float, ...], sentence: str, model: Path, tmp_path: Path
) -> None:
    assert sentence in refusal(lambda: begin_lengths(options(*lengths), model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_more_lengths_are_added_to_evaluations_of_the_same_options_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin_lengths(options(0.05), model, out)
    (out / "report.html").touch()  # of these
    begin_lengths(options(0.05, 0.10, batch_size=8), model, out)
    other = refusal(lambda: begin_lengths(options(0.05, protocol={"samples": 9}), model, out))
    assert "was begun with protocol.samples=8 (now 9)" in other
    (model / "checkpoints" / "step_00000006.ckpt").touch()
    assert "checkpoint=step_00000004 (now step_00000006)" in refusal(lambda: begin_lengths(options(0.1), model, out))


def test_a_report_of_the_users_is_not_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    assert "which would be replaced" in refusal(lambda: begin_lengths(options(0.1), model, tmp_path))


def test_options_with_which_nothing_was_scored_bind_no_others(model: Path, tmp_path: Path) -> None:
    """As where weights of the features are missing; what was scored, or begun by another process, stays."""
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError), lengths_in(options(0.05), model, out):
        raise FileNotFoundError
    assert not out.exists()
    begin_lengths(options(0.05), model, out)
    with pytest.raises(FileNotFoundError), lengths_in(options(0.1), model, out):
        raise FileNotFoundError
    (out / PLAN).unlink()
    (out / "length_0.05").mkdir()
    (out / "length_0.05" / "metrics.json").touch()
    with pytest.raises(FileNotFoundError), lengths_in(options(0.1), model, out):
        raise FileNotFoundError
    assert (out / PLAN).exists()
