"""Distillation: the configuration and the model of a student, whose parts come with `teacher=RUN`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldmlab.build import build_latent_diffusion, building
from ldmlab.checkpoints import fingerprint, load_exactly
from ldmlab.diffusion.consistency_distillation import Consistency
from ldmlab.diffusion.few_steps import FewSteps
from ldmlab.errors import InputError
from ldmlab.instantiate import locate
from ldmlab.model_files import ModelFiles, describe, read_model

Config = Mapping[str, Any]
_COMES_WITH = ("backbone", "conditioner", "task", "diffusion.schedule", "diffusion.prediction", "stage.latent_scale")


def taught(config: Config, chosen: Collection[str] = ()) -> Config:
    """With the parts that come with the teacher; typed ones, and a teacher that nothing learns from, are refused."""
    run, learns = config.get("teacher"), config["stage"]["name"] == "diffusion" and _distils(config["diffusion"])
    if run is None and learns:
        raise InputError("diffusion=consistency distils a trained model; name its run or model folder: teacher=RUN.")
    if run is None:
        return config
    if not learns:
        raise InputError(
            f"teacher={run}: only stage=diffusion with diffusion=consistency learns from one; leave it out."
        )
    for name in sorted(chosen):
        if name.startswith(_COMES_WITH):
            raise InputError(f"{name} comes with teacher={run}; leave one of the two out.")
    spec = describe(run)
    check_teacher(run, spec, config["diffusion"].get("guidance", 1.0))
    own = {name: spec["diffusion"][name] for name in ("schedule", "prediction")}
    task = {name: value for name, value in (spec.get("task") or {}).items() if name != "image_size"}
    given = {"backbone": spec["backbone"], "conditioner": spec["conditioners"], "task": task}
    source = config["from_run"] or (None if config["data"]["latents"] else run)
    return {**config, **given, "diffusion": {**config["diffusion"], **own}, "from_run": source}


def check_teacher(run: str, spec: Mapping[str, Any], guidance: Any) -> None:
    """InputError for a model that cannot be distilled."""
    if spec["kind"] != "latent_diffusion":
        raise InputError(f"teacher={run} is a model of kind {spec['kind']}; give a run or model folder of a denoiser.")
    kind = locate(spec["diffusion"], where="diffusion")
    if isinstance(kind, type) and issubclass(kind, FewSteps):
        raise InputError(f"teacher={run} is a {kind.__name__} model, of few steps already; give the run of a teacher.")
    prediction = locate(spec["diffusion"]["prediction"], where="diffusion.prediction")
    if getattr(prediction, "outputs", 1) != 1:
        raise InputError(f"teacher={run} has a learned variance, which a student of few steps does not; give another.")
    if guidance != 1 and not spec["conditioners"]:
        raise InputError(f"diffusion.guidance={guidance}: teacher={run} has no conditions to guide by; use 1.")
    if guidance != 1 and spec.get("guidance_trained") is False:
        raise InputError(
            f"diffusion.guidance={guidance}: teacher={run} was trained without dropped conditions, so it cannot be "
            "guided; use 1."
        )


def _distils(node: Config) -> bool:
    kind = locate(node, where="diffusion")
    return isinstance(kind, type) and issubclass(kind, Consistency)


@dataclass(frozen=True)
class Teacher:
    """A trained model with its weights."""

    run: str
    files: ModelFiles

    @classmethod
    def of(cls, config: Config) -> "Teacher | None":
        """The configuration's, with averaged weights."""
        run = config.get("teacher")
        return None if run is None else cls(run, read_model(run))

    def lend(self, first_stage: nn.Module, conditioners: Mapping[str, Any]) -> dict[str, Any]:
        """Its conditioners' weights into the student's, frozen; the node of its latent scale.

        Another first stage, so that latents differ, is refused.
        """
        own, theirs = (
            fingerprint(part) for part in (first_stage.state_dict(), self.files.parts.get("first_stage", {}))
        )
        if own != theirs:
            raise InputError(
                f"teacher={self.run} was trained on latents of another first stage ({theirs}) than this run's ({own}); "
                "give data.latents that its first stage made."
            )
        modules = nn.ModuleDict(conditioners)
        if modules.state_dict():
            load_exactly(modules, self.files.parts["conditioner"], f"teacher={self.run} (conditioner)")
        modules.requires_grad_(False)
        return self.files.spec["latent_scale"]

    def teach(self, student: Consistency, values: int) -> str:
        """The student begins with the teacher's weights and learns from it; their fingerprint.

        values: of a latent.
        """
        shared: dict[str, Any] = {
            "first_stage": student.first_stage,
            "conditioners": dict(student.conditioners),
            "task": student.task,
        }
        with building(self.files):
            teacher = build_latent_diffusion(self.files.spec, latent_scale=student.latent_scale, **shared)
        weights = self.files.parts["denoiser"]
        load_exactly(teacher.backbone, weights, f"teacher={self.run} (denoiser)")
        new = {name: value for name, value in student.backbone.state_dict().items() if name.startswith("numbers.")}
        load_exactly(student.backbone, {**weights, **new}, f"teacher={self.run} (denoiser)")
        teacher.objective.weighting = None  # trained with it alone
        student.distil(teacher, values)
        return fingerprint(weights)
