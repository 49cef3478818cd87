"""diffusers' scheduler configuration and our diffusion node, both ways."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError

Config = Mapping[str, Any]
_NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}  # theirs => ours
_PREDICTIONS = {"epsilon": "EpsPrediction", "v_prediction": "VPrediction"}
_HOME = "ldmlab.diffusion."
_SAME = 1e-6  # float32 of betas below 0.02 is much closer


def diffusion_node(config: Config) -> dict[str, Any]:
    """Our diffusion node for a `scheduler_config.json`: the noise levels and what is predicted, not the steps taken."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise InputError(f"scheduler prediction_type={prediction} is not known; known are {', '.join(_PREDICTIONS)}.")
    if config.get("rescale_betas_zero_snr"):
        raise InputError("scheduler rescale_betas_zero_snr=true cannot be represented here; use a model without it.")
    return {
        "_target_": f"{_HOME}latent_diffusion.LatentDiffusion",
        "prediction": {"_target_": f"{_HOME}parameterization.{_PREDICTIONS[prediction]}"},
        "schedule": {"_target_": f"{_HOME}schedule.Schedule", **_schedule(config)},
    }


def _schedule(config: Config) -> dict[str, Any]:
    trained = config.get("trained_betas")
    if trained is not None:
        return _named(trained)
    name, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if name not in _NAMES:
        raise InputError(f"scheduler beta_schedule={name} is not known; known are {', '.join(_NAMES)}.")
    if name == "squaredcos_cap_v2":
        return {"name": "cosine", "steps": steps}
    ends = {"start": config.get("beta_start", 0.0001), "end": config.get("beta_end", 0.02)}
    return {"name": _NAMES[name], **ends, "steps": steps}


def _named(betas: Sequence[float]) -> dict[str, Any]:
    """The schedule of ours that gives these betas."""
    table = torch.tensor(betas, dtype=torch.float64)
    first, last = float(table[0]), float(table[-1])
    for name in ("scaled_linear", "linear", "sqrt"):
        ends = {"start": first**2, "end": last**2} if name == "sqrt" else {"start": first, "end": last}
        if torch.allclose(Schedule(name, **ends, steps=len(table)).betas, table, atol=_SAME, rtol=0):
            return {"name": name, **ends, "steps": len(table)}
    if torch.allclose(Schedule("cosine", steps=len(table)).betas, table, atol=_SAME, rtol=0):
        return {"name": "cosine", "steps": len(table)}
    raise InputError(
        f"scheduler trained_betas={first} .. {last} follow no schedule that ldmlab has; use another model."
    )


def configuration(node: Mapping[str, Any]) -> Config:
    """Options of a DDIMScheduler that steps as the official DDIM sampler does, for a diffusion node of ours."""
    prediction = str(node["prediction"]["_target_"]).rpartition(".")[2]
    theirs = {ours: name for name, ours in _PREDICTIONS.items()}
    if prediction not in theirs:
        raise InputError(f"diffusion.prediction={prediction} has no scheduler in diffusers; use --format ldmlab.")
    given = {key: value for key, value in node["schedule"].items() if key != "_target_"}
    schedule = Schedule(**given)
    names = {ours: name for name, ours in _NAMES.items()}
    config: dict[str, Any] = {
        "num_train_timesteps": schedule.steps,
        "prediction_type": theirs[prediction],
        "clip_sample": False,
        "set_alpha_to_one": False,  # the last step goes to the first level of the schedule
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    if schedule.name in ("scaled_linear", "linear"):
        ends = {"beta_start": given.get("start", 0.0015), "beta_end": given.get("end", 0.0195)}
        return config | {"beta_schedule": names[schedule.name], **ends}
    return config | {"trained_betas": schedule.betas.tolist()}
