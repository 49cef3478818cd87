"""Run folders: made once, never shared, found again."""

import json
from pathlib import Path

import forked
import pytest

from ldmlab.errors import InputError
from ldmlab.training.run_folder import RunFolder


def make(root: Path) -> None:
    RunFolder.create(root, "toy")


def test_eight_jobs_of_one_second_get_eight_folders(tmp_path: Path) -> None:
    assert forked.finish(*[forked.start(make, tmp_path) for _ in range(8)]) == [0] * 8
    runs = list(tmp_path.glob("toy-*"))
    assert len(runs) == 8
    assert len({json.loads((r / "provenance.json").read_text())["run_id"] for r in runs}) == 8


def intrude(folder: Path) -> None:
    with pytest.raises(InputError, match="is in use by another process"):
        RunFolder.open(folder)


def test_a_second_process_is_told_that_the_folder_is_in_use(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "toy")
    assert forked.finish(forked.start(intrude, run.path)) == [0]
    run.close()
    again = forked.start(RunFolder.open, run.path)
    assert forked.finish(again) == [0]


def test_a_folder_opened_again_keeps_its_id_and_tells_of_every_start(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "exactly-here")
    run.write_config("seed: 0\n")
    run.close()
    again = RunFolder.at(tmp_path / "exactly-here")
    again.close()
    assert again.run_id == run.run_id
    record = json.loads((run.path / "provenance.json").read_text())
    assert len(record["resumed"]) == 1
    assert (run.path / "config.yaml").read_text() == "seed: 0\n"
    assert (run.checkpoints.name, run.samples.name, run.metrics.name) == ("checkpoints", "samples", "metrics.csv")


def test_a_requeued_job_comes_back_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    other = RunFolder.create(tmp_path, "toy")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    mine = RunFolder.create(tmp_path, "toy")
    for run in (other, mine):
        run.close()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert RunFolder.create(tmp_path, "toy").path == mine.path
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert RunFolder.create(tmp_path, "toy").path not in (mine.path, other.path)


def test_names_and_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run.name='a=b/c'"):
        RunFolder.create(tmp_path, "a=b/c")
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files and no run"):
        RunFolder.at(tmp_path)
    with pytest.raises(InputError, match="is not a run folder"):
        RunFolder.open(tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "provenance.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        RunFolder.open(tmp_path / "broken")
