"""One folder a run, NAME-ID with a random ID, made once and locked while a process works in it."""

import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.provenance import provenance

FINISHED = "finished.json"  # in a run folder that reached its last step
_RECORD = "provenance.json"


class RunFolder:
    """The place of a run's files; the first process decides and locks, the others are told."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self.run_id = run_id  # also the id of the W&B run
        self._lock: IO[str] | None = None

    @staticmethod
    def create(root: Path | str, name: str) -> "RunFolder":
        """A new folder `root/NAME-ID`, or the one that this SLURM job made before it was requeued."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise InputError(f"run.name={name!r} becomes a folder name; use letters, digits, dots, dashes.")
        return _decided(lambda: _requeued(Path(root), name) or _fresh(Path(root), name))

    @staticmethod
    def open(path: Path | str) -> "RunFolder":
        """A folder that a run has made before."""
        return _decided(lambda: _existing(Path(path)))

    @staticmethod
    def at(path: Path | str) -> "RunFolder":
        """Exactly this folder: a run found in it goes on, an absent or empty one becomes a run."""
        return _decided(lambda: _exactly(Path(path)))

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The table of logged numbers."""
        return self.path / "metrics.csv"

    @property
    def samples(self) -> Path:
        """Where images drawn while training lie."""
        return self.path / "samples"

    def write_config(self, text: str) -> None:
        """The resolved configuration of the run, as yaml."""
        if distributed.rank() == 0:
            (self.path / "config.yaml").write_text(text)

    def lock(self) -> None:
        """Take the folder for this process; InputError when another one holds it."""
        file = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until `close`
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader workers would inherit that one
        except OSError as error:
            file.close()
            raise InputError(f"{self.path} is in use by another process; wait for it or choose another run.") from error
        self._lock = file

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _decided(choose: Callable[[], RunFolder]) -> RunFolder:
    """The first process chooses and locks; what it found, folder or refusal, reaches every process."""
    distributed.join()
    chosen: list[RunFolder] = []

    def names() -> tuple[Path, str]:
        chosen.append(choose())
        return chosen[0].path, chosen[0].run_id

    path, run_id = distributed.shared(names)
    return chosen[0] if chosen else RunFolder(path, run_id)


def _fresh(root: Path, name: str) -> RunFolder:
    root.mkdir(parents=True, exist_ok=True)
    while True:
        run_id = secrets.token_hex(4)
        path = root / f"{name}-{run_id}"
        try:
            path.mkdir()  # exclusive: two runs of one second cannot meet
        except FileExistsError:
            continue
        return _started(RunFolder(path, run_id))


def _started(run: RunFolder) -> RunFolder:
    """Lock the folder and write down this start."""
    run.lock()
    now = {**provenance(), "slurm_job": _slurm_job()}
    file = run.path / _RECORD
    if file.exists():
        record = json.loads(file.read_text())
        record.setdefault("resumed", []).append(now)
    else:
        record = {"run_id": run.run_id, **now}
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, file)
    return run


def _existing(path: Path) -> RunFolder:
    record = _record(path)
    if record is None:
        raise InputError(f"{path} is not a run folder (it has no {_RECORD}); give a folder that a training run made.")
    return _started(RunFolder(path, record["run_id"]))


def _exactly(path: Path) -> RunFolder:
    if _record(path) is not None:
        return _existing(path)
    if path.exists() and (not path.is_dir() or any(p.name != ".lock" for p in path.iterdir())):
        raise InputError(f"run.dir={path} holds other files and no run; choose an empty or absent folder.")
    path.mkdir(parents=True, exist_ok=True)
    return _started(RunFolder(path, secrets.token_hex(4)))


def _record(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / _RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{path / _RECORD} is damaged ({error}); start a new run.") from error


def _slurm_job() -> str | None:
    """The job this process belongs to: the same after a requeue, different for every task of an array."""
    job = os.environ.get("SLURM_JOB_ID")
    return job and f"{job}/{os.environ.get('SLURM_STEP_ID', '')}"


def _requeued(root: Path, name: str) -> RunFolder | None:
    """The folder this job made before SLURM stopped and started it again."""
    if not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return None
    for path in sorted(root.glob(f"{name}-*")):
        record = _record(path)
        if record and record.get("slurm_job") == _slurm_job():
            return _existing(path)
    return None
