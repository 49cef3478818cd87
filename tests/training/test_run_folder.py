"""Run folders: made once, never shared, found again."""

import json
from pathlib import Path

import forked
import pytest

from ldmlab.errors import InputError
from ldmlab.training.run_folder import RunFolder


def make(root: Path) -> None:
    RunFolder.create(root, "toy").begin()


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
    run.begin()
    assert forked.finish(forked.start(intrude, run.path)) == [0]
    run.close()
    again = forked.start(RunFolder.open, run.path)
    assert forked.finish(again) == [0]


def test_a_folder_opened_again_keeps_its_id_and_tells_of_every_start(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "exactly-here")
    run.begin()
    run.write_config("seed: 0\n")
    run.close()
    again = RunFolder.at(tmp_path / "exactly-here")
    again.begin()
    again.close()
    assert again.run_id == run.run_id
    record = json.loads((run.path / "provenance.json").read_text())
    assert len(record["resumed"]) == 1
    assert (run.path / "config.yaml").read_text() == "seed: 0\n"
    assert (run.checkpoints.name, run.samples.name, run.metrics.name) == ("checkpoints", "samples", "metrics.csv")


def test_a_requeued_job_comes_back_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    other = RunFolder.create(tmp_path, "toy")
    other.begin()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    mine = RunFolder.create(tmp_path, "toy")
    mine.begin()
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


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_folder_is_made_when_the_run_begins_and_a_failed_start_leaves_none(tmp_path: Path) -> None:
    for run in (RunFolder.create(tmp_path, "toy"), RunFolder.at(tmp_path / "exact")):
        assert not run.path.exists()
        run.begin()
        run.write_config("seed: 0\n")
        run.discard()
        run.close()
    (tmp_path / "empty").mkdir()
    run = RunFolder.at(tmp_path / "empty")
    run.begin()
    run.discard()
    run.close()
    assert contents(tmp_path) == {"empty": None}


@pytest.mark.parametrize("begun", [False, True])
def test_an_older_run_is_never_removed(begun: bool, tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "run")
    run.begin()
    run.write_config("seed: 0\n")
    run.close()
    (run.path / ".lock").unlink()
    before = contents(run.path)
    again = RunFolder.at(run.path)
    if begun:
        again.begin()
    again.discard()
    again.close()
    if begun:
        assert before.keys() | {".lock"} == contents(run.path).keys()
    else:
        assert before == contents(run.path)


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "[1]", "null", "7", '"text"', "{}", '{"run_id": 7}', "\udcff", "[" * 9999]
)
def test_checkpoints_are_enough_to_go_on(record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "toy-0123abcd"
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / "step_00000003.ckpt").touch()
    (path / "provenance.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    run = RunFolder.at(path)
    run.begin()
    run.close()
    assert run.run_id == "0123abcd"
    assert "provenance.json is missing or damaged" in capsys.readouterr().err
    again = RunFolder.at(path)
    again.close()
    assert again.run_id == "0123abcd"
    assert capsys.readouterr().err == ""


def test_a_lost_record_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000003.ckpt").touch()
    (tmp_path / "run" / "wandb" / "offline-run-20260101_000000-feedbeef").mkdir(parents=True)
    run = RunFolder.open(tmp_path / "run")
    run.begin()
    run.close()
    assert json.loads((run.path / "provenance.json").read_text())["run_id"] == "feedbeef"


def test_a_restarted_attempt_of_torchrun_comes_back_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    first = RunFolder.create(tmp_path, "toy")
    first.begin()
    first.close()
    again = RunFolder.create(tmp_path, "toy")
    assert again.path != first.path  # another start of the same agent's command
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    restarted = RunFolder.create(tmp_path, "toy")
    assert restarted.path == first.path
    restarted.close()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert RunFolder.create(tmp_path, "toy").path != first.path
