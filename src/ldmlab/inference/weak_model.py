"""The weaker model of autoguidance: what it must share with the model that it guides."""

from typing import Any

from torch import Tensor

from ldmlab.checkpoints import fingerprint
from ldmlab.contracts import Path
from ldmlab.diffusion.few_steps import FewSteps
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.schedule import same_path
from ldmlab.errors import InputError

_SAME_SCALE = 0.01  # relative; a network does not notice less, and two measurements of one scale may differ so


def of_other_latents(diffusion: LatentDiffusion, stage: str, scale: LatentScale) -> list[str]:
    """What differs of the latent space of a model from a first stage of that fingerprint and a latent scale."""
    ours = diffusion.latent_scale
    differs = {
        "first stage": stage != fingerprint(diffusion.first_stage.state_dict()),
        "latent scale": not (_near(scale.std, ours.std, ours.std) and _near(scale.shift, ours.shift, ours.std)),
    }
    return [name for name, yes in differs.items() if yes]


def _near(first: Tensor, second: Tensor, unit: Tensor) -> bool:
    return bool(((first.cpu() - second.cpu()).abs() <= _SAME_SCALE * unit.cpu().abs()).all())


def check_weak(model: LatentDiffusion, weak: LatentDiffusion, name: str) -> None:
    """InputError for a model of other latents, noise levels, prediction or inputs; it may lack inputs."""
    if isinstance(weak, FewSteps):
        raise InputError(f"weak_model={name} is a model of few steps, with guidance inside; give one of many steps.")
    found = of_other_latents(model, fingerprint(weak.first_stage.state_dict()), weak.latent_scale)
    found += [] if same_path(_unshifted(weak.path), _unshifted(model.path)) else ["noise schedule"]
    found += [] if _meaning(weak.prediction) == _meaning(model.prediction) else ["prediction"]
    if found:
        raise InputError(
            f"weak_model={name} has another {' and '.join(found)} than the model; give an earlier checkpoint, or a "
            "smaller or shorter run on the same latents with the same diffusion."
        )
    if more := sorted(_inputs(weak) - _inputs(model)):
        raise InputError(
            f"weak_model={name} takes {', '.join(more)}, which the model does not; give one with the same conditions."
        )


def _unshifted(path: Path) -> Path:
    """Training may shift the times of both differently; a time means the same level."""
    return path if hasattr(path, "steps") else path.with_shift(1.0)


def _meaning(prediction: Any) -> tuple[type, dict[str, Any]]:
    """Type and options of a prediction, without a learned variance."""
    mean = getattr(prediction, "mean", prediction)
    return type(mean), vars(mean)


def _inputs(model: LatentDiffusion) -> frozenset[str]:
    return frozenset().union(*(c.reads for c in model.conditioners.values()))  # type: ignore[arg-type]
