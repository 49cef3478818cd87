"""W&B without an account: ids, groups, tags, steps and policy, read back from the files that would be synced."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldmlab.checkpoints import save_checkpoint
from ldmlab.errors import InputError
from ldmlab.training.checkpointing import Checkpoints
from ldmlab.training.loggers import close_all, log_images
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.wandb_logger import WandB

SETTINGS = {
    "stage": {"name": "diffusion"}, "seed": 0, "downsampling": 4, "first_stage_kind": "vq", "latent_channels": 3,
    "codebook_size": 8192, "parameters": 1000,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def start(run: RunFolder, step: int, **options: Any) -> None:
    """Two steps with numbers, a grid of 1800 x 1200 px, and the end; W&B's own process writes until its teardown."""
    import wandb

    logger = WandB(**options)
    logger.open(run, SETTINGS, step)
    for at in (step + 1, step + 2):
        logger.log_metrics({"loss": 1.0 / at}, at)
    log_images([logger], "samples", torch.zeros(6, 600, 600, 3, dtype=torch.uint8), step + 2)
    close_all([logger], "success")
    wandb.teardown()


def folders(run: RunFolder) -> list[Path]:
    """What `wandb sync` would be given, oldest first."""
    return sorted((run.path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)


def records(folder: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = next(folder.glob("*.wandb")).read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the end of a block is filled up
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_two_jobs_of_a_sweep_are_two_runs_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    first, second = RunFolder.create(tmp_path, "sweep"), RunFolder.create(tmp_path, "sweep")
    for run, step in ((first, 0), (second, 0), (first, 2)):
        start(run, step, group="factors", tags=["mine"])
    assert [len(folders(run)) for run in (first, second)] == [2, 1]
    for run in (first, second):
        steps = []
        for folder in folders(run):
            found = list(records(folder))
            begun = next(record.run for record in found if record.HasField("run"))
            assert (begun.run_id, begun.run_group, begun.job_type) == (run.run_id, "factors", "diffusion")
            assert set(begun.tags) == {"mine", "diffusion", "f4", "vq"}
            given = [item for record in found if record.HasField("config") for item in record.config.update]
            config = {item.key: json.loads(item.value_json) for item in given}
            assert config.items() >= SETTINGS.items()
            steps += [record.history.step.num for record in found if record.HasField("history")]
        assert steps == ([1, 2, 3, 4] if run is first else [1, 2])


def test_nothing_but_numbers_and_small_panels_is_ready_to_go_up(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "toy")
    save_checkpoint(Checkpoints(run.checkpoints).path(2), {"step": 2})
    start(run, 0, panel_px=256)
    (folder,) = folders(run)
    files = [path for path in (folder / "files").rglob("*") if path.is_file()]
    assert [(path.parent.name, path.suffix) for path in files] == [("images", ".png")]
    assert max(Image.open(files[0]).size) == 256
    assert files[0].stat().st_size < 100_000
    kinds = {record.WhichOneof("record_type") for record in records(folder)}
    assert not kinds & {"artifact", "use_artifact", "output", "output_raw", "tbrecord"}
    assert not any((tmp_path / "home").rglob("*"))


def test_scores_of_an_evaluation_join_the_run_under_its_id_and_keep_its_numbers(tmp_path: Path) -> None:
    import wandb

    run = RunFolder.create(tmp_path, "toy")
    start(run, 0, group="factors")
    run.metrics.write_text("step,loss,val/loss\n1,1,\n2,0.5,0.75\n3,0.25,\n")
    WandB(group="factors").send_scores(run, SETTINGS, {"evaluation/images/fid": 12.5})
    wandb.teardown()
    found = list(records(folders(run)[-1]))
    begun = next(record.run for record in found if record.HasField("run"))
    assert (begun.run_id, begun.run_group, begun.job_type) == (run.run_id, "factors", "diffusion")
    updates = [item for record in found if record.HasField("summary") for item in record.summary.update]
    summary = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    expected = {"evaluation/images/fid": 12.5, "loss": 0.25, "val/loss": 0.75, "trainer/global_step": 3}
    assert summary.items() >= expected.items()
    assert not any(record.HasField("history") for record in found)  # no second row of a step


@pytest.mark.parametrize("upload", ["last", "best"])
def test_after_five_saves_one_artifact_goes_up(tmp_path: Path, upload: str) -> None:
    run = RunFolder.create(tmp_path, "toy")
    saved = Checkpoints(run.checkpoints, keep=1)
    for step in range(1, 6):
        save_checkpoint(saved.path(step), {"step": step})
        note = {"name": "fid", "value": 9.5 - step, "step": step}
        save_checkpoint(saved.best_path(note), {"step": step})
        saved.prune(note)
    start(run, 0, upload=upload)
    artifacts = [record.artifact for record in records(folders(run)[0]) if record.HasField("artifact")]
    names = [[entry.path for entry in artifact.manifest.contents] for artifact in artifacts]
    assert names == [["step_00000005.ckpt" if upload == "last" else "best_step_00000005_fid_4.5.ckpt"]]
    assert not any((tmp_path / "home").rglob("*"))


def test_a_run_of_a_wandb_sweep_has_the_agents_id_also_without_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path, "sweep")
    with monkeypatch.context() as agent:
        agent.setenv("WANDB_SWEEP_ID", "sweep123")
        agent.setenv("WANDB_RUN_ID", "agent456")
        start(run, 0)
    start(run, 2)
    begun = [next(record.run for record in records(folder) if record.HasField("run")) for folder in folders(run)]
    assert [(item.run_id, item.sweep_id) for item in begun] == [("agent456", "sweep123"), ("agent456", "")]


@pytest.mark.parametrize("option", [{"mode": "ofline"}, {"upload": "all"}, {"panel_px": 0}])
def test_a_wrong_choice_is_one_sentence(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"logger.wandb.{next(iter(option))}="):
        WandB(**option)


@pytest.mark.parametrize(("tags", "expected"), [("baseline", ["baseline"]), (["a", "b"], ["a", "b"]), ("", [""])])
def test_one_tag_is_one_tag(tags: Any, expected: list[str]) -> None:
    assert list(WandB(tags=tags).tags) == expected


@pytest.mark.parametrize(
    ("mode", "variables", "expected", "said"),
    [
        (None, {}, "offline", False),
        (None, {"WANDB_MODE": "online"}, "online", False),
        (None, {"WANDB_MODE": "dryrun"}, "offline", False),
        (None, {"WANDB_DISABLED": "true"}, "disabled", False),
        (None, {"WANDB_DISABLED": "false", "WANDB_MODE": "offline"}, "offline", False),
        ("online", {"WANDB_MODE": "disabled"}, "online", True),
        ("offline", {"WANDB_DISABLED": "1"}, "offline", True),
        ("offline", {"WANDB_MODE": "offline"}, "offline", False),
    ],
)
def test_wandbs_variables_are_honoured_or_contradicted_aloud(
    mode: str | None,
    variables: dict[str, str],
    expected: str,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert WandB(mode=mode).mode == expected
    assert ("is used, not" in capsys.readouterr().err) == said
