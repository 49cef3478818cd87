"""Weights and Biases: scalars and small panels of a run, under the run's own id."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.files import write_text
from ldmlab.training.checkpointing import Checkpoints
from ldmlab.training.loggers import read_metrics
from ldmlab.training.run_folder import RunFolder

_CHOSEN_ID = "wandb_id"  # in a run folder: the id that a W&B sweep gave, where it is not the run's own
_STEP = "trainer/global_step"


MODES = ("offline", "online", "disabled")


def chosen_mode(mode: str | None) -> str:
    """The mode as configured, else from W&B's own variables; an overridden variable is reported."""
    variable = os.environ.get("WANDB_MODE", "").strip().lower()
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on"):
        variable = "disabled"
    variable = {"dryrun": "offline", "run": "online", "": ""}.get(variable, variable)
    if mode is None:
        if variable and variable not in MODES:
            raise InputError(f"WANDB_MODE={variable} is unknown; choose {', '.join(MODES)}, or unset it.")
        return variable or "offline"
    if variable and variable != mode:
        distributed.say(f"logger.wandb.mode={mode} is used, not {variable} of WANDB_MODE or WANDB_DISABLED")
    return mode


@dataclass
class WandB:
    """Through Lightning's logger; the W&B id is the run's id, and only metrics and small images are uploaded."""

    project: str = "ldmlab"
    mode: str | None = None  # offline | online | disabled; None: WANDB_MODE or WANDB_DISABLED, else offline
    entity: str | None = None  # account or team
    group: str | None = None  # name that runs to be compared share
    tags: Sequence[str] | str = ()  # one or several, in addition to the stage, the factor and the kind of first stage
    panel_px: int = 1024  # longest side of an uploaded grid; samples/ keeps the full size
    upload: str = "none"  # none | best | last: the checkpoint to upload, once, when the run ends without error
    _logger: Any = field(default=None, init=False)
    _run: RunFolder | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.tags, str):
            self.tags = [self.tags]
        self.mode = chosen_mode(self.mode)
        for name, choices in (("mode", MODES), ("upload", ("none", "best", "last"))):
            if getattr(self, name) not in choices:
                raise InputError(f"logger.wandb.{name}={getattr(self, name)} is unknown; choose {', '.join(choices)}.")
        if self.panel_px < 16:
            raise InputError(f"logger.wandb.panel_px={self.panel_px} shows nothing; use 16 or more.")

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """Start or resume the W&B run; all its files stay under the run folder."""
        from pytorch_lightning.loggers import WandbLogger

        experiment = self._begun(run, settings)
        experiment.define_metric(_STEP)
        experiment.define_metric("*", step_metric=_STEP, step_sync=True)
        self._run, self._logger = run, WandbLogger(experiment=experiment, log_model=False)
        experiment.config.update(settings, allow_val_change=True)

    def send_scores(self, run: RunFolder, settings: dict[str, Any], values: Mapping[str, float]) -> None:
        """Scores of finished evaluations to the summary of the run; the newest metrics stay there too."""
        experiment = self._begun(run, settings)
        try:
            experiment.summary.update({**_newest_numbers(run), **values})
        finally:
            experiment.finish(exit_code=0)

    def _begun(self, run: RunFolder, settings: dict[str, Any]) -> Any:
        """W&B's run under our id, new or resumed."""
        import wandb

        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ[name] = str(run.path / "wandb")
        os.environ.setdefault("WANDB_SILENT", "true")
        experiment = wandb.init(
            name=run.name, dir=str(run.path), id=wandb_id(run), project=self.project, mode=self.mode,  # type: ignore[arg-type]
            entity=self.entity, group=self.group, job_type=_stage(settings), tags=self._all_tags(settings),
            resume="allow", settings=_numbers_only(),
        )  # fmt: skip
        _remember_id(run, experiment.id)
        return experiment

    def _all_tags(self, settings: dict[str, Any]) -> list[str]:
        factor, kind = settings.get("downsampling"), settings.get("first_stage_kind")
        found = [_stage(settings), f"f{factor}" if factor else None, kind]
        return list(dict.fromkeys([*self.tags, *(tag for tag in found if tag)]))

    def numbers(self, values: dict[str, float], step: int) -> None:
        """One row at W&B's own step too, so that a resumed run continues where it was."""
        self._logger.experiment.log({**values, _STEP: step}, step=step)

    def image(self, name: str, grid: np.ndarray, step: int) -> None:
        """One image, made small."""
        import wandb

        shown = Image.fromarray(grid)
        shown.thumbnail((self.panel_px, self.panel_px))  # never larger than it was
        self._logger.experiment.log({name: wandb.Image(shown), _STEP: step}, step=step)

    def close(self, success: bool) -> None:
        """Report the exit status to W&B in every case; uploads happen now, when no better checkpoint can follow."""
        if self._logger is None:
            return
        try:
            if success and self.upload != "none":
                self._upload()
        finally:
            self._logger.experiment.finish(exit_code=0 if success else 1)

    def _upload(self) -> None:
        import wandb

        assert self._run is not None
        checkpoints = Checkpoints(self._run.checkpoints)
        path = checkpoints.best() if self.upload == "best" else next(iter(checkpoints.by_age()[-1:]), None)
        if path is not None:
            artifact = wandb.Artifact(f"model-{self._run.run_id}", type="model")
            artifact.add_file(str(path), policy="immutable", skip_cache=True)  # no second copy on this disk
            self._logger.experiment.log_artifact(artifact)


def _newest_numbers(run: RunFolder) -> dict[str, float]:
    """The latest value of each column of metrics.csv: a summary that is sent later replaces the one before."""
    newest: dict[str, float] = {}
    for row in read_metrics(run.metrics)[1]:
        newest |= {name: float(text) for name, text in row.items() if text and name != "step"}
        newest[_STEP] = float(row["step"])
    return newest


def _stage(settings: dict[str, Any]) -> str | None:
    return settings.get("stage", {}).get("name")


def _numbers_only() -> Any:
    """Not uploaded: console output, code, git differences, package lists, machine and account names."""
    import wandb

    return wandb.Settings(
        console="off", disable_code=True, save_code=False, disable_git=True, x_save_requirements=False,
        x_disable_meta=True,
    )  # fmt: skip


def wandb_id(run: RunFolder) -> str:
    """The id of the run at W&B: its own, or the one that a W&B sweep chose when it began."""
    chosen = run.path / _CHOSEN_ID
    return chosen.read_text().strip() if chosen.exists() else run.run_id


def _remember_id(run: RunFolder, used: str) -> None:
    """An agent of a W&B sweep sets the id; later starts without it must use the same one."""
    if used != wandb_id(run):
        write_text(run.path / _CHOSEN_ID, used + "\n")
