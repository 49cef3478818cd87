"""One folder a run, NAME-ID with a random ID, made once and locked while a process works in it.

Finding a folder writes nothing in it; `begin` makes it, once everything that can be refused has been checked.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ldmlab import distributed
from ldmlab.disks import FileLock, disk_errors
from ldmlab.errors import InputError
from ldmlab.files import read_json, write_json, write_text
from ldmlab.provenance import provenance

_RECORD = "provenance.json"
FINISHED = "finished.json"  # in the folder of a run that reached its last step


class RunFolder:
    """The folder of a run's files; the first process chooses and locks it, the others follow."""

    def __init__(self, path: Path, run_id: str, lock: FileLock | None = None, lock_existed: bool = True) -> None:
        self.path, self.name = path, path.name
        self.checkpoints, self.metrics, self.samples = path / "checkpoints", path / "metrics.csv", path / "samples"
        self.run_id = run_id  # also the id of the W&B run
        self._lock = lock  # held; None: held by the first process, or not yet taken
        self._began = False
        self._before: Literal["run", "absent", "empty"] = "run"  # what the folder was when `begin` was called
        self._lock_is_new = lock is not None and not lock_existed

    @staticmethod
    def create(root: Path | str, name: str) -> "RunFolder":
        """A new folder `root/NAME-ID`, or the one that this SLURM job made before it was requeued."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", str(name)):
            raise InputError(f"run.name={name!r} becomes a folder name; use letters, digits, dots, dashes.")
        return _decided(lambda: _requeued(Path(root), name) or _fresh(Path(root), name))

    @staticmethod
    def open(path: Path | str) -> "RunFolder":
        """A folder that a run has made before."""
        return _decided(lambda: _existing(Path(path)))

    @staticmethod
    def at(path: Path | str) -> "RunFolder":
        """Exactly this folder: a run found in it is resumed; an absent or empty folder becomes a new run."""
        return _decided(lambda: _exactly(Path(path)))

    def begin(self) -> None:
        """Make the folder if it is new, and record this start; from here on files are written to it."""
        distributed.shared(self._begin)

    def _begin(self) -> None:
        if self._lock is None:
            existed = self.path.exists()
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            if _is_run(self.path):
                raise InputError(
                    f"{self.path} has become another process's run; run the command again to continue there."
                )
            self._before = "empty" if existed else "absent"
        self._began = True
        now = {**provenance(), **_jobs(), "hardware": distributed.hardware()}
        record = _record(self.path)
        if record:
            resumed = record.get("resumed")
            record["resumed"] = [*(resumed if isinstance(resumed, list) else []), now]
        write_json(self.path / _RECORD, record or {"run_id": self.run_id, **now})

    def discard(self) -> None:
        """Remove what `begin` made, after a start that failed before its first step; an older run stays."""
        before, self._before = self._before, "run"
        if before == "absent":
            shutil.rmtree(self.path, ignore_errors=True)
        elif before == "empty":
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def write_config(self, text: str) -> None:
        """The resolved configuration of the run, as yaml."""
        if distributed.rank() == 0:
            write_text(self.path / "config.yaml", text)

    def has_checkpoints(self) -> bool:
        """Whether a run is resumed here; equal in every process."""
        return distributed.from_first(any(self.checkpoints.glob("step_*.ckpt")))

    def finish(self, step: int) -> None:
        """Record that the last step was reached; an existing record of it is not changed."""
        if distributed.rank() == 0 and not (self.path / FINISHED).exists():
            write_text(self.path / FINISHED, f'{{"step": {step}}}\n')

    def lock(self) -> None:
        """Take the folder for this process; InputError while another one holds it."""
        self._lock = _lock(self.path)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release(remove=self._lock_is_new and not self._began)
            self._lock = None


def _lock(path: Path) -> FileLock:
    """The lock of a folder, taken; InputError while another process holds it."""
    lock = FileLock(path / ".lock")
    if not lock.take():
        raise InputError(f"{path} is in use by another process ({lock.holder()}); wait for it or choose another run.")
    return lock


def _decided(choose: Callable[[], RunFolder]) -> RunFolder:
    """The first process chooses and locks; its result, folder or error, is sent to every process."""
    distributed.join()
    chosen: list[RunFolder] = []

    def names() -> tuple[Path, str]:
        chosen.append(choose())
        return chosen[0].path, chosen[0].run_id

    path, run_id = distributed.shared(names)
    return chosen[0] if chosen else RunFolder(path, run_id)


def _fresh(root: Path, name: str) -> RunFolder:
    run_id = secrets.token_hex(4)
    return _fresh(root, name) if (root / f"{name}-{run_id}").exists() else RunFolder(root / f"{name}-{run_id}", run_id)


def _existing(path: Path) -> RunFolder:
    if not _is_run(path):
        raise InputError(f"{path} is not a run folder (it has no {_RECORD}); give a folder that a training run made.")
    locked_before = (path / ".lock").exists()
    lock = _lock(path)
    record = _record(path)
    return RunFolder(path, record["run_id"] if record else _recovered_id(path), lock, locked_before)


def _exactly(path: Path) -> RunFolder:
    if _is_run(path):
        return _existing(path)
    if path.exists() and (not path.is_dir() or any(p.name != ".lock" for p in path.iterdir())):
        raise InputError(f"run.dir={path} holds other files and no run; choose an empty or absent folder.")
    return RunFolder(path, secrets.token_hex(4))


def _is_run(path: Path) -> bool:
    """Whether a folder is a run: it has a record in any state, or checkpoints."""
    return (path / _RECORD).is_file() or any((path / "checkpoints").glob("step_*.ckpt"))


def _record(path: Path) -> dict[str, Any] | None:
    """The record of earlier starts; None where it is missing or damaged; checkpoints are enough to resume."""
    record = read_json(path / _RECORD)
    return record if isinstance(record, dict) and isinstance(record.get("run_id"), str) else None


def _recovered_id(path: Path) -> str:
    """The id of a run whose record is lost: of its folder's name or its W&B run, else a new one."""
    distributed.say(
        f"{path / _RECORD} is missing or damaged; the run continues from its checkpoints with a new record."
    )
    names = [path.name, *(entry.name for entry in path.glob("wandb/*run-*"))]
    found = [match[1] for name in names if (match := re.search(r"-([0-9a-f]{8})$", name))]
    return found[0] if found else secrets.token_hex(4)


def _jobs() -> dict[str, str | None]:
    """What this process belongs to: the same after a requeue or restart, different for every task of an array.

    Of torchrun the agent that starts the workers, since the id of the rendezvous is often `none`.
    """
    job, run = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID")
    return {
        "slurm_job": job and f"{job}/{os.environ.get('SLURM_STEP_ID', '')}",
        "torchrun": run and f"{run}/{os.uname().nodename}/{os.getppid()}",
    }


def _requeued(root: Path, name: str) -> RunFolder | None:
    """The folder this job made before SLURM or torchrun stopped and started it again."""
    counts = {"slurm_job": "SLURM_RESTART_COUNT", "torchrun": "TORCHELASTIC_RESTART_COUNT"}
    mine = {kind: job for kind, job in _jobs().items() if job and int(os.environ.get(counts[kind], "0"))}
    for path in sorted(root.glob(f"{name}-*")) if mine else []:
        record = _record(path) or {}
        if any(record.get(kind) == job for kind, job in mine.items()):
            return _existing(path)
    return None
