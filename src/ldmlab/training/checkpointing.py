"""The checkpoints of a run: atomic writes, the newest few are kept, the newest readable one is used to resume."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import CheckpointIO

from ldmlab import distributed, format1
from ldmlab.checkpoints import in_host_memory, inventory, load_checkpoint, save_checkpoint
from ldmlab.errors import InputError
from ldmlab.files import by_step, link
from ldmlab.training.signals import Interrupted

FORMAT_VERSION = 2
_PARTS: dict[str, type] = {  # what every checkpoint holds
    **{"kind": str, "step": int, "position": int, "seed": int, "modules": dict, "averaged": dict},
    **{"optimizers": dict, "rng": list, "data": dict, "notes": dict},
}
_BEST = "best*.ckpt"


class Checkpoints:
    """The folder `checkpoints/` of a run; only the first process writes."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"trainer.keep={keep} would delete every checkpoint; keep at least 1.")
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """`step_<step>.ckpt`."""
        return self.folder / f"step_{step:08d}.ckpt"

    def best_path(self, note: Mapping[str, Any]) -> Path:
        """`best_step_<step>_<name>_<value>.ckpt`, by the note on the best."""
        return self.folder / f"best_step_{note['step']:08d}_{note['name']}_{note['value']:.6g}.ckpt"

    def prune(self, best: Mapping[str, Any] | None = None) -> None:
        """Delete all but the newest `keep`, and the best ones of before where `best` is the note on a new one."""
        before = set(self.folder.glob(_BEST)) - {self.best_path(best)} if best else ()
        for old in [*self.by_age()[: -self.keep], *before]:
            old.unlink()

    def best(self) -> Path | None:
        """The best checkpoint so far, if there is one."""
        return max(self.folder.glob(_BEST), default=None)

    def by_age(self) -> list[Path]:
        """Checkpoints by step, oldest first."""
        return by_step(self.folder, ".ckpt")

    def last(self) -> Path | None:
        """The checkpoint of the last step, if there is one."""
        return next(iter(self.by_age()[-1:]), None)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, else the best one, with its content; None in a run without any."""
        damaged = 0
        for path in [*reversed(self.by_age()), *sorted(self.folder.glob(_BEST), reverse=True)]:
            try:
                return path, complete(load_checkpoint(path, lazily=True), path)
            except InputError as error:
                distributed.say(f"ldmlab: {error} Trying the one before it.")
                damaged += 1
        if damaged:
            raise InputError(f"none of the {damaged} checkpoints in {self.folder} can be read; start a new run.")
        return None

    def sweep(self) -> None:
        """Delete incomplete files of killed processes, also those next to the folder of checkpoints."""
        beside = [part for name in _BESIDE for part in self.folder.parent.glob(f".{name}.*.part")]
        for part in [*self.folder.glob(".*.part"), *beside] if distributed.rank() == 0 else []:
            part.unlink(missing_ok=True)


_BESIDE = ("metrics.csv", "config.yaml", "model.yaml", "provenance.json", "finished.json")


class Files(CheckpointIO):
    """Checkpoints of the Trainer, written whole or not at all; what was read to compare is not read again.

    Those of a run are copied to host memory and written by a thread while training goes on, one at a time. Inside the
    context nothing is left unwritten: what kept the last one from it is raised at its end.
    """

    def __init__(self) -> None:
        self.held: dict[str, Any] | None = None  # content of the checkpoint to resume, until it is taken up
        self._writing: threading.Thread | None = None
        self._fault: InputError | None = None

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except Exception:
            if error is None or isinstance(error, Interrupted):
                raise

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """With an inventory; only the first process calls it.

        storage_options: the other paths of a run's own checkpoint, and what to do once all are there. Without, as other
        callbacks call it, the file exists on return.
        """
        self.wait()
        if storage_options is None:
            _write(checkpoint, [Path(path)])
            return
        others, then = storage_options
        held = in_host_memory(checkpoint)
        self._writing = threading.Thread(target=self._write, args=(held, [Path(path), *others], then), daemon=True)
        self._writing.start()

    def _write(self, content: dict[str, Any], paths: list[Path], then: Callable[[], None]) -> None:
        try:
            _write(content, paths, then)
        except InputError as error:
            self._fault = error
        except Exception as error:
            self._fault = InputError(f"{paths[0]} was not written ({error!r}); mend that and run the command again.")

    def wait(self, for_end: bool = True) -> None:
        """Until the checkpoint is written, if it is not yet; what kept it from being written is raised.

        for_end=False: do not wait.
        """
        if self._writing is not None and (for_end or not self._writing.is_alive()):
            self._writing.join()
            self._writing = None
            fault, self._fault = self._fault, None
            if fault is not None:
                raise fault

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """The content with the keys that the Trainer demands; our hooks restore the rest."""
        content, self.held = self.held or reread(Path(path)), None
        demanded = {"global_step": content["step"], "epoch": 0, "pytorch-lightning_version": pl.__version__}
        empty: dict[str, Any] = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
        return {**empty, **demanded, **content}

    def remove_checkpoint(self, path: Any) -> None:
        """Of a callback that keeps its own."""
        self.wait()
        Path(path).unlink(missing_ok=True)


def _write(content: dict[str, Any], paths: list[Path], then: Callable[[], None] = lambda: None) -> None:
    save_checkpoint(paths[0], {**content, "inventory": inventory(content)})
    for other in paths[1:]:
        link(paths[0], other)
    then()


def reread(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that the first process has checked."""
    return complete(load_checkpoint(path, lazily=True, checked=True), path)


def complete(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content in today's names; InputError for another format, or where a part is missing."""
    version = content.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise InputError(
            f"{path} has checkpoint format {version}, this ldmlab reads {FORMAT_VERSION}; use another one."
        )
    parts = {**_PARTS, **({"terms": dict} if version == 1 else {"metrics": dict, "run": dict})}
    if lacking := [name for name, kind in parts.items() if not isinstance(content.get(name), kind)]:
        raise InputError(f"{path} lacks {', '.join(lacking)}, so it is no complete checkpoint; use another one.")
    if content.pop("inventory", None) is None and version == FORMAT_VERSION:
        raise InputError(f"{path} lacks its inventory, so it was not saved by ldmlab; use another one.")
    for name, state in content["optimizers"].items():
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
            raise InputError(f"{path} lacks the state of the optimizer {name}; use another one.")
    return format1.checkpoint(content) if version == 1 else content
