"""The checkpoints of a run: atomic writes, the newest few are kept, the newest readable one is used to resume."""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO

from ldmlab import distributed, format1, sharded
from ldmlab.checkpoints import in_host_memory, inventory, load_checkpoint, save_checkpoint, save_tensors
from ldmlab.errors import InputError
from ldmlab.files import beside, by_step, link, put, remove
from ldmlab.sharded import STATE, Parts, mark, shard_name
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
        return self.folder / f"step_{step:08d}.ckpt"

    def best_path(self, note: Mapping[str, Any]) -> Path:
        """`best_step_<step>_<name>_<value>.ckpt`, by the note on the best."""
        return self.folder / f"best_step_{note['step']:08d}_{note['name']}_{note['value']:.6g}.ckpt"

    def prune(self, best: Mapping[str, Any] | None = None) -> None:
        """Delete all but the newest `keep`, and the best ones of before where `best` is the note on a new one."""
        before = set(self.folder.glob(_BEST)) - {self.best_path(best)} if best else ()
        for old in [*self.by_age()[: -self.keep], *before]:
            remove(old)

    def best(self) -> Path | None:
        return max(self.folder.glob(_BEST), default=None)

    def by_age(self) -> list[Path]:
        """Checkpoints by step, oldest first."""
        return by_step(self.folder, ".ckpt")

    def last(self) -> Path | None:
        return next(iter(self.by_age()[-1:]), None)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, else the best one, with its content; None in a run without any.

        A collective call: each process maps the content from the file and checks its part of the shards' checksums.
        """
        found = distributed.from_first([*reversed(self.by_age()), *sorted(self.folder.glob(_BEST), reverse=True)])
        for path in found:
            content, fault = {}, ""
            process = (distributed.rank(), distributed.world_size())
            try:
                content = complete(load_checkpoint(path, lazily=True, process=process), path)
            except InputError as error:
                fault = str(error)
            if not (faults := [fault for fault in distributed.gather(fault) if fault]):
                return path, content
            distributed.say(f"ldmlab: {faults[0]} Trying the one before it.")
        if found:
            raise InputError(f"none of the {len(found)} checkpoints in {self.folder} can be read; start a new run.")
        return None

    def sweep(self) -> None:
        """Delete incomplete files of killed processes, also those next to the folder of checkpoints."""
        others = [part for name in _BESIDE for part in self.folder.parent.glob(f"{name}.*.part")]
        for part in [*self.folder.glob(".*.part"), *others] if distributed.rank() == 0 else []:
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


_BESIDE = (
    *(".metrics.csv", ".config.yaml", ".model.yaml", ".provenance.json", ".finished.json"),
    *("averages/.step_*", "in_training/*/.metrics.json"),
)


class Files(CheckpointIO):
    """Atomic checkpoints of the Trainer.

    Those of a run are copied to host memory and written by a thread while training goes on, one at a time. At the end
    of the context the last one is written, or its error is raised.
    """

    def __init__(self) -> None:
        self.held: dict[str, Any] | None = None  # content of the checkpoint to resume, until the Trainer loads it
        self._writing: threading.Thread | None = None
        self._fault: InputError | None = None
        self._group: Any = None  # process group of the writing threads

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except Exception:
            if error is None or isinstance(error, Interrupted):
                raise

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """With an inventory; the first process calls it, or, where there are sharded tensors, every process.

        storage_options: the other paths of a run's own checkpoint, and what to call when all are written. Without it,
        as in calls of other callbacks, the file is written on return.
        """
        self.wait()
        others, then = storage_options or ([], lambda: None)
        content, parts = sharded.split(checkpoint)
        if parts.found:
            distributed.barrier()  # the one before may have the same path, of which no process may still be writing
        if parts.found and self._group is None and distributed.joined():
            self._group = distributed.subgroup([[*range(distributed.world_size())]], "gloo")  # used by the threads only
        content, parts.tensors = in_host_memory((content if distributed.rank() == 0 else {}, parts.tensors))
        arguments = (content, parts, [Path(path), *others], then)
        if storage_options is None:
            self._write(*arguments)
            self.wait()
        else:
            self._writing = threading.Thread(target=self._write, args=arguments, daemon=True)
            self._writing.start()

    def _write(self, content: dict[str, Any], parts: Parts, paths: list[Path], then: Callable[[], None]) -> None:
        path = paths[0]
        with self._noted(path):
            if parts.found:
                content["shards"] = self._write_shards(parts, beside(path))
            if distributed.rank() == 0:
                file = beside(path) / STATE if parts.found else path
                save_checkpoint(file, {**content, "inventory": inventory(content)})
                if parts.found:
                    put(beside(path), path)
                for other in paths[1:]:
                    link(path, other)
                then()
        if self._fault is not None and distributed.rank() == 0:
            shutil.rmtree(beside(path), ignore_errors=True)

    @contextmanager
    def _noted(self, path: Path) -> Iterator[None]:
        """An exception inside is raised by `wait`, as an InputError."""
        try:
            yield
        except InputError as error:
            self._fault = error
        except Exception as error:
            reason = repr(error).partition("\\n")[0][:300]
            self._fault = InputError(f"{path} was not written ({reason}); solve that and run the command again.")

    def _write_shards(self, parts: Parts, folder: Path) -> dict[str, list[int]]:
        """Write this process's shards; size and checksum of those of all processes."""
        noted: list[int] = []
        name = shard_name(distributed.rank())
        with self._noted(folder / name):
            save_tensors(folder / name, parts.tensors)
            noted = mark(folder / name)
        found: list[Any] = [(name, noted, self._fault)]
        if self._group is not None:
            found *= distributed.world_size()
            torch.distributed.all_gather_object(found, found[0], self._group)
        for _, _, fault in found:
            if fault is not None:
                raise fault
        return {name: noted for name, noted, _ in found}

    def wait(self, for_end: bool = True) -> None:
        """Wait for the checkpoint that is being written; raise the error of writing it.

        for_end=False: do not wait, raise only.
        """
        if self._writing is not None and (for_end or not self._writing.is_alive()):
            self._writing.join()
            self._writing = None
        if self._writing is None and self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """The content with the keys that the Trainer requires; our hooks restore the rest."""
        content, self.held = self.held or complete(load_checkpoint(Path(path), lazily=True), Path(path)), None
        demanded = {"global_step": content["step"], "epoch": 0, "pytorch-lightning_version": pl.__version__}
        empty: dict[str, Any] = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
        return {**empty, **demanded, **content}

    def remove_checkpoint(self, path: Any) -> None:
        """Of a callback that keeps its own."""
        self.wait()
        remove(Path(path))


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
