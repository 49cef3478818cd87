"""Weights and Biases: scalars and small panels of a run, under the run's own id."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from ldmlab import distributed
from ldmlab.errors import InputError, one_of
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


class WandB(WandbLogger):
    """Lightning's logger under the run's own id; only metrics and small images are uploaded."""

    def __init__(
        self,
        project: str = "ldmlab",
        mode: str | None = None,  # offline | online | disabled; None: WANDB_MODE or WANDB_DISABLED, else offline
        entity: str | None = None,  # account or team
        group: str | None = None,  # name that runs to be compared share
        tags: Sequence[str] | str = (),  # one or several, beside the stage, the factor and the kind of first stage
        panel_px: int = 1024,  # longest side of an uploaded grid; samples/ keeps the full size
        upload: str = "none",  # none | best | last: the checkpoint to upload, once, when the run ends without error
    ) -> None:
        self.mode, self.upload, self.panel_px = chosen_mode(mode), upload, panel_px
        for name, choices in (("mode", MODES), ("upload", ("none", "best", "last"))):
            one_of(f"logger.wandb.{name}", getattr(self, name), choices)
        if panel_px < 16:
            raise InputError(f"logger.wandb.panel_px={panel_px} shows nothing; use 16 or more.")
        self.project, self.entity, self.group = project, entity, group
        self.tags = [tags] if isinstance(tags, str) else tags
        self._run: RunFolder | None = None  # while it is open, on the first process

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """Start or resume the W&B run; all its files stay under the run folder."""
        experiment = self._begun(run, settings) if distributed.rank() == 0 else None
        super().__init__(experiment=experiment, log_model=False)
        if experiment is not None:
            self._run = run
            experiment.define_metric(_STEP)
            experiment.define_metric("*", step_metric=_STEP, step_sync=True)
            experiment.config.update(settings, allow_val_change=True)

    def send_scores(self, run: RunFolder, settings: dict[str, Any], values: Mapping[str, float]) -> None:
        """Scores of finished evaluations to the summary of the run, which they replace: the newest metrics go too."""
        newest: dict[str, float] = {}
        for row in read_metrics(run.metrics)[1]:
            newest |= {name: float(text) for name, text in row.items() if text and name != "step"}
            newest[_STEP] = float(row["step"])
        experiment = self._begun(run, settings)
        try:
            experiment.summary.update({**newest, **values})
        finally:
            experiment.finish(exit_code=0)

    def _begun(self, run: RunFolder, settings: dict[str, Any]) -> Any:
        """W&B's run under our id, new or resumed."""
        import wandb

        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ[name] = str(run.path / "wandb")
        os.environ.setdefault("WANDB_SILENT", "true")
        only_metrics = wandb.Settings(  # no console output, code, git differences, packages, machine or account names
            console="off", disable_code=True, save_code=False, disable_git=True, x_save_requirements=False,
            x_disable_meta=True,
        )  # fmt: skip
        stage, factor = settings.get("stage", {}).get("name"), settings.get("downsampling")
        tags = [*self.tags, stage, f"f{factor}" if factor else None, settings.get("first_stage_kind")]
        experiment = wandb.init(
            name=run.name, dir=str(run.path), id=wandb_id(run), project=self.project, mode=self.mode,  # type: ignore[arg-type]
            entity=self.entity, group=self.group, job_type=stage, tags=list(dict.fromkeys(filter(None, tags))),
            resume="allow", settings=only_metrics,
        )  # fmt: skip
        if experiment.id != wandb_id(run):  # an agent of a W&B sweep sets the id; later starts must use the same one
            write_text(run.path / _CHOSEN_ID, experiment.id + "\n")
        return experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row at W&B's own step too, so that a resumed run continues where it was."""
        self.experiment.log({**metrics, _STEP: step}, step=step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """One image, made small."""
        import wandb

        shown = Image.fromarray(images[0])
        shown.thumbnail((self.panel_px, self.panel_px))  # never larger than it was
        self.experiment.log({key: wandb.Image(shown), _STEP: step}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Report the exit status to W&B in every case; uploads happen now, when no better checkpoint can follow."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if status == "success" and self.upload != "none":
                self._upload(run)
        finally:
            self.experiment.finish(exit_code=0 if status == "success" else 1)

    def _upload(self, run: RunFolder) -> None:
        import wandb

        checkpoints = Checkpoints(run.checkpoints)
        path = checkpoints.best() if self.upload == "best" else next(iter(checkpoints.by_age()[-1:]), None)
        if path is not None:
            artifact = wandb.Artifact(f"model-{run.run_id}", type="model")
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), path.name, policy="immutable", skip_cache=True)  # no second copy on this disk
            self.experiment.log_artifact(artifact)


def wandb_id(run: RunFolder) -> str:
    """The id of the run at W&B: its own, or the one that a W&B sweep chose when it began."""
    chosen = run.path / _CHOSEN_ID
    return chosen.read_text().strip() if chosen.exists() else run.run_id
