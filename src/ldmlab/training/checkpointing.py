"""The checkpoints of a run: atomic writes, the newest few are kept, the newest readable one is used to resume."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import CheckpointIO

from ldmlab import distributed, format1
from ldmlab.checkpoints import inventory, load_checkpoint, save_checkpoint
from ldmlab.errors import InputError
from ldmlab.files import by_step

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

    def prune(self) -> None:
        """Delete all but the newest `keep`."""
        for old in self.by_age()[: -self.keep]:
            old.unlink()

    def prune_best(self, note: Mapping[str, Any]) -> None:
        """Delete the best checkpoints of before."""
        for old in set(self.folder.glob(_BEST)) - {self.best_path(note)}:
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
                return path, complete(load_checkpoint(path), path)
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
    """Checkpoints of the Trainer, written whole or not at all; what was read to compare is not read again."""

    def __init__(self) -> None:
        self.held: dict[str, Any] | None = None  # content of the checkpoint to resume, until it is taken up

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """With an inventory; only the first process calls it."""
        save_checkpoint(Path(path), {**checkpoint, "inventory": inventory(checkpoint)})

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """The content with the keys that the Trainer demands; our hooks restore the rest."""
        content, self.held = self.held or complete(load_checkpoint(Path(path)), Path(path)), None
        demanded = {"global_step": content["step"], "epoch": 0, "pytorch-lightning_version": pl.__version__}
        empty: dict[str, Any] = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
        return {**empty, **demanded, **content}

    def remove_checkpoint(self, path: Any) -> None:
        """Of a callback that keeps its own."""
        Path(path).unlink(missing_ok=True)


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
